"""From the settings of the data to its images: find, decode, split."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset, Images, Source
from sparsenet.data.errors import DataError, reason
from sparsenet.data.images import common_size, read_images
from sparsenet.data.registry import KINDS, resolve
from sparsenet.data.sampling import stratified_split


def load_dataset(config: DataConfig) -> Dataset:
    """Finds, decodes and splits the images that *config* asks for. Raises :class:`DataError`.

    Splits that the data does not have are drawn with a fixed seed, so that all runs have the same.
    """
    try:
        source = _find(config)
        splits, skipped = _decode(source, config)
    except (OSError, MemoryError) as error:
        raise DataError(
            f"--dataset_dir: expected readable data that fits, found {reason(error)}"
        ) from error
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(splits["train"], config.test_fraction)
    if "val" not in splits and config.val_fraction:
        splits["train"], splits["val"] = _hold_out(splits["train"], config.val_fraction)
    name = config.dataset_name or source.name
    return Dataset(
        name, source.classes, splits["train"], splits.get("val"), splits["test"], skipped
    )


def _find(config: DataConfig) -> Source:
    name, root = resolve(config.dataset, config.dataset_dir), Path(config.dataset_dir).expanduser()
    names = [name] if name != "auto" else [each for each, kind in KINDS.items() if kind.in_folder]
    modules = {each: import_module(KINDS[each].module) for each in names}
    if config.download and config.dataset_dir and not modules[name].holds(root, name):
        modules[name].fetch(root, name)
    if KINDS[names[0]].in_folder and not (config.dataset_dir and root.exists()):
        found = f"nothing at {root.absolute()}" if config.dataset_dir else "none given"
        raise DataError(f"--dataset_dir: expected a folder with data, found {found}")
    for each, module in modules.items():
        if module.holds(root, each):
            source: Source = module.open_source(root, each)
            return source
    hint = "; --download gets it" if KINDS[name].download else ""
    raise DataError(f"--dataset_dir: expected {KINDS[name].expected} in {root}, found none{hint}")


def _decode(source: Source, config: DataConfig) -> tuple[dict[str, Images], tuple[str, ...]]:
    size = config.image_size or common_size(source.splits["train"])
    channels = config.in_chans or source.channels
    splits: dict[str, Images] = {}
    skipped: tuple[str, ...] = ()
    for name, split in source.splits.items():
        splits[name], bad = read_images(split, size, channels, config.skip_corrupt)
        skipped += bad
        if not len(splits[name]):
            raise DataError(
                f"--dataset_dir: expected {name} images, found none ({len(bad)} corrupt)"
            )
    return splits, skipped


def _hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    kept, held = stratified_split(images.labels, fraction)
    if not len(held):
        raise DataError(
            f"--dataset_dir: expected a class of 2 images or more, found {len(images)} of 1 each"
        )
    return images[kept], images[held]
