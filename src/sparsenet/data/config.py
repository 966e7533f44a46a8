"""Which images are trained on: the settings of the data. Nothing here needs PyTorch or NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsenet.data.errors import DataError
from sparsenet.data.registry import DATASETS, KINDS, lies_in_folder
from sparsenet.files import is_address, user_path
from sparsenet.validation import check_settings, setting

MAX_IMAGE_SIZE = 4096  # pixels
CACHES = ("auto", "memory", "disk")
POINTERS = ("dataset", "dataset_dir", "labels", "image_column", "label_column")  # to the images
READING = ("skip_corrupt", "cache", "download")  # how they are read, whatever for


@dataclass(frozen=True)
class DataConfig:
    """Which images are trained on, and how they are augmented.

    Raises ``DataError`` naming the flag whose value is out of range.
    """

    dataset: str = setting(
        "auto", "which data; auto: digits, or what --dataset_dir holds", DATASETS
    )
    dataset_dir: str = setting(
        "",
        "the data: a folder of images, parquet or tar files or archives, one such file, or an "
        "address of some, as s3://bucket/folder",
    )
    dataset_name: str = setting("", "name used in reports; default: derived from the data")
    labels: str = setting("", "a CSV file that says which class the images in --dataset_dir have")
    image_column: str = setting("", "column of the images in CSV and parquet files; default: found")
    label_column: str = setting(
        "", "column of the classes in CSV and parquet files; default: found"
    )
    download: bool = setting(False, "download c10 or c100 into --dataset_dir where it is missing")
    image_size: int = setting(
        0, "side of the square images; 0: their own where all have one, of at most 224, else 128"
    )
    in_chans: int = setting(0, "channels: 1 grey, 3 colour; 0: those of the data", (0, 1, 3))
    test_fraction: float = setting(
        0.2, "part of the images held out to test on where the data has no split for it"
    )
    val_fraction: float = setting(
        0.0, "part of the training images held out to choose the best checkpoint"
    )
    grey_range: tuple[float, ...] = setting(
        (),
        "grey levels of 16-bit and float images that become black and white, as 0,4095; "
        "default: 0 and the smallest of 255, 1023, 4095, 16383, 65535 that holds the training set",
    )
    mean: tuple[float, ...] = setting(
        (),
        "mean of pixels / 255, which is taken off, for all channels or for each, as "
        "0.485,0.456,0.406; default: that of the training images",
    )
    std: tuple[float, ...] = setting((), "what they are divided by then, likewise")
    max_megapixels: float = setting(
        128.0, "largest image that is decoded; a JPEG may have 8 times as many pixels"
    )
    skip_corrupt: bool = setting(
        False, "leave out and count images that cannot be read, and lines without one"
    )
    cache: str = setting(
        "auto", "where decoded images lie; auto: on disk where memory is too small", CACHES
    )
    sampler: str = setting(
        "shuffled",
        "shuffled: each training image once an epoch; balanced: as many images, but equally many "
        "of each class",
        ("shuffled", "balanced"),
    )
    mirror: bool = setting(True, "mirror half of the training images")
    shift: int = setting(4, "shift training images by up to so many pixels each way")
    crop: float = setting(
        0.0,
        "train on random resized crops, instead of shifts, of at least this part of an image's "
        "area, in ratios from 3:4 to 4:3; 0: not",
    )
    stored_size: int = setting(
        0, "side at which training images are kept for --crop, up to twice --image_size; 0: that"
    )
    trivial_augment: bool = setting(
        False, "do one drawn operation to each training image, as TrivialAugment does"
    )
    cutout: int = setting(0, "side of a square of each training image that is greyed out; 0: none")
    mixup: float = setting(
        0.0, "blend training images in pairs, shares drawn from Beta(a, a) with this a; 0: not"
    )
    cutmix: float = setting(
        0.0, "paste a square of one into another; with mixup: half of them each; 0: not"
    )
    first_size: int = setting(
        0, "side of the images in the first epoch, growing over 3/4 of the run; 0: full size"
    )

    def __post_init__(self) -> None:
        for name in ("grey_range", "mean", "std"):  # a JSON file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_settings(
            self,
            ("image_size", 0 <= self.image_size <= MAX_IMAGE_SIZE, f"0 to {MAX_IMAGE_SIZE} pixels"),
            ("test_fraction", 0 < self.test_fraction < 1, "a fraction between 0 and 1"),
            ("val_fraction", 0 <= self.val_fraction < 1, "a fraction from 0 to below 1"),
            ("max_megapixels", 0 < self.max_megapixels < math.inf, "a positive number"),
            ("shift", 0 <= self.shift <= MAX_IMAGE_SIZE, "a number of pixels, 0 or more"),
            ("crop", 0 <= self.crop <= 1, "a part of the area from 0 to 1"),
            (
                "stored_size",
                0 <= self.stored_size <= MAX_IMAGE_SIZE,
                f"0 to {MAX_IMAGE_SIZE} pixels",
            ),
            ("stored_size", bool(self.crop) or not self.stored_size, "0 without --crop"),
            ("cutout", 0 <= self.cutout <= MAX_IMAGE_SIZE, "a number of pixels, 0 or more"),
            ("mixup", 0 <= self.mixup < math.inf, "a number of at least 0"),
            ("cutmix", 0 <= self.cutmix < math.inf, "a number of at least 0"),
            ("first_size", 0 <= self.first_size <= MAX_IMAGE_SIZE, "a multiple of 4 pixels, or 0"),
            ("first_size", self.first_size % 4 == 0, "a multiple of 4 pixels, or 0"),
            prefix="--",
            error=DataError,
        )
        if self.dataset_dir and not lies_in_folder(self.dataset):
            raise DataError(
                f"--dataset_dir: expected none with --dataset {self.dataset}, which need no "
                f"folder, found {self.dataset_dir!r}; --dataset auto takes what lies there"
            )
        if self.labels and self.dataset not in ("auto", "csv"):
            raise DataError(
                f"--labels: expected --dataset auto or csv, and --dataset_dir with the images, "
                f"found --dataset {self.dataset}"
            )
        if bool(self.mean) != bool(self.std):
            there, other = ("mean", "std") if self.mean else ("std", "mean")
            raise DataError(f"--{other}: expected numbers, as --{there} has some, found none")
        levels = self.grey_range
        if levels and (len(levels) != 2 or levels[0] >= levels[1]):
            shown = ",".join(f"{level:g}" for level in levels)
            raise DataError(f"--grey_range: expected two rising numbers as 0,4095, found {shown}")
        downloadable = [name for name, kind in KINDS.items() if kind.downloader]
        if self.download and self.dataset not in downloadable:
            raise DataError(
                f"--download: expected --dataset {' or '.join(downloadable)}, found {self.dataset}"
            )

    def pointed_at(self, given: Mapping[str, str]) -> DataConfig:
        """The same for the data that the settings in *given* name.

        Other data has another name, and is looked at anew where it lies in a folder and these
        settings are for data that does not, or the other way round.
        """
        new = dict(given)
        if given.keys() & {"dataset", "dataset_dir", "labels"}:
            other = ("dataset_name", "labels", "image_column", "label_column")
            new = {**dict.fromkeys(other, ""), **new}
        kind = given.get("dataset", self.dataset)
        if given.get("dataset_dir") and "dataset" not in given and not lies_in_folder(kind):
            new["dataset"] = "auto"
        elif "dataset_dir" not in given and not lies_in_folder(kind):
            new["dataset_dir"] = ""
        return replace(self, **new)  # type: ignore[arg-type]

    def located(self) -> DataConfig:
        """The same with absolute paths, so that a run finds its data from anywhere."""
        folder, labels = map(_absolute, (self.dataset_dir, self.labels))
        return replace(self, dataset_dir=folder, labels=labels)

    def scaled(self, side: int, full: int) -> DataConfig:
        """The same for training images of *side* pixels, its lengths being for those of *full*.

        The sizes of images are among the lengths: of images that are kept larger, ``image_size``
        is what a crop of *side* becomes.
        """
        kept = self.stored_size or full

        def length(pixels: int) -> int:
            return round(pixels * side / kept)

        return replace(
            self,
            image_size=length(full),
            stored_size=side if self.stored_size else 0,
            shift=length(self.shift),
            cutout=length(self.cutout),
        )

    def check_stored_size(self, size: int) -> None:
        """Raises ``DataError`` where training images cannot be kept for crops to *size* pixels."""
        if self.stored_size and not size <= self.stored_size <= 2 * size:
            raise DataError(
                f"--stored_size: expected {size} to {2 * size} for images of {size} pixels a side, "
                f"found {self.stored_size}"
            )


def _absolute(path: str) -> str:
    if not path or is_address(path):
        return path
    return str(user_path(path).absolute())
