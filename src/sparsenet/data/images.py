"""From any image file to the uint8 pixels a model was trained on: one path for training and predicting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsenet.data.dataset import Example, Images, Split
from sparsenet.data.errors import DAMAGE, BadImage, decoding
from sparsenet.extras import require

FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # none for which Pillow runs a program (EPS)
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the model sees it; *mean* and *std* are those of ``pixels / 255``."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # a JSON file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def normalise(self, batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 ``(N, C, H, W)`` to ``(pixels / 255 - mean) / std`` in *dtype*, on the batch's device."""
        exact = torch.promote_types(dtype, torch.float32)
        scale, offset = _affine(self.mean, self.std, exact, batch.device)
        return torch.addcmul(offset, batch.to(exact), scale).to(dtype)


@cache  # copied to an accelerator in every step, it would make every step wait; and captured steps keep its address
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    means, deviations = (
        torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std)
    )
    return (1 / (255 * deviations)).to(device, dtype), (-means / deviations).to(device, dtype)


def read_image(source: Path | bytes, size: int, channels: int, name: str = "") -> np.ndarray:
    """The pixels of an image file, or of a file's bytes: uint8 ``(channels, size, size)``; size 0: its own.

    The shorter side is resized to *size* and the longer cropped about its centre; an image of that size is
    kept to the byte. EXIF orientation is applied, transparency laid on white, a wider grey scaled to 8 bits.
    Raises :class:`BadImage`. It sets warning filters while it runs, so it is not for threads.
    """
    example = Example(name or (str(source) if isinstance(source, Path) else "image"), source, 0)
    with _bombs_are_errors():
        return _read(example, size, channels)


def read_images(
    split: Split, size: int, channels: int, skip_corrupt: bool = False
) -> tuple[Images, tuple[str, ...]]:
    """A split's images, read by several threads but in the split's order, and the names of those skipped."""
    if isinstance(split, Images) and split.pixels.shape[1:] == (channels, size, size):
        return split, ()
    pixels = np.empty((len(split), channels, size, size), np.uint8)
    labels: list[int] = []
    skipped: list[str] = []

    def read(part: list[Example]) -> list[tuple[Example, np.ndarray | BadImage]]:
        return [(example, _attempt(example, size, channels)) for example in part]

    with _bombs_are_errors(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for wave in _waves(split):
            for example, image in chain.from_iterable(pool.map(read, wave)):
                if isinstance(image, np.ndarray):
                    pixels[len(labels)] = image
                    labels.append(example.label)
                elif skip_corrupt:
                    skipped.append(example.name)
                else:
                    raise BadImage(f"{image}; --skip_corrupt leaves such images out")
    return Images(torch.from_numpy(pixels[: len(labels)]), torch.tensor(labels).long()), tuple(
        skipped
    )


def _waves(split: Split) -> Iterator[list[list[Example]]]:
    """32 parts at a time, which bounds what is read ahead; parts of 32, as a task costs more than a small image."""
    rest = iter(split)
    while wave := [part for _ in range(32) if (part := list(islice(rest, 32)))]:
        yield wave


def common_size(split: Split) -> int:
    """The images' own size where all have one square size of at most 224 pixels, else 64."""
    sizes: set[tuple[int, int]] = set()
    with _bombs_are_errors():
        for example in split:
            with (
                suppress(BadImage),
                _opened(example) as image,
            ):  # a bad one is reported when it is decoded
                sizes.add(image.size)
            if len(sizes) > 1:
                return 64
    width, height = sizes.pop() if sizes else (64, 64)
    return width if width == height <= 224 else 64


@contextmanager
def _bombs_are_errors() -> Iterator[None]:
    # Between its limit and twice that, Pillow only warns of a bomb; its other warnings concern metadata.
    # Filters belong to the process, so they are set once around all threads and never in one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", require("PIL.Image", "train").DecompressionBombWarning)
        yield


@contextmanager
def _opened(example: Example) -> Iterator[Any]:
    """The example as a Pillow image; what Pillow raises inside the block becomes a :class:`BadImage`."""
    pillow = require("PIL.Image", "train")
    name, source, _ = example
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    with decoding(name, "an image", *bombs, error=BadImage):
        if isinstance(source, np.ndarray):
            yield pillow.fromarray(source[0] if len(source) == 1 else source.transpose(1, 2, 0))
            return
        try:
            image = pillow.open(
                BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
            )
        except pillow.UnidentifiedImageError:
            raise BadImage(
                f"{name}: expected an image ({', '.join(FORMATS)}), found none"
            ) from None
        with image:
            yield image


def _attempt(example: Example, size: int, channels: int) -> np.ndarray | BadImage:
    try:
        return _read(example, size, channels)
    except BadImage as error:
        return error


def _read(example: Example, size: int, channels: int) -> np.ndarray:
    ops, bilinear = (
        require("PIL.ImageOps", "train"),
        require("PIL.Image", "train").Resampling.BILINEAR,
    )
    with _opened(example) as image:
        if size:
            image.draft(
                None, (2 * size, 2 * size)
            )  # lets a large JPEG decode at 1/2, 1/4 or 1/8 of its size
        image.load()
        with suppress(*DAMAGE):  # bad metadata spoil no image
            ops.exif_transpose(image, in_place=True)
        image = _as_channels(image, channels)
        if size:
            image = ops.fit(image, (size, size), bilinear)  # antialiased where it reduces
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _as_channels(image: Any, channels: int) -> Any:
    pillow = require("PIL.Image", "train")
    if image.mode[0] in "IF":
        image = pillow.fromarray(_eight_bits(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Any) -> np.ndarray:
    """A 16- or 32-bit or float grey on the smallest full scale that holds it; Pillow itself would clip it."""
    scales = {"I": (65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}.get(image.mode, (65535,))
    values = np.nan_to_num(np.asarray(image, np.float32))
    scale = next((scale for scale in scales if values.max() <= scale), scales[-1])
    return np.rint(values.clip(0, scale) * np.float32(255 / scale)).astype(np.uint8)
