"""Images in classes: finding them, decoding them, and in ``sampling`` the order they are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparsenet.data.archives import find_archive, layouts, open_archive
from sparsenet.data.dataset import DataConfig, Dataset, Images, Source, channel_statistics
from sparsenet.data.download import CIFAR_URL, download
from sparsenet.data.errors import DataError, reason
from sparsenet.data.folder import open_folder
from sparsenet.data.images import common_size, read_images
from sparsenet.data.parquet import open_parquet, parquet_files
from sparsenet.data.sampling import stratified_split
from sparsenet.extras import require

__all__ = ["DataConfig", "DataError", "Dataset", "Images", "channel_statistics", "load_dataset"]


def load_dataset(config: DataConfig) -> Dataset:
    """Finds, decodes and splits the images that *config* asks for. Raises :class:`DataError`.

    Splits that the data does not have are drawn with a fixed seed, so that all runs have the same.
    """
    try:
        source = _find(config)
        splits, skipped = _decode(source, config)
    except (OSError, MemoryError) as error:
        raise DataError(f"--dataset_dir: expected readable data that fits, found {reason(error)}") from error
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(splits["train"], config.test_fraction)
    if "val" not in splits and config.val_fraction:
        splits["train"], splits["val"] = _hold_out(splits["train"], config.val_fraction)
    name = config.dataset_name or source.name
    return Dataset(name, source.classes, splits["train"], splits.get("val"), splits["test"], skipped)


def _find(config: DataConfig) -> Source:
    dataset, root = config.dataset, Path(config.dataset_dir).expanduser()
    if dataset == "digits" or (dataset == "auto" and not config.dataset_dir):
        return _digits()
    if config.dataset_dir and config.download and not find_archive(root, dataset):
        layout = layouts(dataset)[0]
        download(CIFAR_URL + layout.archive, root / layout.archive, layout.md5)
    if not config.dataset_dir or not root.exists():
        found = f"nothing at {root.absolute()}" if config.dataset_dir else "none given"
        raise DataError(f"--dataset_dir: expected a folder with data, found {found}")
    if archive := find_archive(root, dataset):
        return open_archive(*archive)
    if dataset in ("c10", "c100"):
        expected = " or ".join(layout.archive for layout in layouts(dataset))
        raise DataError(f"--dataset_dir: expected {expected} in {root}, found neither; --download gets it")
    if dataset == "parquet" or (dataset == "auto" and parquet_files(root)):
        return open_parquet(root)
    return open_folder(root)


def _digits() -> Source:
    """Scikit-learn's 1797 handwritten digits: 8x8, grey, 17 levels."""
    digits = require("sklearn.datasets", "train").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = Images(torch.from_numpy(pixels), torch.from_numpy(digits.target.astype(np.int64)))
    return Source("digits", tuple("0123456789"), 1, {"train": images})


def _decode(source: Source, config: DataConfig) -> tuple[dict[str, Images], tuple[str, ...]]:
    size = config.image_size or common_size(source.splits["train"])
    channels = config.in_chans or source.channels
    splits: dict[str, Images] = {}
    skipped: tuple[str, ...] = ()
    for name, split in source.splits.items():
        splits[name], bad = read_images(split, size, channels, config.skip_corrupt)
        skipped += bad
        if not len(splits[name]):
            raise DataError(f"--dataset_dir: expected {name} images, found none ({len(bad)} corrupt)")
    return splits, skipped


def _hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    kept, held = stratified_split(images.labels, fraction)
    if not len(held):
        raise DataError(f"--dataset_dir: expected a class of 2 images or more, found {len(images)} of 1 each")
    return images[kept], images[held]
