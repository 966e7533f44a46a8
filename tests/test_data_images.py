"""Any image file becomes the pixels one expects, or one clear line."""

from __future__ import annotations

import random
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsenet.data.dataset import Example, Images
from sparsenet.data.errors import BadImage, DataError
from sparsenet.data.images import common_size, read_image, read_images
from sparsenet.data.preprocessing import Preprocessing, channel_statistics
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
    return read_image(encoded(image, kind, **options), size, channels)


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
    assert (read_image(animated, 0, 3)[:, 0, 0] == (255, 0, 0)).all()


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


def test_cmyk_is_the_colour_it_prints() -> None:
    cyan = read(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")
    assert (cyan[:, 0, 0] == (0, 255, 255)).all()
    red = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[:, 0, 0].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(dtype: type) -> None:
    wide = GREY.astype(dtype) * 257
    wide[0, 0], expected = 65535, GREY.copy()
    expected[0, 0] = 255
    assert np.array_equal(read(Image.fromarray(wide), "TIFF", channels=1), chw(expected))
    if dtype is np.uint16:
        assert np.array_equal(read(Image.fromarray(wide), "PNG", channels=3)[2], expected)


def test_floats_are_scaled_from_the_smallest_scale_that_holds_them() -> None:
    for scale in (1, 255, 65535):
        values = (GREY / np.float32(255) * scale).astype(np.float32)
        values[0, 0], expected = scale, GREY.copy()
        expected[0, 0] = 255
        assert np.array_equal(read(Image.fromarray(values), "TIFF", channels=1), chw(expected))
    odd = np.array([[np.nan, -1], [0, 1]], np.float32)
    assert read(Image.fromarray(odd), "TIFF", channels=1).tolist() == [[[0, 0], [0, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = {1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1]}
    turned = COLOUR.transpose(1, 0, 2)
    stored |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    assert np.array_equal(read(image, exif=exif), chw(COLOUR))


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


def test_large_jpeg_decoded_small_stays_near_the_whole_one() -> None:
    slope = np.linspace(0, 255, 512).astype(np.uint8)
    photo = Image.fromarray(
        np.dstack(
            [np.tile(slope, (512, 1)), np.tile(slope, (512, 1)).T, np.full((512, 512), 99)]
        ).astype(np.uint8)
    )
    from_jpeg, from_png = (read(photo, kind, size=32).astype(int) for kind in ("JPEG", "PNG"))
    assert np.abs(from_jpeg - from_png).max() <= 4
    noise = Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(read(noise, "JPEG", size=32), read(noise, "JPEG", size=0))


def test_array_and_file_take_the_same_path() -> None:
    arrays = Images(torch.from_numpy(chw(COLOUR)[None].copy()), torch.tensor([3]))
    for size, channels in ((8, 1), (5, 3), (13, 1)):
        images = read_images(arrays, size, channels).images
        assert np.array_equal(
            images.pixels[0].numpy(), read(Image.fromarray(COLOUR), size=size, channels=channels)
        )
        assert images.labels.tolist() == [3]


@pytest.mark.parametrize("excess", [1.5, 3])
def test_decompression_bomb_is_refused(excess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(64 / excess))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the caller's filters are
        with pytest.raises(BadImage, match=r"^huge\.png: .*bomb"):
            read_image(encoded(Image.fromarray(COLOUR), "PNG"), 8, 3, "huge.png")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "letter.jpg"
    path.write_text("Dear reader")
    for bad in (path, tmp_path / "absent.png", tmp_path):
        with pytest.raises(BadImage, match=bad.name) as caught:
            read_image(bad, 8, 3)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadImage, match="cell 7"):
        read_image(b"", 8, 3, "cell 7")
    with pytest.raises(
        BadImage
    ):  # a program in PostScript, which Pillow would hand to another program
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", 8, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_bad_images(kind: str) -> None:
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)), kind)
    for length in (1, len(whole) // 3, len(whole) // 2):
        with pytest.raises(BadImage):
            read_image(whole[:length], 32, 3)


def test_damaged_files_are_read_or_refused_but_nothing_else() -> None:
    chance = random.Random(0)
    image = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        whole = encoded(image, kind)
        for _ in range(120):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                damaged[chance.randrange(min(len(damaged), 400))] = chance.randrange(256)
            with suppress(BadImage):
                assert read_image(bytes(damaged), 16, 3).shape == (3, 16, 16)


def corrupt_at(*places: int, count: int = 70) -> list[Example]:
    grey = [encoded(Image.new("L", (4, 4), i), "PNG") for i in range(count)]
    return [Example(f"no {i}", b"?" if i in places else data, i) for i, data in enumerate(grey)]


def test_corrupt_images_stop_or_are_skipped_and_named() -> None:
    with pytest.raises(BadImage, match=r"no 41: .*--skip_corrupt"):
        read_images(corrupt_at(41, 55), 4, 1)
    images, _, skipped = read_images(corrupt_at(0, 41), 4, 1, skip_corrupt=True)
    assert skipped == ("no 0", "no 41") and len(images) == 68
    assert torch.equal(images.pixels[:, 0, 0, 0].long(), images.labels)


def test_result_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_threads(count: int) -> torch.Tensor:
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        return read_images(corrupt_at(3, count=1500), 4, 3, skip_corrupt=True)[0].pixels

    assert torch.equal(with_threads(1), with_threads(7))


def test_filters_of_warnings_are_left_as_they_were() -> None:
    before = warnings.filters[:]
    with pytest.raises(BadImage):
        read_images(corrupt_at(1), 4, 1)
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(32, 32)] * 3, 32),
        ([(32, 32), (31, 31)], 64),
        ([(32, 30)], 64),
        ([(224, 224)], 224),
        ([(225, 225)], 64),
        ([], 64),
    ],
)
def test_own_size_is_kept_where_all_agree(shapes: list[tuple[int, int]], size: int) -> None:
    examples = [Example("x", encoded(Image.new("L", shape), "PNG"), 0) for shape in shapes]
    assert common_size([Example("bad", b"?", 0), *examples]) == size


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
