"""What is done to training images, whole batches at a time.

Each function is a pure function of tensors: what is random was drawn before, by
``sparsenet.data.sampling.plan_epoch``. None waits for an accelerator or looks at its data in
Python, so that a training step can be captured: where each image has an operation of its own, all
images go through all of them, with numbers that leave the others' images as they are. On a CPU,
where nobody records operations, an image goes through its own kind alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet.data.config import DataConfig
from sparsenet.ops.tracing import is_watched

MOVING = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDING = ("brightness", "colour", "contrast", "sharpness")
LEVELLING = ("posterize", "solarize", "autocontrast", "equalize")
OPERATIONS = ("identity", *MOVING, *BLENDING, *LEVELLING)  # of TrivialAugment, arXiv:2103.10158
# The ranges are its "wide" ones, but for the translation, which as a part of the side is less than
# its 32 pixels: they would move a small image out of sight.
SHEAR = 0.99
ROTATION = math.radians(135)
TRANSLATION = 10 / 32
BLEND = 0.99  # how far the factor of a blend goes from 1
DROPPED = 6  # low bits, of 8

RATIO = 4 / 3  # the largest of a crop's sides to each other

_NONE = torch.empty(0)


class Moves(NamedTuple):
    """What is done to images: entry *p* of each tensor is for image *p*.

    Tensors that the settings do not ask for are empty. A centre is a row and a column, as parts of
    the side from 0 to below 1.
    """

    offsets: Tensor  # (N, 2) int64: row and column of the crop, each from 0 to 2 * shift
    flips: Tensor  # (N,) bool
    crops: Tensor = _NONE  # (N, 4) float32: top, left, height and width, as parts of the side
    operations: Tensor = _NONE  # (N,) int64: places in OPERATIONS
    strengths: Tensor = _NONE  # (N,) float32: of the operation, from -1 to 1, at 0 none
    holes: Tensor = _NONE  # (N, 2) float32: centre of the square that is cut out
    shares: Tensor = _NONE  # (N,) float32: of the image itself, the rest being its partner's
    cuts: Tensor = _NONE  # (N,) bool: whether the partner's share is a square of it
    boxes: Tensor = _NONE  # (N, 2) float32: centre of that square


def augment(batch: Tensor, moves: Moves, config: DataConfig, fill: Tensor) -> Tensor:
    """Shifts or crops, mirrors, changes and cuts out uint8 ``(N, C, H, W)``, as *config* asks for.

    What comes into sight from outside, and what is cut out, is *fill*, uint8 ``(C,)``: with the
    channel means, zeros once normalised. Crops become square images of ``image_size`` pixels a
    side, those of the batch where that is 0. Mixing is done by ``mix``, on normalised images.
    """
    if config.crop:
        side = config.image_size or batch.shape[-1]
        batch = crop_and_mirror(batch, moves, side, config.trivial_augment, fill)
    else:
        batch = shift_and_mirror(batch, moves.offsets, moves.flips, config.shift, fill)
        if config.trivial_augment:
            batch = operate(batch, moves.operations, moves.strengths, fill)
    if config.cutout:
        batch = torch.where(_squares(batch, moves.holes, config.cutout), fill.view(-1, 1, 1), batch)
    return batch


def shift_and_mirror(
    batch: Tensor, offsets: Tensor, flips: Tensor, shift: int, fill: Tensor
) -> Tensor:
    """Crops images uint8 ``(N, C, H, W)``, padded by *shift* with *fill*, and mirrors *flips*."""
    n, channels, height, width = batch.shape
    padded = batch.new_zeros(n, channels, height + 2 * shift, width + 2 * shift)
    padded += fill.view(1, -1, 1, 1)
    padded[:, :, shift : shift + height, shift : shift + width] = batch
    columns = torch.arange(width, device=batch.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (N, W)
    rows = torch.arange(height, device=batch.device) + offsets[:, :1]  # (N, H)
    source = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (N, H, W), in padded
    source = source.view(n, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, source).view_as(batch)


def operate(batch: Tensor, operations: Tensor, strengths: Tensor, fill: Tensor) -> Tensor:
    """Does to each of the square images uint8 ``(N, C, S, S)`` its own of ``OPERATIONS``.

    Operations are int64 ``(N,)``; strengths, float32 ``(N,)`` from -1 to 1, are parts of the ranges
    above. At 0 an operation that has a strength leaves the image as it is.
    """
    ground, places = fill.view(-1, 1, 1).float(), _places(batch.shape[-1], batch.device)

    def move(images: Tensor, drawn: _Drawn) -> Tensor:
        rows, columns = _transform(*places, drawn)
        grid = torch.stack((columns, rows), 3)
        return _levels_of(F.grid_sample(images - ground, grid, align_corners=False) + ground)

    drawn = _Drawn.of(operations, strengths)
    return _recolour(_each(MOVING, move, batch, drawn), drawn)


def crop_and_mirror(
    batch: Tensor, moves: Moves, side: int, trivial_augment: bool, fill: Tensor
) -> Tensor:
    """The crops of square images uint8 ``(N, C, S, S)``, uint8 ``(N, C, side, side)``.

    Each pixel is looked up once, between the four that are the nearest to its place, whatever is
    done to the image. So it is exactly the usual resize where crops become larger, and where they
    become smaller is not antialiased. A shear or rotation brings into sight what lies beyond the
    crop, and *fill* beyond the image.
    """
    rows, columns = _places(side, batch.device)
    if trivial_augment:
        drawn = _Drawn.of(moves.operations, moves.strengths)
        rows, columns = _transform(rows, columns, drawn)
    columns = torch.where(moves.flips.view(-1, 1, 1), -columns, columns)
    top, left, height, width = moves.crops[:, :, None, None].unbind(1)
    rows, columns = 2 * top + height - 1 + height * rows, 2 * left + width - 1 + width * columns
    grid = torch.stack(torch.broadcast_tensors(columns, rows), 3)  # (N, side, side, 2)
    images = F.grid_sample(batch.float(), grid, padding_mode="border", align_corners=False)
    if not trivial_augment:  # no place is outside
        return _levels_of(images)
    outside = (grid.abs() > 1).any(3)[:, None]
    return _recolour(torch.where(outside, fill.view(-1, 1, 1), _levels_of(images)), drawn)


class _Drawn(NamedTuple):
    """What each image is to be changed by, for all of ``OPERATIONS``."""

    chosen: dict[str, Tensor]  # (N, 1, 1) bool
    amounts: dict[str, Tensor]  # (N, 1, 1) float32: the strength where chosen, else 0

    @classmethod
    def of(cls, operations: Tensor, strengths: Tensor) -> _Drawn:
        places = operations.view(-1, 1, 1)
        chosen = {name: places == number for number, name in enumerate(OPERATIONS)}
        amounts = {name: strengths.view(-1, 1, 1) * each for name, each in chosen.items()}
        return cls(chosen, amounts)

    def of_images(self, numbers: Tensor) -> _Drawn:
        """What the images of these *numbers* are to be changed by."""
        chosen = {name: each[numbers] for name, each in self.chosen.items()}
        return _Drawn(chosen, {name: each[numbers] for name, each in self.amounts.items()})


def _each(
    operations: tuple[str, ...],
    change: Callable[[Tensor, _Drawn], Tensor],
    images: Tensor,
    drawn: _Drawn,
) -> Tensor:
    """Images uint8 with what *change* does to those that have one of *operations*.

    It leaves the others as they are.
    """
    if images.device.type != "cpu" or is_watched(images):
        return change(images, drawn)
    have_one = torch.stack([drawn.chosen[name] for name in operations]).any(0)
    numbers = have_one.flatten().nonzero().flatten()
    return images.index_copy(0, numbers, change(images[numbers], drawn.of_images(numbers)))


def _places(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows ``(side, 1)`` and columns ``(side,)`` of pixels, from -1 to 1 along an image."""
    places = (2 * torch.arange(side, device=device) + 1) / side - 1
    return places[:, None], places


def _transform(y: Tensor, x: Tensor, drawn: _Drawn) -> tuple[Tensor, Tensor]:
    """Rows and columns ``(N, H, W)`` where the pixels at *y*, *x* come from: affine functions."""
    amounts = drawn.amounts
    angles = amounts["rotate"] * ROTATION
    columns = angles.cos() * x + (amounts["shear_x"] * SHEAR - angles.sin()) * y
    rows = angles.cos() * y + (amounts["shear_y"] * SHEAR + angles.sin()) * x
    columns = columns + 2 * TRANSLATION * amounts["translate_x"]
    rows = rows + 2 * TRANSLATION * amounts["translate_y"]
    return rows, columns


def _levels_of(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def _recolour(images: Tensor, drawn: _Drawn) -> Tensor:
    """Images uint8 ``(N, C, H, W)`` with what operations do to their levels."""
    return _each(LEVELLING, _relevel, _each(BLENDING, _blend, images, drawn), drawn)


def _blend(images: Tensor, drawn: _Drawn) -> Tensor:
    """Images uint8 ``(N, C, H, W)`` away from or towards black, grey, mean grey, or smooth ones."""
    images, amounts = images.float(), drawn.amounts
    red, green, blue = images.expand(-1, 3, -1, -1).split(1, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    smooth = images.clone()  # stays at the edge, where a pixel lacks neighbours
    smoothed = (9 * F.avg_pool2d(images, 3, 1, 1) + 4 * images) / 13
    smooth[:, :, 1:-1, 1:-1] = smoothed[:, :, 1:-1, 1:-1]
    change = amounts["brightness"][:, None] * images
    change += amounts["colour"][:, None] * (images - grey)
    change += amounts["contrast"][:, None] * (images - grey.mean((2, 3), keepdim=True).round())
    change += amounts["sharpness"][:, None] * (images - smooth)
    return _levels_of(images + BLEND * change)


def _relevel(images: Tensor, drawn: _Drawn) -> Tensor:
    """Images uint8 ``(N, C, H, W)`` with other levels."""
    pixels = images.long().flatten(2)
    levels = _levels(pixels, drawn.amounts, drawn.chosen)
    return levels.gather(2, pixels).to(torch.uint8).view_as(images)


def _levels(pixels: Tensor, amounts: dict[str, Tensor], chosen: dict[str, Tensor]) -> Tensor:
    """What the levels of pixels int64 ``(N, C, P)`` become: int64 ``(N, C, 256)``."""
    counts = pixels.new_zeros(*pixels.shape[:2], 256)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    below = counts.cumsum(2) - counts
    low, high = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    step = below.gather(2, high) // 255
    levels = torch.arange(256, device=pixels.device)
    stretched = (levels - low) * 255 // (high - low).clamp(min=1)
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    dropped = (DROPPED * amounts["posterize"].abs()).round().long()
    changed = levels >> dropped << dropped
    changed = torch.where(changed < 256 * (1 - amounts["solarize"].abs()), changed, 255 - changed)
    changed = torch.where(chosen["autocontrast"] & (high > low), stretched, changed)
    return torch.where(chosen["equalize"] & (step > 0), equalized, changed)


def _squares(images: Tensor, centres: Tensor, side: int | Tensor) -> Tensor:
    """Pixels in the square of *side*, ``(N, 1)`` or one, about each centre: ``(N, 1, H, W)``."""
    inside = []
    for axis, size in enumerate(images.shape[2:]):
        first = (centres[:, axis : axis + 1] * size).long() - side // 2
        beyond = torch.arange(size, device=images.device) - first  # (N, size)
        inside.append((beyond >= 0) & (beyond < side))
    rows, columns = inside
    return rows[:, None, :, None] & columns[:, None, None, :]


def mix(images: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """Mixes images float ``(N, C, S, S)`` with those of the reversed batch, their partners.

    It is done by mixup (arXiv:1710.09412) or, where ``moves.cuts``, by CutMix (arXiv:1905.04899).
    Also returns each image's own share, float32 ``(N,)``: for CutMix that of the pixels kept.
    """
    sides = ((1 - moves.shares).sqrt() * images.shape[-1]).long()
    kept = ~_squares(images, moves.boxes, sides[:, None])
    weights = torch.where(moves.cuts.view(-1, 1, 1, 1), kept, moves.shares.view(-1, 1, 1, 1))
    shares = torch.where(moves.cuts, kept.float().mean((1, 2, 3)), moves.shares)
    return torch.lerp(images.flip(0), images, weights), shares
