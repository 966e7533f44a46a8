"""What a data set is: examples before they are decoded, and images in splits after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Content: TypeAlias = "bytes | np.ndarray | PillowImage"
PART = 1 << 24  # bytes of pixels that are looked at together


class Example(NamedTuple):
    """An image before it is decoded.

    That is a file, a file's bytes, an array uint8 ``(C, H, W)``, or an image of Pillow's.
    """

    name: str
    source: Path | Content
    label: int


class Split(Protocol):
    """Examples that can be iterated over more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Example]: ...


@dataclass(frozen=True)
class Source:
    """What a reader returns: the splits ``train`` and, where the data has them, ``test``, ``val``.

    *channels* is 1 or 3, what the images are decoded to where the settings do not say. *notes* are
    lines for the user: what is left out, and what was taken for what. *places* say where a split
    lies, for those that do not lie in ``--dataset_dir`` itself. *empty* are the folders of classes
    that have no images, which nobody can be trained on, each with what to do about it.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    is_table: bool = False  # which has columns
    held: object = None  # what keeps files that were fetched from being removed


@dataclass(frozen=True)
class Images:
    """Decoded images: *pixels* uint8 ``(N, C, H, W)``, *labels* int64 ``(N,)``; also a split."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Example]:
        images = (image for part in self.parts() for image in part.numpy())
        for columns in zip(self.names(), images, self.labels.tolist(), strict=True):
            yield Example(*columns)

    def names(self) -> Iterator[str]:
        """What each image is called."""
        return (f"image {number}" for number in range(len(self)))

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H, W)`` of each image."""
        return tuple(self.pixels.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the pixels lie, or where they come to when they are read."""
        return self.pixels.device

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return len(self) * math.prod(self.shape)

    def parts(self) -> Iterator[Tensor]:
        """The pixels, few enough images at a time that they need little memory."""
        count = max(1, PART // math.prod(self.shape))
        for first in range(0, len(self), count):
            yield self[first : first + count].pixels

    def labelled(self, labels: Tensor) -> Images:
        """The same images with other labels."""
        return Images(self.pixels, labels)

    def like(self, size: int) -> Images:
        """Room for the same images with *size* pixels a side, where these lie."""
        return Images(self.pixels.new_empty(len(self), self.shape[0], size, size), self.labels)

    def write(self, first: int, pixels: Tensor) -> None:
        """Puts *pixels* in the place of those of images *first* and following."""
        self.pixels[first : first + len(pixels)] = pixels

    def to(self, device: torch.device) -> Images:
        """The same images on *device*."""
        return Images(self.pixels.to(device), self.labels.to(device))


class Part(NamedTuple):
    """Images, and for each an int64 number that is a function of its bytes, *ids* ``(N,)``.

    *places*, int64 ``(N,)``, are those among the examples that they were decoded from.
    """

    images: Images
    ids: Tensor
    places: Tensor

    def pick(self, index: Tensor) -> Part:
        """Those that *index*, a mask or numbers, chooses."""
        return Part(self.images[index], self.ids[index], self.places[index])

    def missing(self, classes: Sequence[str]) -> str:
        """The names of the classes of which there is no image; of many the first five."""
        counts = torch.bincount(self.images.labels, minlength=len(classes))
        names = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
        more = f" and {len(names) - 5} more classes" if len(names) > 5 else ""
        return ", ".join(names[:5]) + more


@dataclass(frozen=True)
class Dataset:
    """Images in splits, with the names of their classes and lines on images left out.

    *ids* are int64 ``(N,)`` for each split that there is (train, val, test): equal ones are images
    of the same bytes. *grey_range* are the levels of deep greys that are black and white, empty
    where *train* has none. *notes* are lines for the user. *test_names* are the paths of the test
    images, or what they are called in the file that holds them.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None
    test: Images
    skipped: tuple[str, ...] = ()
    tested_on: str = "test"  # what the test images are: "test", "validation" or "held-out"
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    grey_range: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()

    @property
    def chosen_on(self) -> str:
        """What the validation images are called, where there are some."""
        return "held-out" if self.tested_on == "validation" else "validation"

    def labels(self, split: str) -> Tensor:
        """The labels of a split that there is, int64 ``(N,)``."""
        images: Images = getattr(self, split)
        return images.labels

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(images.nbytes for images in (self.train, self.val, self.test) if images)

    def to(self, device: torch.device) -> Dataset:
        """The same images on *device*."""
        val = self.val and self.val.to(device)
        return replace(self, train=self.train.to(device), val=val, test=self.test.to(device))
