"""Any image file becomes the pixels one expects, or one clear line."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsenet.data import images
from sparsenet.data.dataset import Example, Images
from sparsenet.data.errors import BadImage, DataError
from sparsenet.data.images import common_size, read_image, read_images
from sparsenet.data.pixels import limits_of_our_own
from sparsenet.data.preprocessing import Form, Preprocessing, channel_statistics
from sparsenet.events import drained
from sparsenet.extras import MissingExtra, require

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(
    image: Image.Image, kind: str = "PNG", channels: int = 3, size: int = 0, **options: object
) -> np.ndarray:
    return read_image(encoded(image, kind, **options), Form(size, channels))


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_are_read_to_the_byte(
    kind: str, options: dict[str, object], size: int
) -> None:
    assert np.array_equal(read(Image.fromarray(COLOUR), kind, size=size, **options), chw(COLOUR))
    grey = read(Image.fromarray(GREY), kind, size=size, channels=1, **options)
    assert np.array_equal(grey, chw(GREY))


def test_jpeg_is_near_and_gif_gives_its_first_frame() -> None:
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    assert np.abs(read(Image.fromarray(flat), "JPEG").astype(int) - chw(flat)).max() <= 3
    frames = [Image.new("P", (8, 8), index) for index in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(animated, Form(0, 3))[:, 0, 0] == (255, 0, 0)).all()


def test_grey_becomes_three_equal_channels_and_back() -> None:
    three = read(Image.fromarray(GREY), channels=3)
    assert all(np.array_equal(channel, GREY) for channel in three)
    assert np.array_equal(read(Image.fromarray(three.transpose(1, 2, 0)), channels=1), chw(GREY))


def test_one_bit_is_black_and_white() -> None:
    bits = GREY > 127
    assert np.array_equal(read(Image.fromarray(bits), channels=1), chw(np.where(bits, 255, 0)))


def test_transparency_is_laid_on_white() -> None:
    half = np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 51, np.uint8)])
    assert (read(Image.fromarray(half)) == 204).all()
    assert (read(Image.fromarray(half), "WEBP", channels=1, lossless=True) == 204).all()
    assert (read(Image.fromarray(half[:, :, 2:]), channels=1) == 204).all()  # grey with alpha
    palette = Image.fromarray(np.repeat([[0], [1]], 8, 1).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for decoded in (read(palette, transparency=0), read(palette, "GIF", transparency=0)):
        assert (decoded[:, 0, 0] == 255).all() and (decoded[:, 1, 0] == (40, 50, 60)).all()


def transparent_png(bits: int, kind: int, width: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one row, with a level or colour that is transparent."""
    head = png_chunk(b"IHDR", struct.pack(">II5B", width, 1, bits, kind, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"tRNS", transparent) + pixels


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_level_of_a_png_of_few_bits_is_laid_on_white(bits: int) -> None:
    count = 2**bits
    levels = "".join(f"{level:0{bits}b}" for level in range(count)).ljust(8, "0")
    row = int(levels, 2).to_bytes(len(levels) // 8, "big")
    for transparent in {0, 1, count - 2, count - 1}:
        data = transparent_png(bits, 0, count, row, struct.pack(">H", transparent))
        expected = [255 * level // (count - 1) for level in range(count)]
        expected[transparent] = 255
        for source in (data, Image.open(BytesIO(data))):
            assert read_image(source, Form(0, 1))[0, 0].tolist() == expected


def test_a_transparent_colour_of_sixteen_bits_is_refused() -> None:
    row = struct.pack(">6H", *3 * [0x1234], 0x8000, 0x9000, 0xA000)
    data = transparent_png(16, 2, 2, row, struct.pack(">3H", *3 * [0x1234]))
    with pytest.raises(BadImage, match="colours of 16 bits without transparency"):
        read_image(data, Form(0, 3))


def test_cmyk_is_the_colour_it_prints() -> None:
    cyan = read(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")
    assert (cyan[:, 0, 0] == (0, 255, 255)).all()
    red = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[:, 0, 0].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(kind: str, channels: int) -> None:
    wide = GREY.astype(np.uint16) * 257
    wide[0, 0], expected = 65535, GREY.copy()
    expected[0, 0] = 255
    pixels = read(Image.fromarray(wide), kind, channels=channels)
    assert pixels.shape[0] == channels and (pixels == expected).all()


@pytest.mark.parametrize(
    ("highest", "scale"),
    [
        *((0, 255), (255, 255), (256, 1023), (1023, 1023), (1024, 4095), (4095, 4095)),
        *((4096, 16383), (16384, 65535), (65535, 65535)),
    ],
)
def test_deep_greys_have_the_smallest_scale_that_holds_them(highest: int, scale: int) -> None:
    levels = np.linspace(0, highest, 64).round().astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        decoded = read_images([Example("x", encoded(Image.fromarray(levels), kind), 0)], Form(8, 1))
        assert decoded.grey_range == (0, scale) and decoded.clipped == 0
        expected = (levels / scale * 255).round()
        assert np.array_equal(decoded.images.pixels[0, 0].numpy(), expected)


def deep(*values: int, dtype: type = np.uint16) -> bytes:
    """A TIFF of 2 by 2 levels, the first of them repeated where there are fewer."""
    levels = np.full(4, values[0], dtype)
    levels[: len(values)] = values
    return encoded(Image.fromarray(levels.reshape(2, 2)), "TIFF")


def test_one_scale_serves_all_images_of_a_split_and_leaves_eight_bits_alone() -> None:
    eight = encoded(Image.fromarray(GREY), "PNG")
    sources = [deep(100), eight, deep(0, 3000), deep(4095)]
    split = [Example(str(i), source, i) for i, source in enumerate(sources)]
    decoded = read_images(split, Form(8, 1))
    assert decoded.grey_range == (0, 4095)
    assert decoded.images.pixels[:, 0, -1, -1].tolist() == [6, GREY[-1, -1], 0, 255]
    assert np.array_equal(decoded.images.pixels[1, 0].numpy(), GREY)
    assert decoded.images.labels.tolist() == [0, 1, 2, 3]
    assert read_images(split[1:2], Form(8, 1)).grey_range == ()  # says nothing of deep greys


def test_a_range_that_is_given_clips_and_counts() -> None:
    split = [Example("x", deep(*levels), 0) for levels in ((1000, 3000), (999, 2000), (3001, 2000))]
    decoded = read_images(split, Form(2, 1, (1000, 3000)))
    assert (decoded.grey_range, decoded.clipped) == ((1000, 3000), 2)
    assert decoded.images.pixels[:, 0, 0].tolist() == [[0, 255], [0, 128], [255, 128]]


def test_without_deep_training_images_sixteen_bits_are_whole_or_refused() -> None:
    assert read_image(deep(4112, 65535), Form(0, 1, ()))[0, 0].tolist() == [16, 255]
    for source, found in ((deep(4095), "deep greys from 4095 to 4095"), (FLOATS, "float greys")):
        with pytest.raises(BadImage, match=f"x: expected 8-bit images as in training.*{found}"):
            read_image(source, Form(0, 1, ()), "x")


FLOATS = deep(-1000, 500, 3000, 0, dtype=np.float32)


@pytest.mark.parametrize("skip_corrupt", [False, True])
@pytest.mark.parametrize(
    ("source", "sort"),
    [
        (FLOATS, "float greys, found values from -1000 to 4000"),
        (deep(-1, 7, dtype=np.int32), "negative .*, found values from -1 to 4000"),
        (deep(0, 65536, dtype=np.int32), "above 65535, found values from 0 to 65536"),
    ],
)
def test_a_scale_that_nobody_can_guess_must_be_stated(
    source: bytes, sort: str, skip_corrupt: bool
) -> None:
    split = [Example("first", deep(4000), 0), Example("odd", source, 0)]
    with pytest.raises(BadImage, match=rf"^odd: expected --grey_range LOW,HIGH for .*{sort}$"):
        read_images(split, Form(2, 1), skip_corrupt)


def test_floats_and_negative_levels_are_scaled_as_stated() -> None:
    for source in (FLOATS, deep(-1000, 500, 3000, 0, dtype=np.int32)):
        pixels = read_image(source, Form(0, 3, (-1000, 1000)))
        assert pixels.tolist() == [[[0, 191], [255, 128]]] * 3  # rounded half to even
    fraction = deep(0, dtype=np.float32)
    assert read_image(fraction, Form(0, 1, (-0.5, 0.5))).tolist() == [[[128, 128], [128, 128]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_levels_that_are_no_numbers_are_refused(value: float) -> None:
    levels = encoded(Image.fromarray(np.array([[value, 1], [0, 1]], np.float32)), "TIFF")
    with pytest.raises(BadImage, match="expected finite grey levels, found 1 NaN or infinite"):
        read_image(levels, Form(0, 1, (0, 1)))


def test_deep_greys_are_resized_before_they_are_rounded() -> None:
    levels = np.array([[0, 1], [1, 1]], np.uint16)  # 0.75 of 255 levels on a scale of one
    assert read_image(encoded(Image.fromarray(levels), "PNG"), Form(1, 1, (0, 1))) == 191


def test_deep_greys_that_are_inverted_or_transparent_are_refused() -> None:
    inverted = deep(1).replace(TAG.pack(262, 3, 1, 1), TAG.pack(262, 3, 1, 0))
    with pytest.raises(BadImage, match="found white to black"):
        read_image(inverted, Form(0, 1))
    grey = Image.fromarray(np.array([[5, 300]], np.uint16))
    assert read(grey, "PNG", channels=1, transparency=7).tolist() == [[[1, 75]]]
    with pytest.raises(BadImage, match="without transparency"):
        read(grey, "PNG", channels=1, transparency=300)


TAG = struct.Struct("<HHII")


def png16(levels: np.ndarray) -> bytes:
    """A PNG of 16-bit grey and alpha (2 channels), RGB or RGBA, which Pillow cannot write."""
    height, width, channels = levels.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff16(levels: np.ndarray, planar: bool = False) -> bytes:
    """An uncompressed TIFF of 16-bit RGB, pixel by pixel or plane by plane."""
    height, width, _ = levels.shape
    data = (levels.transpose(2, 0, 1) if planar else levels).astype("<u2").tobytes()
    strips = 3 if planar else 1
    start = 8 + 2 + 10 * 12 + 4  # where what does not fit into a tag lies, and then the levels
    at, length = start + 6 + 24, len(data) // strips
    offsets = struct.pack("<3I", *(at + i * length for i in range(3)))
    lengths = struct.pack("<3I", *[length] * 3)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, start), (259, 4, 1, 1)]
    tags += [(262, 4, 1, 2), (273, 4, strips, start + 6 if planar else at), (277, 4, 1, 3)]
    tags += [(278, 4, 1, height), (279, 4, strips, start + 18 if planar else length)]
    tags += [(284, 4, 1, 2 if planar else 1)]
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return (
        header
        + b"".join(TAG.pack(*tag) for tag in tags)
        + struct.pack("<I3H", 0, 16, 16, 16)
        + offsets
        + lengths
        + data
    )


def ppm16(levels: np.ndarray) -> bytes:
    height, width, _ = levels.shape
    return b"P6 %d %d 65535 " % (width, height) + levels.astype(">u2").tobytes()


@pytest.mark.parametrize("write", [png16, tiff16, ppm16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_sixteen_bits_are_right_or_refused(
    write: Callable[[np.ndarray], bytes], channels: int
) -> None:
    if channels != 3 and write is not png16:
        return
    colours = np.full((4, 4, channels), 65535, np.uint16)
    grey = np.arange(1, 17, dtype=np.uint16).reshape(4, 4) * 257
    colours[:, :, : channels - (channels != 3)] = grey[:, :, None]
    assert np.array_equal(read_image(write(colours), Form(0, 1))[0], grey // 257)
    colours[:, :, : channels - (channels != 3)] = grey[:, :, None] // 16  # 12 bits or fewer
    with pytest.raises(BadImage, match="fill their 16 bits, found all in the lowest 1/16"):
        read_image(write(colours), Form(0, 3))


def test_planes_of_sixteen_bits_are_refused() -> None:
    colours = np.full((4, 4, 3), (1 << 12, 1 << 15, 7), np.uint16)
    assert read_image(tiff16(colours), Form(0, 3))[:, 0, 0].tolist() == [16, 128, 0]
    with pytest.raises(BadImage, match="found them plane by plane"):
        read_image(tiff16(colours, planar=True), Form(0, 3))


def test_a_split_is_gone_through_once_though_its_scale_comes_last() -> None:
    class Once:
        asked = 0

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[Example]:
            self.asked += 1
            yield from (Example("x", deep(level), 0) for level in (7, 700))

    split = Once()
    assert read_images(split, Form(2, 1)).images.pixels[:, 0, 0, 0].tolist() == [2, 174]
    assert split.asked == 1


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "CMYK"])
def test_other_spaces_of_colour_become_the_colours_they_mean(mode: str) -> None:
    colour = (200, 40, 90)
    pixels = read(Image.new("RGB", (8, 8), colour).convert(mode), "TIFF")[:, 0, 0].astype(int)
    assert np.abs(pixels - colour).max() <= 2
    (grey,) = read(Image.new("RGB", (8, 8), colour).convert(mode), "TIFF", channels=1)[:, 0, 0]
    assert abs(int(grey) - Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = {1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1]}
    turned = COLOUR.transpose(1, 0, 2)
    stored |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    assert np.array_equal(read(image, exif=exif), chw(COLOUR))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_files_are_turned_too(tmp_path: Path, dtype: type) -> None:
    levels = np.arange(12, dtype=dtype).reshape(3, 4)
    Image.fromarray(levels).save(tmp_path / "x.tif", tiffinfo={0x0112: 6})  # 90° clockwise
    pixels = read_image(tmp_path / "x.tif", Form(0, 1, (0, 255)))
    assert np.array_equal(pixels[0], np.rot90(levels, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_spoil_no_image(kind: str) -> None:
    assert read(Image.fromarray(COLOUR), kind, exif=b"nonsense").shape == (3, 8, 8)


def test_shorter_side_is_resized_and_the_centre_cropped() -> None:
    bars = np.zeros((10, 40, 3), np.uint8)
    bars[:, 15:25] = 255  # the middle square of ten by ten
    assert (read(Image.fromarray(bars), size=10) == 255).all()
    assert (read(Image.fromarray(bars.transpose(1, 0, 2).copy()), size=10) == 255).all()
    assert (read(Image.fromarray(bars[:, 15:25].copy()), size=5) == 255).all()
    assert (read(Image.fromarray(bars[:, 15:25].copy()), size=23) == 255).all()
    strip = read(Image.new("L", (5000, 1), 7), size=64)
    assert strip.shape == (3, 64, 64) and (strip == 7).all()


def test_reducing_averages_instead_of_skipping() -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    inner = read(Image.fromarray(checks), size=8, channels=1)[0, 1:-1, 1:-1].astype(int)
    assert np.abs(inner - 127.5).max() < 5


@pytest.mark.parametrize("size", [8, 32])
def test_a_large_jpeg_is_decoded_whole(size: int) -> None:
    noise = RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG")
    whole = Image.open(BytesIO(content)).resize((size, size), BILINEAR, box=(50, 0, 350, 300))
    assert np.array_equal(read_image(content, Form(size, 3)), chw(np.asarray(whole)))


BILINEAR = Image.Resampling.BILINEAR


def test_phones_jpegs_of_two_pictures_give_the_first_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first = Image.new("RGB", (32, 16), (200, 40, 90))
    first.paste((20, 200, 40), (0, 0, 16, 16))  # the left half, at the top once it is turned
    second = Image.new("RGB", (32, 16))
    content = encoded(first, "MPO", save_all=True, append_images=[second], exif=exif)
    assert Image.open(BytesIO(content)).format == "MPO"
    pixels = read_image(content, Form(0, 3)).astype(int)
    assert pixels.shape == (3, 32, 16)
    assert np.abs(pixels[:, 2, 8] - (20, 200, 40)).max() <= 4
    assert np.abs(pixels[:, -3, 8] - (200, 40, 90)).max() <= 4


def test_array_and_file_take_the_same_path() -> None:
    arrays = Images(torch.from_numpy(chw(COLOUR)[None].copy()), torch.tensor([3]))
    for size, channels in ((8, 1), (5, 3), (13, 1)):
        images = read_images(arrays, Form(size, channels)).images
        assert np.array_equal(
            images.pixels[0].numpy(), read(Image.fromarray(COLOUR), size=size, channels=channels)
        )
        assert images.labels.tolist() == [3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_what_is_too_large_is_called_so_and_not_damaged(kind: str) -> None:
    content = encoded(Image.fromarray(COLOUR), kind)  # 64 pixels
    assert np.array_equal(read_image(content, Form(8, 3, max_megapixels=64e-6)), chw(COLOUR))
    with pytest.raises(BadImage, match=r"^huge: too large: .* megapixels, .*--max_megapixels") as e:
        read_image(content, Form(8, 3, max_megapixels=63e-6), "huge")
    assert "damaged" not in str(e.value)
    with pytest.raises(BadImage, match=r"too large: 64\.0 megapixels, at most 63; --max"):
        blank = encoded(Image.new("1", (8000, 8000)), "PNG")
        read_images([Example("x", blank, 0)], Form(8, 1, max_megapixels=63))


def test_a_jpeg_above_the_limit_is_decoded_at_the_first_size_below_it() -> None:
    photo = Image.new("RGB", (64, 128), (200, 40, 90))  # 8192 pixels
    two = encoded(photo, "MPO", save_all=True, append_images=[photo])
    for content in (encoded(photo, "JPEG"), two):
        for limit, shape in (
            (8192, (128, 64)),
            (8191, (64, 32)),
            (2048, (64, 32)),
            (2047, (32, 16)),
        ):
            pixels = read_image(content, Form(0, 3, max_megapixels=limit / 1e6))
            assert pixels.shape[1:] == shape
            assert np.abs(pixels[:, 5, 5].astype(int) - (200, 40, 90)).max() <= 4
        assert read_image(content, Form(0, 3, max_megapixels=1024e-6)).shape[1:] == (32, 16)
        with pytest.raises(BadImage, match=r"at most .* of a JPEG; --max_megapixels$"):
            read_image(content, Form(0, 3, max_megapixels=1023e-6))


@pytest.mark.parametrize("content", [b"?", encoded(Image.fromarray(COLOUR), "PNG")])
def test_pillows_own_limit_does_not_count_and_is_put_back(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with suppress(BadImage):
        assert np.array_equal(read_image(content, Form(8, 3)), chw(COLOUR))
    read_images([Example("x", content, 0)], Form(8, 3), skip_corrupt=True)
    assert drained(common_size([Example("x", content, 0)])) == (8 if len(content) > 1 else 128)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    names = ("pipe.png", "device.png", "dangling.png", "folder.png", "vast.png", "pipe_link.png")
    pipe, device, dangling, folder, vast, link = (tmp_path / name for name in names)
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    dangling.symlink_to(tmp_path / "gone.png")
    folder.mkdir()
    link.symlink_to(pipe)
    with vast.open("wb") as file:
        file.truncate(2**30 + 1)  # a hole, which takes no space
    expected = {pipe: "pipe or device", device: "pipe or device", dangling: "leads nowhere"}
    expected |= {
        folder: "found a folder",
        vast: "too large: expected .* 1 GiB",
        link: "pipe or device",
    }
    for path, found in expected.items():
        with pytest.raises(BadImage, match=rf"^{path}: .*{found}"):
            read_image(path, Form(8, 3))
    split = [Example(str(path), path, 0) for path in expected]
    assert drained(common_size(split)) == 128
    assert len(read_images(split, Form(8, 3), skip_corrupt=True).skipped) == 6


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "letter.jpg"
    path.write_text("Dear reader")
    for bad in (path, tmp_path / "absent.png", tmp_path):
        with pytest.raises(BadImage, match=bad.name) as caught:
            read_image(bad, Form(8, 3))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadImage, match="cell 7"):
        read_image(b"", Form(8, 3), "cell 7")
    with pytest.raises(
        BadImage
    ):  # a program in PostScript, which Pillow would hand to another program
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", Form(8, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_bad_images(kind: str) -> None:
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)), kind)
    for length in (1, len(whole) // 3, len(whole) // 2):
        with pytest.raises(BadImage):
            read_image(whole[:length], Form(32, 3))


def test_damaged_files_are_read_or_refused_but_nothing_else() -> None:
    chance = random.Random(0)
    image = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    files = [encoded(image, k) for k in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO")]
    grey = Image.fromarray(RNG.integers(0, 65536, (24, 24), dtype=np.uint16))
    files += [encoded(grey, kind) for kind in ("PNG", "TIFF", "PPM")]
    for whole in files:
        for _ in range(120):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                damaged[chance.randrange(min(len(damaged), 400))] = chance.randrange(256)
            with suppress(BadImage):
                assert read_image(bytes(damaged), Form(16, 3)).shape == (3, 16, 16)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png_with(kind: bytes, data: bytes) -> bytes:
    whole = encoded(Image.fromarray(GREY), "PNG")
    return whole[:33] + png_chunk(kind, data) + whole[33:]


def png_of(side: int) -> bytes:
    header = struct.pack(">II5B", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


def tiff_of(*entries: tuple[int, int, int, int]) -> bytes:
    tags = {256: (4, 1, 8), 257: (4, 1, 8), 258: (3, 1, 8), 262: (3, 1, 1), 273: (4, 1, 300),
            279: (4, 1, 64)}  # fmt: skip
    tags |= {tag: rest for tag, *rest in entries}  # type: ignore[misc]
    table = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(400)


PACKED = zlib.compress(bytes(1 << 27))
CLAIMS = {
    "PNG": png_of(2**31 - 1),
    "PNG's colours": png_with(b"iCCP", b"k\0\0" + PACKED),
    "PNG's text": png_with(b"zTXt", b"k\0\0" + PACKED),
    "PNG's other text": png_with(b"iTXt", b"k\0\1\0\0\0" + PACKED),
    "GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    "BMP": b"BM"
    + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
    "PGM": b"P5 2000000000 2000000000 255\n",
    "TIFF": tiff_of((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1)),
    "TIFF's strips": tiff_of((273, 4, 2**30, 8)),
    "WebP": b"RIFF\x1e\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xff" * 6,
    "JPEG": encoded(Image.fromarray(GREY), "JPEG").replace(b"\0\x08\0\x08", b"\xff" * 4),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_claims_of_a_header_take_no_memory(kind: str) -> None:
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"^x: ") as caught:
        read_image(CLAIMS[kind], Form(8, 3), "x")
    assert "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_pictures_and_tags_beside_the_first_take_no_memory() -> None:
    tracemalloc.start()
    contents = [
        tiff_of((700, 1, 2**32 - 1, 8)),
        tiff_of(*[(40000 + i, 7, 300, 8) for i in range(999)]),
    ]
    for content in contents:
        assert read_image(content, Form(0, 1)).shape == (1, 8, 8)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_file_of_nothing_but_metadata_is_not_joined_part_by_part(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(GREY), "JPEG")
    part = b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)
    path = tmp_path / "x.jpg"
    path.write_bytes(whole[:2] + part * 300 + whole[2:])
    for source in (path, path.read_bytes()):
        with pytest.raises(BadImage, match="at most 100 parts of EXIF data, found 300"):
            read_image(source, Form(8, 1))
    assert drained(common_size([Example("x", path, 0)])) == 128
    large = whole[:2] + b"\xff\xfe\xff\xff" + bytes(65533) + whole[2:] + bytes(1 << 24)
    assert np.array_equal(read_image(large, Form(8, 1)), read_image(whole, Form(8, 1)))


def test_what_is_read_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "READ_AHEAD", 5000)
    taken = 0

    class Split(list[Example]):
        def __iter__(self) -> Iterator[Example]:
            nonlocal taken
            for example in super().__iter__():
                taken += 1
                yield example

    content = encoded(Image.fromarray(GREY), "BMP")  # 1,142 bytes
    work = images.reading_images(Split([Example("x", content, 0)] * 100), Form(8, 1))
    assert next(work) == 1 and taken == 5
    assert len(drained(work).images) == 100


def corrupt_at(*places: int, count: int = 70) -> list[Example]:
    grey = [encoded(Image.new("L", (4, 4), i), "PNG") for i in range(count)]
    return [Example(f"no {i}", b"?" if i in places else data, i) for i, data in enumerate(grey)]


def test_corrupt_images_stop_or_are_skipped_and_named() -> None:
    with pytest.raises(BadImage, match=r"no 41: .*--skip_corrupt"):
        read_images(corrupt_at(41, 55), Form(4, 1))
    images, _, places, skipped, *_ = read_images(corrupt_at(0, 41), Form(4, 1), skip_corrupt=True)
    assert [line.partition(":")[0] for line in skipped] == ["no 0", "no 41"]
    assert all("expected an image" in line for line in skipped) and len(images) == 68
    assert torch.equal(places, images.labels)
    assert torch.equal(images.pixels[:, 0, 0, 0].long(), images.labels)


def test_result_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_threads(count: int) -> torch.Tensor:
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        return read_images(corrupt_at(3, count=1500), Form(4, 3), skip_corrupt=True)[0].pixels

    assert torch.equal(with_threads(1), with_threads(7))


def test_filters_of_warnings_are_left_as_they_were() -> None:
    before = warnings.filters[:]
    with pytest.raises(BadImage):
        read_images(corrupt_at(1), Form(4, 1))
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(32, 32)] * 3, 32),
        ([(32, 32), (31, 31)], 128),
        ([(32, 30)], 128),
        ([(224, 224)], 224),
        ([(225, 225)], 128),
        ([], 128),
    ],
)
def test_own_size_is_kept_where_all_agree(shapes: list[tuple[int, int]], size: int) -> None:
    examples = [Example("x", encoded(Image.new("L", shape), "PNG"), 0) for shape in shapes]
    assert drained(common_size([Example("bad", b"?", 0), *examples])) == size


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_channel_statistics_are_those_of_the_floats(count: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, 5, 4), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.zeros(count, dtype=torch.int64))
    values = pixels.double().div(255).transpose(0, 1).flatten(1)
    mean, std = map(torch.tensor, channel_statistics(images))
    torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std.double(), values.std(1, correction=0), rtol=1e-6, atol=1e-7)


def test_constant_channel_can_be_normalised() -> None:
    images = Images(
        torch.full((2, 1, 4, 4), 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    )
    mean, std = channel_statistics(images)
    assert std[0] > 0 and Preprocessing(4, 1, mean, std).normalise(images.pixels).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_normalise_is_the_textbook_formula(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    mean, std = (0.49, 0.48, 0.45), (0.2, 0.3, 0.25)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    normalised = Preprocessing(16, 3, mean, std).normalise(pixels, dtype)
    assert normalised.dtype == dtype
    # Values lie below 3: one rounding to dtype, and a few in fp32 before it.
    tolerance = 2 * torch.finfo(dtype).eps + (0 if dtype is torch.float64 else 4 * 2**-23)
    assert (normalised.double() - (pixels / 255.0 - m) / s).abs().max() <= 3 * tolerance + 1e-6 * (
        dtype is torch.float64
    )


def test_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtra, match=r"surely_absent.*pip install '\.\[train\]'"):
        require("surely_absent.part", "train")
    assert issubclass(BadImage, DataError) and issubclass(DataError, ValueError)


@pytest.mark.parametrize("kind", [np.int8, np.uint32])
def test_levels_whose_sign_is_lost_are_refused(kind: type) -> None:
    """Pillow takes signed bytes for unsigned ones, and large 32-bit levels for negative ones."""
    levels = np.array([[-30, 30]] * 2) if kind is np.int8 else np.array([[0, 2**32 - 9]] * 2)
    bits, sign = np.dtype(kind).itemsize * 8, 2 if kind is np.int8 else 1
    fields = {256: 2, 257: 2, 258: bits, 259: 1, 262: 1, 277: 1, 278: 2, 339: sign}
    data = levels.astype(kind).tobytes()
    offset = 8 + 2 + 12 * (len(fields) + 2) + 4
    fields |= {273: offset, 279: len(data)}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\x04\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in sorted(fields.items())
    )
    header = b"II*\0\x08\0\0\0" + len(fields).to_bytes(2, "little") + entries + bytes(4)
    with pytest.raises(BadImage, match=r"expected (unsigned levels of 8 bits|levels below)"):
        read_image(header + data, Form(0, 1, (0.0, 4e9)), "x.tif")


def test_limits_of_pillow_are_put_back_by_the_last_of_several_threads() -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    first, second = limits_of_our_own(), limits_of_our_own()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS is None  # the other still reads
    second.__exit__(None, None, None)
    assert limit == Image.MAX_IMAGE_PIXELS and warnings.filters == filters
