"""From any image file to uint8 pixels, in one way for training and predicting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsenet.data.dataset import Example, Images, Split
from sparsenet.data.errors import DAMAGE, BadImage, decoding
from sparsenet.extras import require

# None of them is one for which Pillow runs another program, as it does for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
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
# An image of mode I, F or another grey is scaled from the first of these that holds its values.
FULL_SCALES = {"I": (65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}


def read_image(source: Path | bytes, size: int, channels: int, name: str = "") -> np.ndarray:
    """The pixels of an image file, or of a file's bytes: uint8 ``(channels, size, size)``.

    The shorter side is resized to *size* and the longer cropped about its centre; an image of that
    size is kept to the byte, and any image where *size* is 0. EXIF orientation is applied,
    transparency laid on white, a wider grey scaled to 8 bits. Raises ``BadImage``. It sets
    warning filters while it runs, so it must not run in several threads at once.
    """
    example = Example(name or (str(source) if isinstance(source, Path) else "image"), source, 0)
    with _bombs_are_errors():
        return _read(example, size, channels)


def read_images(
    split: Split, size: int, channels: int, skip_corrupt: bool = False
) -> tuple[Images, tuple[str, ...]]:
    """A split's images as ``read_image`` reads them, and the names of those left out.

    They are read by several threads but stay in the split's order. Raises ``BadImage`` for
    the first corrupt one unless *skip_corrupt*.
    """
    if isinstance(split, Images) and split.pixels.shape[1:] == (channels, size, size):
        return split, ()
    pixels = np.empty((len(split), channels, size, size), np.uint8)
    labels: list[int] = []
    skipped: list[str] = []
    with _bombs_are_errors(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for example, image in _read_all(pool, split, size, channels):
            if isinstance(image, np.ndarray):
                pixels[len(labels)] = image
                labels.append(example.label)
            elif skip_corrupt:
                skipped.append(example.name)
            else:
                raise BadImage(f"{image}; --skip_corrupt leaves such images out")
    images = Images(torch.from_numpy(pixels[: len(labels)]), torch.tensor(labels).long())
    return images, tuple(skipped)


def _read_all(
    pool: ThreadPoolExecutor, split: Split, size: int, channels: int
) -> Iterator[tuple[Example, np.ndarray | BadImage]]:
    def read(example: Example) -> np.ndarray | BadImage:
        try:
            return _read(example, size, channels)
        except BadImage as error:
            return error

    def read_part(part: list[Example]) -> list[np.ndarray | BadImage]:
        return [read(example) for example in part]

    rest = iter(split)
    while wave := list(islice(rest, 1024)):  # bounds what is read ahead
        # A task costs more than a small image, so that each has 32 of them.
        parts = [wave[first : first + 32] for first in range(0, len(wave), 32)]
        yield from zip(wave, chain.from_iterable(pool.map(read_part, parts)), strict=True)


def common_size(split: Split) -> int:
    """The images' own size where all have one square size of at most 224 pixels, else 64."""
    sizes: set[tuple[int, int]] = set()
    with _bombs_are_errors():
        for example in split:
            # A corrupt image is reported when it is decoded.
            with suppress(BadImage), _opened(example) as image:
                sizes.add(image.size)
            if len(sizes) > 1:
                return 64
    width, height = sizes.pop() if sizes else (64, 64)
    return width if width == height <= 224 else 64


@contextmanager
def _bombs_are_errors() -> Iterator[None]:
    # Between its limit and twice that, Pillow only warns of a decompression bomb; its other
    # warnings concern metadata. Filters belong to the process, so they are set around all threads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", require("PIL.Image", "train").DecompressionBombWarning)
        yield


@contextmanager
def _opened(example: Example) -> Iterator[Any]:
    """The example as a Pillow image; what Pillow raises in the block becomes a BadImage."""
    pillow = require("PIL.Image", "train")
    name, source, _ = example
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    with decoding(name, "an image", *bombs, error=BadImage):
        if isinstance(source, np.ndarray):
            yield pillow.fromarray(source[0] if len(source) == 1 else source.transpose(1, 2, 0))
            return
        file = BytesIO(source) if isinstance(source, bytes) else source
        try:
            image = pillow.open(file, formats=FORMATS)
        except pillow.UnidentifiedImageError:
            expected = f"an image ({', '.join(FORMATS)})"
            raise BadImage(f"{name}: expected {expected}, found none") from None
        with image:
            yield image


def _read(example: Example, size: int, channels: int) -> np.ndarray:
    pillow, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    with _opened(example) as image:
        if size:  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
            image.draft(None, (2 * size, 2 * size))
        image.load()
        with suppress(*DAMAGE):  # damaged metadata must not spoil the image
            operations.exif_transpose(image, in_place=True)
        image = _as_channels(image, channels)
        if size:  # antialiased where it reduces
            image = operations.fit(image, (size, size), pillow.Resampling.BILINEAR)
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
    """The levels of a 16-bit, 32-bit or float grey image, scaled where Pillow would clip them."""
    scales = FULL_SCALES.get(image.mode, (65535,))
    values = np.nan_to_num(np.asarray(image, np.float32))
    scale = next((scale for scale in scales if values.max() <= scale), scales[-1])
    return np.rint(values.clip(0, scale) * np.float32(255 / scale)).astype(np.uint8)
