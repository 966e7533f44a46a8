"""What a model does to pixels before its first layer, and the statistics that this needs."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparsenet.data.config import MAX_IMAGE_SIZE, DataConfig
from sparsenet.data.dataset import Images
from sparsenet.events import drained

ChannelStatistics = tuple[tuple[float, ...], tuple[float, ...]]  # means, standard deviations

# A pixel of one grey level more must stay another number in fp32, and no number may come near its
# ends: means of pixels / 255 are from 0 to 1, and deviations at most 0.5.
MAX_MEAN = 1000.0  # fp32 has 64 numbers between two grey levels that are so far off
STD_RANGE = (1e-6, 1e6)
FULL_RANGE = (0.0, 65535.0)  # levels of 16 bits
# From a file to what a network takes, for whoever does it without this package.
RULE = (
    "The first picture of the file, turned as its EXIF orientation says; transparency laid on "
    "white; colours as RGB where channels is 3, as grey L = (19595 R + 38470 G + 7471 B + 32768) "
    "// 65536 where it is 1, and grey as three equal channels where it is 3. The largest central "
    "square, whose edges may lie within pixels, resized to size by antialiased bilinear "
    "interpolation and rounded to 8 bits: Pillow's ImageOps.fit(image, (size, size), "
    "Image.Resampling.BILINEAR). Greys of 16 bits, of 32 bits or float are resized as float32 "
    "(mode F), and then pixel = round(255 (level - low) / (high - low)), cut off at 0 and 255, "
    "where grey_range is (low, high), or (0, 65535) where it is empty. A JPEG is decoded at full "
    "size, but above max_megapixels at the first of 1/2, 1/4, 1/8 that has no "
    "more. Then value = (pixel / 255 - mean) / std for each channel, in the order "
    "(batch, channel, row, column)."
)


@dataclass(frozen=True)
class Form:
    """What image files are decoded to, uint8 ``(channels, size, size)``.

    The shorter side is resized to *size* and the longer cropped about its centre; an image of that
    size is kept to the byte, and any image where *size* is 0. ``RULE`` says it all.

    Greys of more than 8 bits are black and white at the ends of *grey_range*. ``None`` measures it
    over what is read together: from 0 to the smallest of 255, 1023, 4095, 16383, 65535 that holds
    them all. An empty one is that of a training set without any: they are taken for 16 bits, and
    refused where they cannot be. An image of more than *max_megapixels* is refused; a JPEG of up
    to 8 times as many is decoded smaller.
    """

    size: int
    channels: int
    grey_range: tuple[float, ...] | None = None
    max_megapixels: float = DataConfig.max_megapixels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size


@dataclass(frozen=True)
class Preprocessing:
    """The images that a model was trained on; *mean* and *std* are those of ``pixels / 255``.

    *grey_range* are the levels of deep greys (16 bits and float) that are black and white, empty
    where it was trained on none. Of more than *max_megapixels* a JPEG is decoded smaller, and no
    other image is read.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grey_range: tuple[float, ...] = ()
    max_megapixels: float = DataConfig.max_megapixels

    def __post_init__(self) -> None:
        for name in ("mean", "std", "grey_range"):  # a JSON file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def form(self, max_megapixels: float | None = None) -> Form:
        """What images are decoded to, by default of as many *max_megapixels* as in training."""
        limit = max_megapixels or self.max_megapixels
        return Form(self.size, self.channels, self.grey_range, limit)

    def problem(self) -> str | None:
        """Why these are the statistics of no images, in one clause; ``None`` where they may be.

        Further off than ``MAX_MEAN`` and ``STD_RANGE``, what they make of pixels is no image.
        """
        if not len(self.mean) == len(self.std) == self.channels:
            return f"{len(self.mean)} means and {len(self.std)} stds for {self.channels} channels"
        if not 1 <= self.size <= MAX_IMAGE_SIZE:
            return f"a size of {self.size}, expected one from 1 to {MAX_IMAGE_SIZE}"
        if not 0 < self.max_megapixels < math.inf:
            return f"{self.max_megapixels:g} max_megapixels, expected a positive number"
        if self.grey_range and not _is_range(self.grey_range):
            return f"a grey_range of {self.grey_range}, expected two rising numbers"
        low, high = STD_RANGE
        for each in self.std:
            if not low <= each <= high:
                return f"a std of {each:g}, expected one from {low:g} to {high:g}"
        for each in self.mean:
            if not abs(each) <= MAX_MEAN:
                return f"a mean of {each:g}, expected one within ±{MAX_MEAN:g}"
        return None

    def normalise(self, batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turns uint8 ``(N, C, H, W)`` into ``(pixels / 255 - mean) / std``, on the same device.

        Raises ``ValueError`` for images of other channels, and for numbers that are no pixels from
        0 to 255, such as floats from 0 to 1.
        """
        if batch.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[1] != self.channels:
            expected = f"images: expected uint8 (N, {self.channels}, H, W) to normalise"
            raise ValueError(f"{expected}, found {batch.dtype} {tuple(batch.shape)}")
        exact = torch.promote_types(dtype, torch.float32)
        scale, offset = _scale_and_offset(self.mean, self.std, exact, batch.device)
        return torch.addcmul(offset, batch.to(exact), scale).to(dtype)


def _is_range(levels: tuple[float, ...]) -> bool:
    """Whether *levels* are the low and the high end of a range of greys."""
    return len(levels) == 2 and -math.inf < levels[0] < levels[1] < math.inf


# Cached, as a copy to an accelerator makes the step wait, and captured steps keep its address.
@cache
def _scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    means = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
    deviations = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
    return (1 / (255 * deviations)).to(device, dtype), (-means / deviations).to(device, dtype)


def channel_statistics(images: Images) -> ChannelStatistics:
    """Does what ``measuring_channels`` does, at once."""
    return drained(measuring_channels(images))


def measuring_channels(images: Images) -> Generator[int, None, ChannelStatistics]:
    """Mean and standard deviation of each channel of ``pixels / 255``, from histograms in fp64.

    A deviation is at least 1/255, one grey level, so that a constant channel can be divided by it.
    It yields how many images it has looked at, as those on disk take their time.
    """
    done = 0
    counts = torch.zeros(images.shape[0], 256, dtype=torch.float64)
    for part in images.parts():
        for channel, pixels in enumerate(part.unbind(1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()
        done += len(part)
        yield done
    share = counts / counts.sum(1, keepdim=True)  # (C, 256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
