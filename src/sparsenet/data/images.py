"""From any image file to uint8 pixels, in one way for training and predicting."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsenet.data.dataset import Example, Images, Split
from sparsenet.data.errors import DAMAGE, BadImage, decoding
from sparsenet.data.tree import SUFFIXES as SUFFIXES
from sparsenet.extras import require

T = TypeVar("T")

# None of them is one for which Pillow runs another program, as it does for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
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


class Decoded(NamedTuple):
    """The images of a split. Equal *ids*, int64 ``(N,)``, are images of the same bytes.

    *skipped* are the names of those left out.
    """

    images: Images
    ids: Tensor
    skipped: tuple[str, ...] = ()


def read_images(split: Split, size: int, channels: int, skip_corrupt: bool = False) -> Decoded:
    """A split's images as ``read_image`` reads them.

    They are read by several threads but stay in the split's order. Raises ``BadImage`` for
    the first corrupt one unless *skip_corrupt*.
    """
    return drained(reading_images(split, size, channels, skip_corrupt))


def reading_images(
    split: Split, size: int, channels: int, skip_corrupt: bool = False
) -> Generator[int, None, Decoded]:
    """Does what ``read_images`` does, and yields how many images it has read so far."""
    if isinstance(split, Images) and split.pixels.shape[1:] == (channels, size, size):
        ids = [_image_id(image) for image in split.pixels.numpy()]
        return Decoded(split, torch.tensor(ids, dtype=torch.int64))
    pixels = np.empty((len(split), channels, size, size), np.uint8)
    labels: list[int] = []
    ids = []
    skipped: list[str] = []
    with _bombs_are_errors(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for example, image in _read_all(pool, split, size, channels):
            if isinstance(image, BadImage):
                if not skip_corrupt:
                    raise BadImage(f"{image}; --skip_corrupt leaves such images out")
                skipped.append(example.name)
            else:
                pixels[len(labels)], number = image
                labels.append(example.label)
                ids.append(number)
            yield len(labels) + len(skipped)
    images = Images(torch.from_numpy(pixels[: len(labels)]), torch.tensor(labels).long())
    return Decoded(images, torch.tensor(ids, dtype=torch.int64), tuple(skipped))


def drained(work: Generator[Any, None, T]) -> T:
    """What a generator returns once all that it yields was taken."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def _image_id(content: bytes | np.ndarray) -> int:
    """64 bits that are a function of an image's bytes."""
    data = content.tobytes() if isinstance(content, np.ndarray) else content
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _content(example: Example) -> bytes | np.ndarray:
    """The bytes of an example, or its array."""
    if not isinstance(example.source, Path):
        return example.source
    with decoding(example.name, "an image", error=BadImage):
        return example.source.read_bytes()


def _read_all(
    pool: ThreadPoolExecutor, split: Split, size: int, channels: int
) -> Iterator[tuple[Example, tuple[np.ndarray, int] | BadImage]]:
    def read(example: Example) -> tuple[np.ndarray, int] | BadImage:
        try:
            content = _content(example)
            pixels = _read(example._replace(source=content), size, channels)
            return pixels, _image_id(content)
        except BadImage as error:
            return error

    def read_part(part: list[Example]) -> list[tuple[np.ndarray, int] | BadImage]:
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
