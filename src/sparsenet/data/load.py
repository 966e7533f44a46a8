"""From the settings of the data to its images: find, decode, split."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset, Images, Source
from sparsenet.data.errors import DataError, reason
from sparsenet.data.images import common_size, read_images
from sparsenet.data.registry import KINDS, DatasetKind, resolve
from sparsenet.data.sampling import stratified_split
from sparsenet.validation import printable


def load_dataset(config: DataConfig) -> Dataset:
    """Finds, decodes and splits the images that *config* asks for. Raises ``DataError``.

    Validation images without test images are the test images. Splits that the data does not have
    are drawn with a fixed seed, so that all runs have the same.
    """
    try:
        source = _find(config)
        splits, skipped = _decode(source, config)
    except (OSError, MemoryError) as error:
        expected = "readable data that fits"
        raise DataError(f"--dataset_dir: expected {expected}, found {reason(error)}") from error
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(splits["train"], config.test_fraction)
    if "val" not in splits and config.val_fraction:
        splits["train"], splits["val"] = _hold_out(splits["train"], config.val_fraction)
    return Dataset(
        name=printable(config.dataset_name or source.name),
        classes=source.classes,
        train=splits["train"],
        val=splits.get("val"),
        test=splits["test"],
        skipped=skipped,
    )


def _find(config: DataConfig) -> Source:
    name = resolve(config.dataset, config.dataset_dir)
    kinds = [KINDS[name]] if name != "auto" else [k for k in KINDS.values() if k.in_folder]
    if kinds[0].in_folder and not config.dataset_dir:
        get = "; --dataset_dir DIR --download gets it" if kinds[0].downloader else ""
        raise DataError(f"--dataset_dir: expected a folder with data, found none given{get}")
    root = Path(config.dataset_dir).expanduser()
    source = _read(kinds, root, config)
    if source is None and config.download:
        pkgutil.resolve_name(kinds[0].downloader)(root)
        source = _read(kinds, root, config)
    if source is not None:
        return source
    if not root.exists():
        path = root.absolute()
        raise DataError(f"--dataset_dir: expected a folder with data, found nothing at {path}")
    hint = "; --download gets it" if kinds[0].downloader else ""
    raise DataError(f"--dataset_dir: expected {kinds[0].expected} in {root}, found none{hint}")


def _read(kinds: list[DatasetKind], root: Path, config: DataConfig) -> Source | None:
    """The data in *root* as the first of *kinds* that it is of."""
    if not root.exists():
        return None
    sources = (pkgutil.resolve_name(kind.reader)(root, config) for kind in kinds)
    return next((source for source in sources if source is not None), None)


def _decode(source: Source, config: DataConfig) -> tuple[dict[str, Images], tuple[str, ...]]:
    size = config.image_size or common_size(source.splits["train"])
    channels = config.in_chans or source.channels
    undecoded = dict(source.splits)
    if "test" not in undecoded and "val" in undecoded:
        undecoded["test"] = undecoded.pop("val")
    splits: dict[str, Images] = {}
    skipped: tuple[str, ...] = ()
    for name, split in undecoded.items():
        images, _, corrupt = read_images(split, size, channels, config.skip_corrupt)
        if not len(images):
            expected = f"{name} images"
            raise DataError(
                f"--dataset_dir: expected {expected}, found none ({len(corrupt)} corrupt)"
            )
        splits[name] = images
        skipped += corrupt
    return splits, skipped


def _hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    left, held_out = stratified_split(images.labels, fraction)
    if not len(held_out):
        expected = "a class of 2 images or more"
        raise DataError(f"--dataset_dir: expected {expected}, found {len(images)} of 1 each")
    return images[left], images[held_out]
