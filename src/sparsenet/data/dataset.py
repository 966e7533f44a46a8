"""What a data set is: its options, its undecoded examples, its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Example(NamedTuple):
    """An image before it is decoded: a file, a file's bytes, or an array uint8 ``(C, H, W)``."""

    name: str
    source: Path | bytes | np.ndarray
    label: int


class Split(Protocol):
    """Examples that can be gone through more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Example]: ...


@dataclass(frozen=True)
class Images:
    """Decoded images: *pixels* uint8 ``(N, C, H, W)`` and *labels* int64 ``(N,)``; also a :class:`Split`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Example]:
        for i, (image, label) in enumerate(
            zip(self.pixels.numpy(), self.labels.tolist(), strict=True)
        ):
            yield Example(f"image {i}", image, label)

    def to(self, device: torch.device) -> Images:
        """The same images on *device*."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Images in three splits, with the names of their classes and of the corrupt images left out."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None
    test: Images
    skipped: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(images.pixels.nbytes for images in (self.train, self.val, self.test) if images)

    def to(self, device: torch.device) -> Dataset:
        """The same images on *device*."""
        val = self.val and self.val.to(device)
        return replace(self, train=self.train.to(device), val=val, test=self.test.to(device))


@dataclass(frozen=True)
class Source:
    """What a reader finds: undecoded splits ``train`` and, where the data has them, ``test`` and ``val``."""

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, Split]


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``pixels / 255``, in fp64 from the channel's histogram.

    A deviation is at least 1/255, one grey level, so that a constant channel can be divided by it.
    """
    counts = torch.zeros(images.pixels.shape[1], 256, dtype=torch.float64)
    for first in range(0, len(images), 4096):
        for channel, pixels in enumerate(images.pixels[first : first + 4096].unbind(1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()
    share = counts / counts.sum(1, keepdim=True)  # (C, 256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
