"""From the settings of the data to its images: find, decode, split."""

from __future__ import annotations

import math
import pkgutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sparsenet.data.cache import Table
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset, Images, Part, Source, Split
from sparsenet.data.errors import DataError, count_images, reason, shortened
from sparsenet.data.filling import reading_stored
from sparsenet.data.identity import copies, repeated
from sparsenet.data.images import Decoded, common_size, reading_images
from sparsenet.data.preprocessing import Form
from sparsenet.data.registry import KINDS, DatasetKind, resolve
from sparsenet.data.remote import fetching
from sparsenet.data.sampling import hold_out
from sparsenet.data.splits import IMAGES_OF, LIES_IN
from sparsenet.events import Message, Reading, drained
from sparsenet.files import cache_folder, is_address, size_text, user_path
from sparsenet.memory import available_memory
from sparsenet.ranks import local_processes
from sparsenet.texts import printable
from sparsenet.validation import LONGEST_NAME

T = TypeVar("T")
TELL_EVERY = 0.1  # seconds between two words on how far the reading has come


def load_dataset(config: DataConfig) -> Dataset:
    """Finds, decodes and splits the images that *config* asks for. Raises ``DataError``.

    Without test images, validation images are tested on, and without those a part of the training
    images that is held out. Which these are is a function of their bytes, so that all runs on the
    data have the same, and others do not change sides when images are added.
    """
    return drained(loading_dataset(config))


def loading_dataset(config: DataConfig) -> Generator[Reading | Message, None, Dataset]:
    """Does what ``load_dataset`` does, and yields how far the reading has come, and messages."""
    with one_line():
        source = yield from finding(config)
        _check_training(source)
        train = source.splits["train"]
        size = config.image_size or (yield from reporting("sizes", len(train), common_size(train)))
        config.check_stored_size(size)
        kept = config.stored_size or size
        channels = config.in_chans or source.channels
        form = Form(size, channels, config.grey_range or None, config.max_megapixels)
        names = sorted(source.splits, key="train".__ne__)  # whose greys set the scale, first
        forms = {name: replace(form, size=kept) if name == "train" else form for name in names}
        on_disk, message = where_pixels_lie(config.cache, source.splits, forms)
        if message:
            yield Message(message)
        parts: dict[str, Part] = {}
        skipped: tuple[str, ...] = ()
        clipped: tuple[str, ...] = ()
        for name in names:
            settled = replace(forms[name], grey_range=form.grey_range)
            decoded = yield from read_split(source, name, settled, config.skip_corrupt, on_disk)
            parts[name] = decoded.part
            skipped += decoded.skipped
            clipped += clipping(decoded, name)
            form = replace(form, grey_range=decoded.grey_range)
            del decoded  # or all training images would be held until the end
    unused: tuple[str, ...] = ()
    if {"val", "test"} <= set(names) and config.val_fraction:
        unused = (f"--val_fraction {config.val_fraction:g} has no effect: there is a val split",)
    tested_on, drawn = _complete(parts, config)
    if drawn and kept != size:  # what is tested on is read from the files, as all test images are
        with one_line():
            decoded = yield from read_split(source, "train", form, config.skip_corrupt, on_disk)
        again = decoded.part
        for name in drawn:
            parts[name] = again.pick(torch.isin(again.ids, parts[name].ids))
    if not len(parts["test"].images):
        raise DataError(
            "--dataset_dir: expected a class of 2 different images or more, so that one can be "
            f"held out to test on, found none among {len(parts['train'].images)} images of "
            f"{len(source.classes)} classes ({shortened(source.classes)})"
        )
    return Dataset(
        name=printable(config.dataset_name or source.name),
        classes=source.classes,
        train=parts["train"].images,
        val=parts["val"].images if "val" in parts else None,
        test=parts["test"].images,
        skipped=skipped,
        tested_on=tested_on,
        ids={name: part.ids for name, part in parts.items()},
        grey_range=form.grey_range or (),
        notes=(*source.notes, *unused, *clipped, *_remarks(parts, source.classes, tested_on)),
        test_names=names_at(source.splits[LIES_IN[tested_on]], parts["test"].places),
    )


def _complete(parts: dict[str, Part], config: DataConfig) -> tuple[str, list[str]]:
    """Adds images to test on, and to validate on where that is asked for.

    Returns what is tested on, and the names of what was drawn from the training images.
    """
    tested_on, drawn = "test", []
    if "test" not in parts and "val" in parts:
        parts["test"], tested_on = parts.pop("val"), "validation"
    elif "test" not in parts:
        tested_on = "held-out"
        drawn.append("test")
        parts |= draw(parts["train"], config.test_fraction, "test")
    if "val" not in parts and config.val_fraction:
        drawn.append("val")
        parts |= draw(parts["train"], config.val_fraction, "val")
    return tested_on, drawn


def names_at(split: Split, places: Tensor) -> tuple[str, ...]:
    """The names of the examples at *places*, int64 ``(N,)``. No image is read."""
    if isinstance(split, Images | Table):
        names = list(split.names())
    else:
        names = [example.name for example in split]
    return tuple(names[place] for place in places.tolist())


@contextmanager
def one_line() -> Iterator[None]:
    """Turns what reading files raises into a ``DataError``."""
    try:
        yield
    except (OSError, MemoryError) as error:
        expected = "readable data that fits"
        raise DataError(f"--dataset_dir: expected {expected}, found {reason(error)}") from error


def finding(config: DataConfig) -> Generator[Reading | Message, None, Source]:
    """Returns the data that *config* names, not yet decoded; what has an address is fetched first.

    Raises ``DataError``.
    """
    if not is_address(config.dataset_dir):
        return find(config)
    root, held = yield from fetching(config.dataset_dir)
    source = find(replace(config, dataset_dir=str(root)))
    places = dict.fromkeys(source.splits, config.dataset_dir)
    return replace(source, places=places, held=held)


def find(config: DataConfig) -> Source:
    """The data in the folder that *config* names, not yet decoded. Raises ``DataError``."""
    name = resolve(config.dataset, config.dataset_dir, config.labels)
    kinds = [KINDS[name]] if name != "auto" else [k for k in KINDS.values() if k.in_folder]
    if kinds[0].in_folder and not config.dataset_dir:
        get = "; --dataset_dir DIR --download gets it" if kinds[0].downloader else ""
        raise DataError(f"--dataset_dir: expected a folder with data, found none given{get}")
    root = user_path(config.dataset_dir)
    source = _read(kinds, root, config)
    if source is None and config.download:
        pkgutil.resolve_name(kinds[0].downloader)(root)
        source = _read(kinds, root, config)
    if source is not None:
        columns = {"image_column": config.image_column, "label_column": config.label_column}
        for flag, column in columns.items():
            if column and not source.is_table:
                expected = "a CSV file (--labels) or parquet files, which have columns"
                raise DataError(f"--{flag}: expected {expected}, found {root} without")
        for each in (printable(config.dataset_name or source.name), *source.classes):
            if len(each) > LONGEST_NAME:
                expected = f"names of at most {LONGEST_NAME:,} characters"
                raise DataError(
                    f"{root}: expected {expected}, found {each[:40]!r}… of {len(each):,}"
                )
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


def _check_training(source: Source) -> None:
    if "train" not in source.splits:
        found = ", ".join(source.splits)
        raise DataError(
            f"--dataset_dir: expected images to train on, found only {found}; "
            "name their folder or file train, or give it as --dataset_dir"
        )
    if source.empty:
        raise DataError(source.empty[0])
    if len(source.classes) < 2:
        found = ", ".join(source.classes)
        place = source.places.get("train", "the data")
        raise DataError(
            f"--dataset_dir: expected at least 2 classes in {place}, found only {found}"
        )


def read_split(
    source: Source, name: str, form: Form, skip_corrupt: bool, on_disk: bool
) -> Generator[Reading | Message, None, Decoded]:
    """Reads a split of *source* in *form*, as ``reading_images`` does."""
    split = source.splits[name]
    on_disk = on_disk and not _is_decoded(split, form)
    reading = (reading_stored if on_disk else reading_images)(split, form, skip_corrupt)
    decoded = yield from reporting(name, len(split), reading)
    if not len(decoded.images):
        expected = f"{name} images"
        raise DataError(
            f"--dataset_dir: expected {expected}, found none ({len(decoded.skipped)} unreadable)"
        )
    return decoded


def where_pixels_lie(
    cache: str, splits: Mapping[str, Split], forms: Mapping[str, Form]
) -> tuple[bool, str]:
    """Whether decoded images come to lie on the disk, and a line that says so and how much it is.

    For ``auto`` they do where they would fill more than half of the memory that is free, as holding
    images out copies them, and where this is one of several processes on a machine, which then
    share the work of decoding and the memory. The line is empty where nothing has to be decoded.
    """
    counts = {
        name: len(split) for name, split in splits.items() if not _is_decoded(split, forms[name])
    }
    count, free = sum(counts.values()), available_memory()
    needed = sum(math.prod(forms[name].shape) * each for name, each in counts.items())
    processes = local_processes()
    free //= processes
    on_disk = cache == "disk" or (cache == "auto" and (2 * needed > free or processes > 1))
    place = f"on disk in {cache_folder() / 'images'}" if on_disk else "in memory"
    shapes = " and ".join(sorted({f"{forms[name].size}x{forms[name].size}" for name in counts}))
    line = (
        f"{count_images(count)} of {shapes} pixels are {size_text(needed)} decoded, with "
        f"{size_text(free)} of memory free: they lie {place} (--cache {cache})"
    )
    return on_disk, line * bool(count)


def _is_decoded(split: Split, form: Form) -> bool:
    return isinstance(split, Images) and split.shape == form.shape


def reporting(
    what: str, total: int, work: Generator[int | Message, None, T]
) -> Generator[Reading | Message, None, T]:
    """Does *work*, which yields how many images are done, and yields now and then how far it is."""
    last = time.monotonic()
    while True:
        try:
            done = next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(done, Message):
            yield done
        elif time.monotonic() - last >= TELL_EVERY:
            last = time.monotonic()
            yield Reading(what, done, total)


def clipping(decoded: Decoded, split: str) -> tuple[str, ...]:
    """A line where images of *split* have greys beyond the range that black and white span."""
    if not decoded.clipped:
        return ()
    low, high = decoded.grey_range
    beyond = f"greys beyond {low:g} to {high:g}, which are clipped (--grey_range)"
    return (f"warning: {split} has {count_images(decoded.clipped)} with {beyond}",)


def draw(part: Part, fraction: float, purpose: str) -> dict[str, Part]:
    """The training images without those that are held out, and these under the name *purpose*."""
    held = hold_out(part.ids, part.images.labels, fraction, purpose)
    return {"train": part.pick(~held), purpose: part.pick(held)}


def _remarks(parts: Mapping[str, Part], classes: tuple[str, ...], tested_on: str) -> Iterator[str]:
    """Lines about what is missing from the splits, and about images that are in two places."""
    called = {**IMAGES_OF, "test": tested_on}
    for name, part in parts.items():
        if missing := part.missing(classes):
            yield f"warning: no {called[name]} image of {missing}"
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        yield f"warning: classes whose names differ in case only: {shortened(alike)}"
    train = parts["train"]
    if count := copies(train):
        yield f"warning: copies of other training images, to the byte: {count}"
    if count := repeated(train):
        yield f"warning: {count} training images are also in another class, to the byte"
    for name, part in parts.items():
        overlap = int(torch.isin(part.ids, train.ids).sum())
        if name != "train" and overlap:
            yield f"warning: {overlap} {called[name]} images are also training images, to the byte"
