"""Augmentation does what it says, held to Pillow and to the same by hand, image by image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sparsenet.data.augment import (
    BLEND,
    DROPPED,
    OPERATIONS,
    ROTATION,
    SHEAR,
    TRANSLATION,
    Moves,
    augment,
    mix,
    operate,
    shift_and_mirror,
)
from sparsenet.data.config import DataConfig
from sparsenet.data.errors import DataError
from sparsenet.data.sampling import plan_epoch, stream

EVERYTHING = DataConfig(shift=2, trivial_augment=True, cutout=5, mixup=0.4, cutmix=1.0)
CROPPED = replace(EVERYTHING, crop=0.08, image_size=6)
FILL = torch.tensor([70, 80, 90], dtype=torch.uint8)
channels = pytest.mark.parametrize("channels", [1, 3])


def noise(
    count: int, channels: int = 3, side: int = 8, seed: int = 0, low: int = 0, high: int = 256
) -> Tensor:
    return torch.randint(
        low, high, (count, channels, side, side), dtype=torch.uint8, generator=stream(seed)
    )


def done(name: str, batch: Tensor, strength: float, fill: Tensor = FILL) -> Tensor:
    """One operation on all images."""
    numbers = torch.full((len(batch),), OPERATIONS.index(name))
    return operate(batch, numbers, torch.full((len(batch),), strength), fill[: batch.shape[1]])


@channels
@pytest.mark.parametrize("config", [EVERYTHING, CROPPED])
def test_a_device_that_takes_all_images_through_all_operations_gives_the_same(
    config: DataConfig, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, moves = noise(200, channels), plan_epoch(0, 0, 200, config).moves
    assert len(moves.operations.unique()) == len(OPERATIONS)
    found = augment(batch, moves, config, FILL[:channels])

    def all_at_once(operations: Any, change: Any, images: Tensor, drawn: Any) -> Any:
        return change(images, drawn)

    monkeypatch.setattr("sparsenet.data.augment._each", all_at_once)
    assert torch.equal(augment(batch, moves, config, FILL[:channels]), found)


def moves_of(count: int, **parts: Tensor) -> Moves:
    still = {"offsets": torch.zeros(count, 2, dtype=torch.int64), "flips": torch.zeros(count) > 0}
    return Moves(**still | parts)


@settings(max_examples=60)
@given(
    count=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    shift=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_shift_and_mirror_equals_pad_crop_mirror_image_by_image(
    count: int, channels: int, height: int, width: int, shift: int, seed: int
) -> None:
    batch = torch.randint(
        256, (count, channels, height, width), dtype=torch.uint8, generator=stream(seed)
    )
    config = DataConfig(shift=shift)
    moves, fill = plan_epoch(seed, 0, count, config).moves, FILL[:channels]
    augmented = augment(batch, moves, config, fill)
    for image, (row, column), flip, result in zip(
        batch, moves.offsets.tolist(), moves.flips, augmented, strict=True
    ):
        padded = fill.view(-1, 1, 1).repeat(1, height + 2 * shift, width + 2 * shift)
        padded[:, shift : shift + height, shift : shift + width] = image
        crop = padded[:, row : row + height, column : column + width]
        assert torch.equal(result, crop.flip(-1) if flip else crop)
    assert augmented.shape == batch.shape and augmented.dtype == torch.uint8


def test_centre_offset_without_flip_is_the_identity() -> None:
    pixels = noise(4)
    assert torch.equal(
        shift_and_mirror(pixels, torch.full((4, 2), 3), torch.zeros(4, dtype=torch.bool), 3, FILL),
        pixels,
    )


@channels
@pytest.mark.parametrize("config", [EVERYTHING, CROPPED], ids=["shifted", "cropped"])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_an_image_becomes_the_same_whatever_its_batch(
    channels: int, config: DataConfig, size: int
) -> None:
    batch, moves, fill = noise(40, channels), plan_epoch(0, 0, 40, config).moves, FILL[:channels]
    whole = augment(batch, moves, config, fill)
    for first in range(0, 40, size):
        part = slice(first, first + size)
        augmented = augment(batch[part], Moves(*(each[part] for each in moves)), config, fill)
        assert torch.equal(augmented, whole[part])


@channels
@pytest.mark.parametrize("side", [1, 2, 7, 320])
@pytest.mark.parametrize("operation", [None, "identity"])
def test_the_crop_of_a_whole_image_is_the_image(
    channels: int, side: int, operation: str | None
) -> None:
    batch, flips = noise(2, channels, side), torch.tensor([False, True])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    moves = moves_of(2, flips=flips, crops=whole)
    if operation:
        none = torch.full((2,), OPERATIONS.index(operation))
        moves = moves._replace(operations=none, strengths=torch.ones(2))
    config = DataConfig(crop=1.0, trivial_augment=bool(operation))
    kept, mirrored = augment(batch, moves, config, FILL[:channels])
    assert torch.equal(kept, batch[0]) and torch.equal(mirrored, batch[1].flip(-1))


def looked_up(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """*image* ``(C, S, S)`` between the nearest of its pixels at *places* ``(2, H, W)``, in fp64.

    A place is a row and a column, from 0 at one edge of the image to 1 at the other.
    """
    last = image.shape[1] - 1
    spots = (places * image.shape[1] - 0.5).clip(0, last)
    before = np.floor(spots).astype(int)
    (top, left), (down, right) = before, spots - before
    bottom, beside = np.minimum(before + 1, last)
    upper = image[:, top, left] * (1 - right) + image[:, top, beside] * right
    lower = image[:, bottom, left] * (1 - right) + image[:, bottom, beside] * right
    found: np.ndarray = upper * (1 - down) + lower * down
    return found


# Rounding to a level, and places in fp32: some roundings of 2**-24 of a side of 17 pixels.
TOLERANCE = 0.5 + 255 * 17 * 8 * 2**-24


@pytest.mark.parametrize("side", [5, 12, 17, 40])
def test_a_crop_is_cut_out_and_resized_image_by_image(side: int) -> None:
    batch, config = noise(60, side=17), DataConfig(crop=0.08, image_size=side)
    moves = plan_epoch(0, 0, 60, config).moves
    augmented = augment(batch, moves, config, FILL)
    assert augmented.shape == (60, 3, side, side) and augmented.dtype == torch.uint8
    along = (np.arange(side) + 0.5) / side
    for image, result, flip, crop in zip(
        batch, augmented, moves.flips, moves.crops.tolist(), strict=True
    ):
        top, left, height, width = crop
        places = np.stack(np.meshgrid(top + height * along, left + width * along, indexing="ij"))
        expected = looked_up(image.double().numpy(), places)
        cut = result.flip(-1) if flip else result
        assert np.abs(cut.numpy() - expected).max() <= TOLERANCE
        if 17 * max(height, width) <= side:  # Pillow antialiases what becomes smaller
            box = [17 * edge for edge in (left, top, min(left + width, 1), min(top + height, 1))]
            resized = pillow(image).resize((side, side), Image.Resampling.BILINEAR, tuple(box))
            assert difference(cut, resized) <= 1  # theirs rounds twice


def test_at_half_the_size_no_pixel_is_missed() -> None:
    """The smallest that images are made, as --stored_size is at most twice --image_size."""
    batch, crops = noise(4, side=24), torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)
    halved = augment(batch, moves_of(4, crops=crops), DataConfig(crop=1.0, image_size=12), FILL)
    assert (halved - F.avg_pool2d(batch.double(), 2)).abs().max() <= 0.5


GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def test_an_operation_on_a_crop_looks_an_image_up_once() -> None:
    config = DataConfig(crop=0.2, trivial_augment=True, image_size=12)
    batch, drawn = noise(60, side=17), plan_epoch(0, 0, 60, config).moves
    names = [GEOMETRIC[number % 5] for number in range(60)]
    numbers = torch.tensor([OPERATIONS.index(name) for name in names])
    moves = drawn._replace(operations=numbers)
    augmented = augment(batch, moves, config, FILL)
    along = (2 * np.arange(12) + 1) / 12 - 1
    filled = 0
    columns = batch, augmented, names, moves.strengths.tolist(), moves.flips, moves.crops.tolist()
    for image, result, name, strength, flip, crop in zip(*columns, strict=True):
        y, x = np.meshgrid(along, along, indexing="ij")
        angle = ROTATION * strength * (name == "rotate")
        down, right = (SHEAR * strength * (name == f"shear_{axis}") for axis in "yx")
        matrix = np.array(
            [[np.cos(angle), np.sin(angle) + down], [-np.sin(angle) + right, np.cos(angle)]]
        )
        y, x = np.tensordot(matrix, np.stack([y, x]), 1)
        y = y + 2 * TRANSLATION * strength * (name == "translate_y")
        x = x + 2 * TRANSLATION * strength * (name == "translate_x")
        top, left, height, width = crop
        x = -x if flip else x
        places = np.stack([top + height * (y + 1) / 2, left + width * (x + 1) / 2])
        outside = ((places < 0) | (places > 1)).any(0)
        expected = looked_up(image.double().numpy(), places)
        expected = np.where(outside, FILL.view(-1, 1, 1).numpy(), expected)
        assert np.abs(result.numpy() - expected).max() <= TOLERANCE
        filled += int(outside.sum())
    assert filled > 100


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_cutout_greys_its_square_and_nothing_else(side: int, cutout: int, seed: int) -> None:
    batch, centres = (
        noise(3, side=side, seed=seed),
        torch.rand(3, 2, generator=stream(seed, "centres")),
    )
    augmented = augment(batch, moves_of(3, holes=centres), DataConfig(shift=0, cutout=cutout), FILL)
    for image, centre, result in zip(
        batch, (centres * side).int().tolist(), augmented, strict=True
    ):
        (top, bottom), (left, right) = (
            (max(c - cutout // 2, 0), c - cutout // 2 + cutout) for c in centre
        )
        image[:, top:bottom, left:right] = FILL.view(-1, 1, 1)
        assert torch.equal(result, image)


@channels
@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")]
)
@pytest.mark.parametrize("side", [1, 2, 7, 32])
def test_an_operation_without_strength_is_the_identity(name: str, channels: int, side: int) -> None:
    batch = noise(4, channels, side)
    assert torch.equal(done(name, batch, 0.0), batch)


@channels
@pytest.mark.parametrize("turns", [-1, 1])
def test_a_right_angle_is_rot90(channels: int, turns: int) -> None:
    batch = noise(4, channels, 9)
    right_angle = torch.pi / 2 / ROTATION
    assert torch.equal(done("rotate", batch, turns * right_angle), batch.rot90(turns, (2, 3)))


@pytest.mark.parametrize("pixels", [-3, 1, 2])
def test_a_translation_by_whole_pixels_is_a_shift(pixels: int) -> None:
    batch, strength = noise(4, side=16), pixels / (TRANSLATION * 16)
    offsets, still = torch.tensor([[3, 3 + pixels]]).expand(4, 2), torch.zeros(4, dtype=torch.bool)
    assert torch.equal(
        done("translate_x", batch, strength), shift_and_mirror(batch, offsets, still, 3, FILL)
    )
    assert torch.equal(
        done("translate_y", batch, strength),
        shift_and_mirror(batch, offsets.flip(1), still, 3, FILL),
    )


def test_a_shear_shifts_rows_by_their_distance_from_the_middle() -> None:
    batch, strength = noise(4, side=5), 0.5 / SHEAR
    augmented, ground = done("shear_x", batch, strength), FILL.view(-1, 1, 1).expand(4, -1, 5, 1)
    assert torch.equal(augmented[:, :, 2], batch[:, :, 2])
    assert torch.equal(augmented[:, :, 4], torch.cat((batch[:, :, 4, 1:], ground[:, :, 4]), 2))
    assert torch.equal(augmented[:, :, 0], torch.cat((ground[:, :, 0], batch[:, :, 0, :-1]), 2))
    assert torch.equal(done("shear_y", batch.transpose(2, 3), strength), augmented.transpose(2, 3))


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def difference(augmented: Tensor, expected: Image.Image) -> int:
    """Largest, in grey levels."""
    pixels = (
        torch.from_numpy(np.asarray(expected).astype(int))
        .view(*augmented.shape[1:], -1)
        .permute(2, 0, 1)
    )
    return int((augmented - pixels).abs().max())


images = st.builds(
    lambda seed, channels, low, span: noise(1, channels, 9, seed, low, low + span),
    *(st.integers(0, 999), st.sampled_from([1, 3]), st.integers(0, 200), st.integers(1, 56)),
) | st.builds(
    lambda seed, channels: noise(1, channels, 24, seed),
    st.integers(0, 999),
    st.sampled_from([1, 3]),
)


@settings(max_examples=40)
@given(images, st.integers(2, 8), st.integers(0, 256), st.sampled_from([-1, 1]))
def test_levels_are_those_of_pillow(batch: Tensor, bits: int, threshold: int, sign: int) -> None:
    image = pillow(batch[0])
    assert difference(done("autocontrast", batch, 0.5)[0], ImageOps.autocontrast(image)) <= 1
    assert difference(done("equalize", batch, 0.5)[0], ImageOps.equalize(image)) == 0
    assert (
        difference(
            done("posterize", batch, sign * (8 - bits) / DROPPED)[0],
            ImageOps.posterize(image, bits),
        )
        == 0
    )
    solarized = done("solarize", batch, sign * (1 - threshold / 256))
    assert difference(solarized[0], ImageOps.solarize(image, threshold)) == 0


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


@settings(max_examples=40)
@given(images, st.sampled_from(sorted(ENHANCERS)), st.floats(-1, 1))
def test_blends_are_those_of_pillow(batch: Tensor, name: str, strength: float) -> None:
    expected = ENHANCERS[name](pillow(batch[0])).enhance(1 + BLEND * strength)
    assert (
        difference(done(name, batch, strength)[0], expected) <= 2
    )  # theirs rounds twice, and downwards


@given(st.integers(1, 7), st.floats(0, 1), st.integers(0, 999))
def test_mixup_blends_by_the_shares(count: int, share: float, seed: int) -> None:
    images, shares = torch.rand(count, 3, 4, 4, generator=stream(seed)), torch.full((count,), share)
    moves = moves_of(count, shares=shares, cuts=shares > 2, boxes=torch.zeros(count, 2))
    mixed, own_shares = mix(images, moves)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    assert torch.equal(own_shares, shares)
    assert share < 1 or torch.equal(mixed, images)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 999))
def test_the_share_of_cutmix_is_the_part_of_the_pixels_kept(
    count: int, side: int, seed: int
) -> None:
    images = torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(-1, 3, side, side)
    shares, boxes = (
        torch.rand(count, generator=stream(seed)),
        torch.rand(count, 2, generator=stream(seed, "boxes")),
    )
    mixed, own_shares = mix(images, moves_of(count, shares=shares, cuts=shares < 2, boxes=boxes))
    kept, partner = mixed == images, mixed == images.flip(0)
    assert (kept | partner).all()
    for number, (share, box) in enumerate(
        zip(shares.tolist(), (boxes * side).int().tolist(), strict=True)
    ):
        width = int((1 - share) ** 0.5 * side)
        (top, bottom), (left, right) = (
            (max(c - width // 2, 0), c - width // 2 + width) for c in box
        )
        pasted = torch.zeros(side, side, dtype=torch.bool)
        pasted[top:bottom, left:right] = True
        if 2 * number + 1 != count:  # the middle one is its own partner
            assert torch.equal(kept[number], ~pasted.expand(3, -1, -1))
        assert own_shares[number].item() == pytest.approx(1 - pasted.double().mean().item())


@pytest.mark.parametrize(
    "options",
    [
        {"cutout": -1},
        {"mixup": -0.1},
        {"cutmix": float("nan")},
        {"first_size": -4},
        {"first_size": 6},
        {"crop": -0.1},
        {"crop": 1.5},
        {"stored_size": 64},
    ],
)
def test_a_wrong_option_names_its_flag(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"^--{next(iter(options))}: expected .*, found "):
        DataConfig(**options)
