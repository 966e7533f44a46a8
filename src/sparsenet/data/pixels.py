"""One image file to pixels: what ``preprocessing.RULE`` says, and what is refused."""

from __future__ import annotations

import copy
import re
import stat
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from sparsenet.data.dataset import Content, Example
from sparsenet.data.errors import DAMAGE, BadImage, decoding
from sparsenet.data.preprocessing import FULL_RANGE, Form
from sparsenet.extras import require

# None of them is one for which Pillow runs another program, as it does for EPS. A phone's JPEG of
# two pictures (MPO) is among them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BYTES = 2**30  # of a file
# Pillow joins the parts of EXIF data one by one, which takes minutes for a large file of nothing
# else. Files have one part, or one for each picture in them.
LARGE, EXIF_PART, MAX_EXIF_PARTS = 1 << 24, b"Exif\0\0", 100
JPEG_FACTOR = 8  # how many times as many pixels a JPEG may have, which can be decoded smaller
# What Pillow calls colours of 16 bits, of which it keeps the upper 8; the last is a PPM's.
# "BGR;16" is not one of them: it has 16 bits for all three.
DEEP_COLOURS = re.compile(r";16[BLN]\b|^\('RGB', 65535\)$")
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION = 258, 262, 284  # numbers of TIFF tags
SAMPLE_FORMAT, UNSIGNED, SIGNED = 339, 1, 2  # a TIFF tag, and two of its values
NOMINAL_SHARE = 1 / 16  # of its scale, below which a picture of 16 bits has the levels of fewer
LARGEST_LEVELS = (255, 1023, 4095, 16383, 65535)


class TooLarge(BadImage):
    """An image of more pixels than are decoded."""


class Greys(NamedTuple):
    """A grey image of more than 8 bits before it is known which levels are black and white."""

    name: str
    levels: np.ndarray  # float32 (H, W), of the final size
    lowest: float  # of the image as it was
    highest: float
    unusual: str  # what sort of levels they are where 16 bits do not hold them, else empty

    def pixels(self, grey_range: tuple[float, ...], channels: int) -> np.ndarray:
        """uint8 ``(channels, H, W)``, black at the low end of *grey_range*, white at the high."""
        low, high = grey_range
        levels = self.levels.clip(low, high) - np.float32(low)
        grey = np.rint(levels * np.float32(255 / (high - low))).astype(np.uint8)
        return np.broadcast_to(grey, (channels, *grey.shape))

    def exceeds(self, grey_range: tuple[float, ...]) -> bool:
        """Whether levels of the image are clipped."""
        return self.lowest < grey_range[0] or self.highest > grey_range[1]

    def check_fills_16_bits(self) -> None:
        """Raises ``BadImage`` where black and white cannot be those of 16 bits."""
        found = f"{self.unusual or 'deep greys'} from {self.lowest:g} to {self.highest:g}"
        if self.unusual or self.highest <= NOMINAL_SHARE * FULL_RANGE[1]:
            expected = "8-bit images as in training, or greys that fill 16 bits"
            raise BadImage(f"{self.name}: expected {expected}, found {found}; scale them")


def measured_range(images: Collection[Greys]) -> tuple[float, ...]:
    """0 and the largest level of 8, 10, 12, 14 or 16 bits, of the fewest that hold all *images*.

    ``BadImage`` where there are levels that 16 bits do not hold, whose scale nobody can guess.
    """
    highest = max(image.highest for image in images)
    if unusual := [image for image in images if image.unusual]:
        lowest = min(image.lowest for image in images)
        name, sort = unusual[0].name, unusual[0].unusual
        raise BadImage(
            f"{name}: expected --grey_range LOW,HIGH for {sort}, "
            f"found values from {lowest:g} to {highest:g}"
        )
    return 0.0, next(float(largest) for largest in LARGEST_LEVELS if highest <= largest)


def file_content(example: Example) -> Content:
    """The bytes of an example, or what else it is. Raises ``BadImage``, and waits for no pipe.

    Bytes, as Pillow maps some TIFF files into memory and then turns them wrongly.
    """
    if not isinstance(example.source, Path):
        return example.source
    with decoding(example.name, "an image", error=BadImage):
        _check_file(example.name, example.source)
        return example.source.read_bytes()


def _check_file(name: str, path: Path) -> int:
    """The size of a file that may be read."""
    try:
        status = path.stat()
    except FileNotFoundError:
        found = "a link that leads nowhere" if path.is_symlink() else "nothing of that name"
        raise BadImage(f"{name}: expected an image, found {found}") from None
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise BadImage(f"{name}: expected an image, found {found}")
    if status.st_size > MAX_BYTES:
        expected = f"a file of at most {MAX_BYTES / 2**30:.0f} GiB"
        raise BadImage(f"{name}: too large: expected {expected}, found {status.st_size:,} bytes")
    return status.st_size


class _Limits:
    """What the process had before ``limits_of_our_own``, and how many are within it."""

    def __init__(self) -> None:
        self.lock, self.holders, self.before = Lock(), 0, ExitStack()


_limits = _Limits()


@contextmanager
def limits_of_our_own() -> Iterator[None]:
    """Pillow without its limit of pixels, which ``decode`` has itself, and its warnings.

    Both belong to the process, so they are set around all threads, by the first that comes, and
    put back by the last that goes.
    """
    pillow = require("PIL.Image", "train")
    with _limits.lock:
        if not _limits.holders:
            limit = pillow.MAX_IMAGE_PIXELS
            _limits.before.enter_context(warnings.catch_warnings())
            _limits.before.callback(setattr, pillow, "MAX_IMAGE_PIXELS", limit)
            warnings.simplefilter("ignore")  # they concern metadata
            pillow.MAX_IMAGE_PIXELS = None
        _limits.holders += 1
    try:
        yield
    finally:
        with _limits.lock:
            _limits.holders -= 1
            if not _limits.holders:
                _limits.before.close()


def copied(image: Any, max_megapixels: float) -> Any:
    """An image of Pillow's as it is now, loaded, whatever is done to *image* from now on.

    One that cannot be loaded, or is too large, stays what it is: ``decode`` says what is wrong.
    """
    with limits_of_our_own(), suppress(*DAMAGE), _unmapped(image):
        _fit_limit(image, "", max_megapixels, 1)
        # What the file says of the levels, which a copy has not.
        names = [name for name in ("tile", "tag_v2") if hasattr(image, name)]
        said = {name: copy.copy(getattr(image, name)) for name in names}
        image = image.copy()
        vars(image).update(said)
    return image


@contextmanager
def _unmapped(image: Any) -> Iterator[None]:
    """Keeps Pillow from mapping the file of *image*: such an image is turned wrongly by its tag."""
    name = getattr(image, "filename", "")
    if name:
        image.filename = ""
    try:
        yield
    finally:
        if name:
            image.filename = name


@contextmanager
def opened(example: Example) -> Iterator[Any]:
    """The example as a Pillow image; what Pillow raises in the block becomes a BadImage."""
    pillow = require("PIL.Image", "train")
    name, source, _ = example
    with decoding(name, "an image", error=BadImage):
        if isinstance(source, np.ndarray):
            yield pillow.fromarray(source[0] if len(source) == 1 else source.transpose(1, 2, 0))
            return
        if isinstance(source, pillow.Image):
            yield source
            return
        if isinstance(source, Path) and _check_file(name, source) > LARGE:
            source = source.read_bytes()
        if isinstance(source, bytes) and len(source) > LARGE:
            parts = source.count(EXIF_PART)
            if parts > MAX_EXIF_PARTS:
                expected = f"at most {MAX_EXIF_PARTS} parts of EXIF data"
                raise BadImage(f"{name}: expected {expected}, found {parts:,}")
        file = BytesIO(source) if isinstance(source, bytes) else source
        try:
            image = pillow.open(file, formats=FORMATS)
        except pillow.UnidentifiedImageError:
            expected = f"an image ({', '.join(FORMATS)})"
            raise BadImage(f"{name}: expected {expected}, found none") from None
        with image:
            yield image


def decode(example: Example, form: Form, jpeg_factor: int = JPEG_FACTOR) -> np.ndarray | Greys:
    """The pixels in *form*, or the levels of a deep grey.

    A JPEG may have *jpeg_factor* times as many pixels as other images. Raises ``BadImage``, for
    too many pixels ``TooLarge``.
    """
    operations = require("PIL.ImageOps", "train")
    with opened(example) as image:
        is_callers = image is example.source  # and so stays as it is
        _fit_limit(image, example.name, form.max_megapixels, 1 if is_callers else jpeg_factor)
        transparent = _transparent_level(image, example.name)
        is_deep_grey = image.mode[0] in "IF"
        if not is_deep_grey:
            _check_colours(image, example.name)
        _check_signs(image, example.name)
        with _unmapped(image):
            image.load()
        if is_callers:
            tags = getattr(image, "tag_v2", {})
            image = image.copy()
            image.tag_v2 = tags  # which a copy has not, and which say what its levels mean
        image.info = image.info | transparent
        with suppress(*DAMAGE):  # damaged metadata must not spoil the image
            operations.exif_transpose(image, in_place=True)
        if is_deep_grey:
            greys = _greys(image, example.name, form.size)
            if form.grey_range == ():
                greys.check_fills_16_bits()
            return greys
        pixels = np.asarray(_resized(_as_channels(image, form.channels), form.size))
        pixels = pixels.reshape(*pixels.shape[:2], form.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _fit_limit(image: Any, name: str, max_megapixels: float, jpeg_factor: int) -> None:
    """Has a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, and refuses what is too large."""
    pixels, largest = image.width * image.height, max_megapixels * 1e6
    is_jpeg = jpeg_factor > 1 and image.format in ("JPEG", "MPO")
    allowed = largest * jpeg_factor if is_jpeg else largest
    if pixels > allowed:
        raise TooLarge(
            f"{name}: too large: {pixels / 1e6:,.1f} megapixels, "
            f"at most {allowed / 1e6:,g}{' of a JPEG' * is_jpeg}; --max_megapixels"
        )
    if pixels > largest:
        reduction = next(n for n in (2, 4, 8) if pixels / n**2 <= largest)
        image.draft(None, (image.width // reduction, image.height // reduction))


def _check_colours(image: Any, name: str) -> None:
    """Refuses colours of 16 bits of which Pillow would keep next to nothing, or the wrong bytes."""
    tiles, tags = getattr(image, "tile", ()), getattr(image, "tag_v2", {})
    if max(tags.get(BITS_PER_SAMPLE, (8,))) > 8 and tags.get(PLANAR_CONFIGURATION) == 2:
        raise BadImage(f"{name}: expected deep colours pixel by pixel, found them plane by plane")
    if not any(DEEP_COLOURS.search(str(arguments)) for _, _, _, arguments in tiles):
        return
    extrema = [image.getchannel(band).getextrema() for band in image.getbands() if band not in "Aa"]
    if max(high for _, high in extrema) < 256 * NOMINAL_SHARE:
        raise BadImage(
            f"{name}: expected colours that fill their 16 bits, found all in the lowest 1/16; "
            "scale them, or save them with 8 bits"
        )


def _check_signs(image: Any, name: str) -> None:
    """Refuses levels of a TIFF whose sign Pillow does not keep."""
    formats = getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, (UNSIGNED,))
    if SIGNED in formats and image.mode[0] not in "IF":
        raise BadImage(f"{name}: expected unsigned levels of 8 bits, found signed ones")
    if image.mode == "I" and UNSIGNED in formats and image.getextrema()[0] < 0:
        raise BadImage(f"{name}: expected levels below 2147483648, found larger ones")


def _transparent_level(image: Any, name: str) -> dict[str, int]:
    """The level of a PNG of few bits that is transparent, as its pixels have it: of 255.

    Refuses a transparent colour of 16 bits, of which Pillow's pixels keep too little to tell it.
    """
    level = image.info.get("transparency")
    tiles: Any = getattr(image, "tile", ())
    if image.format != "PNG" or level is None or len(tiles) != 1:
        return {}
    mode = str(tiles[0][3])
    if mode == "RGB;16B":
        raise BadImage(f"{name}: expected colours of 16 bits without transparency, found some")
    largest = {"1": 1, "L;2": 3, "L;4": 15}.get(mode)
    return {"transparency": level * 255 // largest} if largest else {}


def _as_channels(image: Any, channels: int) -> Any:
    pillow = require("PIL.Image", "train")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # which Pillow makes no grey of
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _resized(image: Any, size: int) -> Any:
    """The central square at *size*, antialiased where it is reduced; the whole image where 0."""
    bilinear = require("PIL.Image", "train").Resampling.BILINEAR
    operations = require("PIL.ImageOps", "train")
    return operations.fit(image, (size, size), bilinear) if size else image


def _greys(image: Any, name: str, size: int) -> Greys:
    """Refuses what cannot be told from another picture: inverted, transparent or unknown levels."""
    levels = np.asarray(image, np.float32)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # Pillow inverts 8 bits only
        raise BadImage(f"{name}: expected deep greys from black to white, found white to black")
    if (levels == image.info.get("transparency")).any():
        raise BadImage(f"{name}: expected deep greys without transparency, found some of it")
    if not np.isfinite(levels).all():
        count = np.count_nonzero(~np.isfinite(levels))
        raise BadImage(f"{name}: expected finite grey levels, found {count} NaN or infinite")
    lowest, highest = float(levels.min()), float(levels.max())
    unusual = "float greys" if image.mode[0] == "F" else ""
    if not unusual and not 0 <= lowest <= highest <= FULL_RANGE[1]:
        unusual = "greys that are negative or above 65535"
    resized = _resized(require("PIL.Image", "train").fromarray(levels), size)
    return Greys(name, np.asarray(resized), lowest, highest, unusual)
