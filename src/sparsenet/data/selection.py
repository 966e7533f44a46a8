"""The images that a trained network is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images, Part, Source
from sparsenet.data.errors import DataError, count_images, shortened, unreadable
from sparsenet.data.identity import DataRecord, differences, digest
from sparsenet.data.load import (
    clipping,
    draw,
    finding,
    names_at,
    one_line,
    read_split,
    where_pixels_lie,
)
from sparsenet.data.preprocessing import Form
from sparsenet.data.sampling import stratified_split
from sparsenet.data.splits import IMAGES_OF
from sparsenet.events import drained
from sparsenet.texts import printable


@dataclass(frozen=True)
class Selection:
    """Images with labels that are those of a network, and what to say of them."""

    name: str  # of the data
    images: Images
    kind: str  # "training", "validation", "test", "held-out", or nothing where data has no splits
    place: str  # a folder or a file; nothing where the data lie in none
    notes: tuple[str, ...]  # lines for the user
    names: tuple[str, ...] = ()  # of the images: paths, or what the file that holds them calls them
    # How many the network was trained on (train) and chosen by (val); ``None``: not recorded.
    seen: Mapping[str, int] | None = None

    @property
    def description(self) -> str:
        """How many images of what, and where: ``photos: 20 test images in photos/test``."""
        place, here = Path(self.place), Path.cwd()
        shown = place.relative_to(here) if place.is_relative_to(here) else self.place
        where = f" in {shown}" if self.place else ""
        return f"{self.name}: {count_images(len(self.images), self.kind)}{where}"


@dataclass(frozen=True)
class Known:
    """What is known of the images that a network was made with.

    *images* are what a run keeps of them (``sparsenet.data.identity.to_tensors``); a weights file
    has only the *record*.
    """

    images: Mapping[str, Tensor]
    record: DataRecord | None
    own: bool = False  # whether the data that are looked at are those of the run
    named: bool = False  # whether somebody has named them all the same

    @property
    def tested_on(self) -> str:
        """What the network was tested on, which older versions did not record."""
        return self.record.tested_on if self.record else ""

    def in_splits(self, part: Part, *splits: str) -> Tensor:
        """Which images are in one of *splits* of the training, bool ``(N,)``."""
        names = [f"{split}.ids" for split in splits]
        ids = [self.images[name] for name in names if name in self.images]
        return torch.isin(part.ids, torch.cat(ids)) if ids else torch.zeros(len(part.ids)).bool()

    def seen(self, part: Part) -> Mapping[str, int] | None:
        """How many images of *part* were those of the splits train and val, if that is recorded.

        Of a weights file it is known only where they are just the images of one split.
        """
        if self.images:
            return {name: int(self.in_splits(part, name).sum()) for name in ("train", "val")}
        found = digest(part.ids, part.images.labels)
        digests = self.record.digests if self.record else {}
        if found not in digests.values():
            return None
        return {name: len(part.ids) * (digests.get(name) == found) for name in ("train", "val")}

    def with_drawn(self, whole: Part, config: DataConfig) -> Known:
        """The same with the images of the splits that were drawn from *whole*.

        Of a weights file these are known only where *whole* is still what they were drawn from.
        """
        if self.images or self.record is None:
            return self
        # None were drawn to validate on where the data had a split for that, which nobody recorded.
        for fraction in {config.val_fraction, 0.0}:
            parts = {"train": whole}
            if self.tested_on == "held-out":
                parts |= draw(parts["train"], config.test_fraction, "test")
            if fraction:
                parts |= draw(parts["train"], fraction, "val")
            train = parts["train"]
            if digest(train.ids, train.images.labels) == self.record.digests.get("train"):
                ids = {f"{name}.ids": part.ids for name, part in parts.items()}
                return Known(ids, self.record)
        return self

    def changes(self, part: Part, split: str = "test") -> tuple[str, ...]:
        """A line where the images of a *split* of the run have changed since."""
        names = f"{split}.ids", f"{split}.labels"
        if not self.own or names[0] not in self.images:
            return ()
        before = {name: self.images[name] for name in names}
        now = dict(zip(names, (part.ids, part.images.labels), strict=True))
        kind, changes = IMAGES_OF[split], differences(before, now)
        return (f"warning: {kind} images have changed since then: {changes}",) if changes else ()

    def warning(self, part: Part) -> tuple[str, ...]:
        """A line where some of the images were trained on."""
        count = (self.seen(part) or {}).get("train")
        return (f"warning: the network was trained on {count} of these images",) if count else ()


def select_images(
    config: DataConfig, split: str, classes: Sequence[str], known: Known
) -> Selection:
    """The images of *split* (train, val, test) of the data of *config*, labelled as *classes*.

    Without a *split* they are the test images, else the validation images; of data that has
    neither, they are all but those that the network was trained on. Raises ``DataError`` where
    there are none, or where there is a class that the network does not know.
    """
    with one_line():
        source = drained(finding(config))
    name = _split_of_source(source, split, known)
    part, notes = _decoded(source, name, config, classes)
    kind = IMAGES_OF[name]
    if name == "train":
        known = known.with_drawn(part, config)
        part, kind, more = _part_of_training(part, split, known, config)
    else:
        more = known.warning(part)
        if split != "val":
            more += known.changes(part)
    if missing := part.missing(classes):
        more = (*more, f"no image of {missing}")
    return Selection(
        name=printable(config.dataset_name or source.name),
        images=part.images,
        kind=kind,
        place=source.places.get(name, config.dataset_dir),
        notes=(*(() if known.own else source.notes), *notes, *more),
        names=names_at(source.splits[name], part.places),
        seen=known.seen(part),
    )


def _split_of_source(source: Source, split: str, known: Known) -> str:
    """The split of *source* that has the images of *split*, or that they were drawn from."""
    there = source.splits.keys()
    validation_is_test = known.tested_on == "validation" and "test" not in there
    if split in ("", "test"):
        if "test" in there:
            return "test"
        if "val" in there and (not split or validation_is_test):
            return "val"
        if "train" in there and "val" not in there:
            return "train"
    drawn = split == "val" and validation_is_test and "val.ids" in known.images
    if split in there and not drawn:
        return split
    if split == "val" and "train" in there:
        return "train"
    found = f"found {split}" if split else "found only that"
    raise DataError(f"--split: expected one of those that there are ({', '.join(there)}), {found}")


def _decoded(
    source: Source, name: str, config: DataConfig, classes: Sequence[str]
) -> tuple[Part, tuple[str, ...]]:
    """A split, with labels that are numbers of *classes*, and notes about it."""
    form = Form(config.image_size, config.in_chans, config.grey_range, config.max_megapixels)
    with one_line():
        there = {name: source.splits[name]}
        on_disk, _ = where_pixels_lie(config.cache, there, {name: form})
        decoded = drained(read_split(source, name, form, config.skip_corrupt, on_disk))
    notes = (*clipping(decoded, name), *unreadable(decoded.skipped))
    labels = _labels(decoded.images.labels, source, classes)
    return decoded.part._replace(images=decoded.images.labelled(labels)), notes


def _part_of_training(
    whole: Part, split: str, known: Known, config: DataConfig
) -> tuple[Part, str, tuple[str, ...]]:
    """The images of *whole*, all there are to train on, that are in a split; kind and notes."""
    if split == "val":
        part = whole.pick(known.in_splits(whole, "val"))
        if not len(part.ids):
            expected = f"validation images in {config.dataset_dir}"
            raise DataError(f"--split val: expected {expected}, found none")
        kind = "held-out" if known.tested_on == "validation" else "validation"
        return part, kind, known.changes(part, "val")
    if split == "train":
        trained = known.in_splits(whole, "train")
        if trained.any():
            part, rest = whole.pick(trained), int((~trained).sum())
            left_out = f"left out: {count_images(rest)} that the network was not trained on"
            notes = known.changes(part, "train") if known.own else (left_out,) * bool(rest)
            return part, "training", notes
        return whole, "", ("warning: the network is not known to have learned from these images",)
    return _not_trained_on(whole, known, config)


def _not_trained_on(
    whole: Part, known: Known, config: DataConfig
) -> tuple[Part, str, tuple[str, ...]]:
    """The images of *whole* that a network can be tested on; kind and notes."""
    folder = config.dataset_dir
    learned = known.in_splits(whole, "train", "val")
    count = int(learned.sum())
    if known.own and known.images and not count and not known.named:
        raise DataError(
            f"{folder}: expected the images that the run was made with, found none of them; "
            f"--dataset_dir {folder} tests on all that are there"
        )
    if known.own and not known.record:
        _, held_out = stratified_split(whole.images.labels, config.test_fraction)
        note = "the run is of an older version: its test images are found by their places"
        return whole.pick(held_out), "held-out", (note,)
    if known.record and known.tested_on != "held-out":
        return whole, "", known.warning(whole)
    if not known.images:
        warning = "which of these images the network was trained on, if any, is not recorded"
        return whole, "", (f"warning: {warning}",)
    if count == len(learned):
        raise DataError(
            f"--dataset_dir: expected images that the network was not trained on in {folder}, "
            f"found none among {count}; --split train evaluates those"
        )
    if not count:
        return whole, "", ()
    part = whole.pick(~learned)
    if known.own:
        return part, "held-out", known.changes(part)
    note = f"left out: {count} images in {folder} that it was trained on (--split train)"
    return part, "held-out", (note,)


def _labels(labels: Tensor, source: Source, classes: Sequence[str]) -> Tensor:
    """*labels* of *source* as the numbers of *classes*, by their names."""
    numbers = {normalize("NFC", name): number for number, name in enumerate(classes)}
    names = [normalize("NFC", name) for name in source.classes]
    present = [names[label] for label in labels.unique().tolist()]
    if unknown := [name for name in present if name not in numbers]:
        raise DataError(
            f"--dataset_dir: expected images of the {len(classes)} classes of the training "
            f"({shortened(classes)}), found also {shortened(unknown)}"
        )
    table = torch.tensor([numbers.get(name, -1) for name in names])
    return table[labels]
