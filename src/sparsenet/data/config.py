"""Which images are trained on: the settings of the data. Nothing here needs PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsenet.data.errors import DataError
from sparsenet.data.registry import DATASETS, KINDS


def _option(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    return field(
        default=default, metadata={"help": help} | ({"choices": choices} if choices else {})
    )


@dataclass(frozen=True)
class DataConfig:
    """Which images are trained on. Raises :class:`DataError` naming the flag whose value is out of range."""

    dataset: str = _option(
        "auto", "which data; auto: digits, or what --dataset_dir holds", DATASETS
    )
    dataset_dir: str = _option("", "folder with the data: archives, class folders or parquet files")
    dataset_name: str = _option("", "name used in reports; default: derived from the data")
    download: bool = _option(False, "download c10 or c100 into --dataset_dir where it is missing")
    image_size: int = _option(0, "side of the square images; 0: their own where all agree, else 64")
    in_chans: int = _option(0, "channels: 1 grey, 3 colour; 0: those of the data", (0, 1, 3))
    test_fraction: float = _option(
        0.2, "part of the images tested on where the data has no test split"
    )
    val_fraction: float = _option(
        0.0, "part of the training images held out to choose the best checkpoint"
    )
    skip_corrupt: bool = _option(False, "leave out images that cannot be read, and count them")
    mirror: bool = _option(True, "mirror half of the training images")
    shift: int = _option(4, "shift training images by up to so many pixels each way")
    trivial_augment: bool = _option(
        False, "do one drawn operation to each training image, as TrivialAugment does"
    )
    cutout: int = _option(0, "side of a square of each training image that is greyed out; 0: none")
    mixup: float = _option(
        0.0, "blend training images in pairs, shares drawn from Beta(a, a) with this a; 0: not"
    )
    cutmix: float = _option(
        0.0,
        "paste a square of one into another, drawn likewise; with mixup: half of them each; 0: not",
    )
    first_size: int = _option(
        0,
        "side of the training images in the first epoch, growing over 3/4 of the run; 0: full size always",
    )

    def __post_init__(self) -> None:
        rules = {
            "dataset": (self.dataset in DATASETS, "one of " + ", ".join(DATASETS)),
            "image_size": (self.image_size >= 0, "a size in pixels, or 0"),
            "in_chans": (self.in_chans in (0, 1, 3), "0, 1 or 3"),
            "test_fraction": (0 < self.test_fraction < 1, "a fraction between 0 and 1"),
            "val_fraction": (0 <= self.val_fraction < 1, "a fraction from 0 to below 1"),
            "shift": (self.shift >= 0, "a number of pixels, 0 or more"),
            "cutout": (self.cutout >= 0, "a number of pixels, 0 or more"),
            "mixup": (0 <= self.mixup < math.inf, "a number of at least 0"),
            "cutmix": (0 <= self.cutmix < math.inf, "a number of at least 0"),
            "first_size": (
                self.first_size >= 0 and self.first_size % 4 == 0,
                "a multiple of 4 pixels, or 0",
            ),
        }
        for flag, (holds, expected) in rules.items():
            if not holds:
                raise DataError(f"--{flag}: expected {expected}, found {getattr(self, flag)!r}")
        if self.dataset_dir and self.dataset != "auto" and not KINDS[self.dataset].in_folder:
            raise DataError(
                f"--dataset_dir: expected none with --dataset {self.dataset}, which need no folder, found "
                f"{self.dataset_dir!r}; --dataset auto takes what lies there"
            )
        able = [name for name, kind in KINDS.items() if kind.download]
        if self.download and self.dataset not in able:
            raise DataError(
                f"--download: expected --dataset {' or '.join(able)}, found {self.dataset}"
            )

    def located(self) -> DataConfig:
        """The same with the folder's whole path, by which a run finds its data from any folder."""
        folder = self.dataset_dir and str(Path(self.dataset_dir).expanduser().absolute())
        return replace(self, dataset_dir=folder)

    def scaled(self, size: int, full: int) -> DataConfig:
        """The same for training images of *size* pixels a side instead of *full*: shifts and squares in proportion."""
        return replace(
            self, shift=round(self.shift * size / full), cutout=round(self.cutout * size / full)
        )
