"""What is done to training images, whole batches at a time: shift and mirror, one drawn operation, cutout, mixing.

Pure functions of tensors: what is random was drawn before, by :func:`sparsenet.data.sampling.plan_epoch`. None waits
for the device or looks at data in Python, so that a training step can be captured: where each image has an operation of
its own, all images go through all of them, with numbers that leave the others' images as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet.data.config import DataConfig

OPERATIONS = (  # of TrivialAugment, arXiv:2103.10158
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
# Its "wide" ranges, but for the translation: 32 pixels would move a small image out of sight.
SHEAR, ROTATION, TRANSLATION = (
    0.99,
    math.radians(135),
    10 / 32,
)  # the translation as a part of the side
BLEND = 0.99  # how far the factor of a blend goes from 1
DROPPED = 6  # low bits, of 8

_NONE = torch.empty(0)


class Moves(NamedTuple):
    """What is done to images: entry *p* of each tensor to image *p*; those that the settings do not ask for are empty.

    A centre is a row and a column, as parts of the side from 0 to below 1.
    """

    offsets: Tensor  # (N, 2) int64: row and column of the crop, each from 0 to 2 * shift
    flips: Tensor  # (N,) bool
    operations: Tensor = _NONE  # (N,) int64: places in OPERATIONS
    strengths: Tensor = (
        _NONE  # (N,) float32: how far the operation goes, from -1 to 1; 0: not at all
    )
    holes: Tensor = _NONE  # (N, 2) float32: centre of what is greyed out
    shares: Tensor = _NONE  # (N,) float32: of the image itself, the rest being its partner's
    cuts: Tensor = _NONE  # (N,) bool: the partner's share is a square of it, not a faint whole
    boxes: Tensor = _NONE  # (N, 2) float32: centre of that square


def augment(batch: Tensor, moves: Moves, config: DataConfig, fill: Tensor) -> Tensor:
    """Images uint8 ``(N, C, H, W)`` with all done to them that *config* asks for, except mixing.

    What comes into sight from outside, and what is cut out, is *fill*, uint8 ``(C,)``: with the channel means, zeros
    once normalised.
    """
    batch = shift_and_mirror(batch, moves.offsets, moves.flips, config.shift, fill)
    if config.trivial_augment:
        batch = operate(batch, moves.operations, moves.strengths, fill)
    if config.cutout:
        batch = torch.where(_squares(batch, moves.holes, config.cutout), fill.view(-1, 1, 1), batch)
    return batch


def shift_and_mirror(
    batch: Tensor, offsets: Tensor, flips: Tensor, shift: int, fill: Tensor
) -> Tensor:
    """Pads images uint8 ``(N, C, H, W)`` by *shift* with *fill*, crops each at its offsets, mirrors the flipped."""
    n, channels, height, width = batch.shape
    padded = batch.new_zeros(n, channels, height + 2 * shift, width + 2 * shift)
    padded += fill.view(1, -1, 1, 1)
    padded[:, :, shift : shift + height, shift : shift + width] = batch
    columns = torch.arange(width, device=batch.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (N, W)
    rows = torch.arange(height, device=batch.device) + offsets[:, :1]  # (N, H)
    source = (
        rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    )  # (N, H, W), into the padded image
    source = source.view(n, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, source).view_as(batch)


def operate(batch: Tensor, operations: Tensor, strengths: Tensor, fill: Tensor) -> Tensor:
    """Does to each of the square images uint8 ``(N, C, S, S)`` its own of :data:`OPERATIONS`, int64 ``(N,)``.

    The strengths, float32 ``(N,)`` from -1 to 1, are parts of the ranges above; at 0 an operation that has a strength
    leaves the image as it is.
    """
    chosen = {name: (operations == number).view(-1, 1, 1) for number, name in enumerate(OPERATIONS)}
    amounts = {name: strengths.view(-1, 1, 1) * each for name, each in chosen.items()}
    blended = _blend(_move(batch, amounts, fill), amounts)
    pixels = blended.round().clamp(0, 255).long().flatten(2)
    return _levels(pixels, amounts, chosen).gather(2, pixels).to(torch.uint8).view_as(batch)


def _move(batch: Tensor, amounts: dict[str, Tensor], fill: Tensor) -> Tensor:
    """Where a pixel comes from is an affine function of where it goes, both from -1 to 1 along a side."""
    side, ground = batch.shape[-1], fill.view(-1, 1, 1).float()
    x = (2 * torch.arange(side, device=batch.device) + 1) / side - 1
    y = x[:, None]
    angles = amounts["rotate"] * ROTATION
    columns = angles.cos() * x + (amounts["shear_x"] * SHEAR - angles.sin()) * y
    rows = angles.cos() * y + (amounts["shear_y"] * SHEAR + angles.sin()) * x
    columns, rows = (
        columns + 2 * TRANSLATION * amounts["translate_x"],
        rows + 2 * TRANSLATION * amounts["translate_y"],
    )
    return (
        F.grid_sample(batch - ground, torch.stack((columns, rows), 3), align_corners=False) + ground
    )


def _blend(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """Images float ``(N, C, H, W)`` away from or towards black, their grey, their mean grey or themselves smoothed."""
    red, green, blue = images.expand(-1, 3, -1, -1).split(1, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    smooth = images.clone()  # at the edge, where a pixel lacks neighbours, it stays
    smooth[:, :, 1:-1, 1:-1] = ((9 * F.avg_pool2d(images, 3, 1, 1) + 4 * images) / 13)[
        :, :, 1:-1, 1:-1
    ]
    change = amounts["brightness"][:, None] * images
    change += amounts["colour"][:, None] * (images - grey)
    change += amounts["contrast"][:, None] * (images - grey.mean((2, 3), keepdim=True).round())
    change += amounts["sharpness"][:, None] * (images - smooth)
    return images + BLEND * change


def _levels(pixels: Tensor, amounts: dict[str, Tensor], chosen: dict[str, Tensor]) -> Tensor:
    """What the levels of pixels int64 ``(N, C, P)`` become: int64 ``(N, C, 256)``."""
    counts = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(
        2, pixels, torch.ones_like(pixels)
    )
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
    """Which pixels lie in a square about each image's centre, bool ``(N, 1, H, W)``; *side* of all or ``(N, 1)``."""
    inside = []
    for axis, size in enumerate(images.shape[2:]):
        first = (centres[:, axis : axis + 1] * size).long() - side // 2
        beyond = torch.arange(size, device=images.device) - first  # (N, size)
        inside.append((beyond >= 0) & (beyond < side))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]


def mix(images: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """Images float ``(N, C, S, S)``, each mixed with its partner in the reversed batch, and their own shares ``(N,)``.

    By mixup (arXiv:1710.09412), or where cut by CutMix (arXiv:1905.04899), whose share is that of the pixels kept.
    """
    sides = ((1 - moves.shares).sqrt() * images.shape[-1]).long()
    kept = ~_squares(images, moves.boxes, sides[:, None])
    weights = torch.where(moves.cuts.view(-1, 1, 1, 1), kept, moves.shares.view(-1, 1, 1, 1))
    shares = torch.where(moves.cuts, kept.float().mean((1, 2, 3)), moves.shares)
    return torch.lerp(images.flip(0), images, weights), shares
