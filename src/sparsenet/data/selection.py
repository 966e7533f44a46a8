"""The images that a trained network is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images, Source
from sparsenet.data.errors import DataError
from sparsenet.data.identity import DataRecord, Labelled, digest
from sparsenet.data.images import drained
from sparsenet.data.load import clipping, decode, draw, find, one_line
from sparsenet.validation import printable

SPLITS = {"train": "training", "val": "validation", "test": "test"}  # and their images' names


@dataclass(frozen=True)
class Selection:
    """Images with labels that are those of a network, and what to say of them."""

    name: str  # of the data
    images: Images
    kind: str  # "training", "validation", "test", "held-out", or nothing where data has no splits
    place: str  # a folder or a file; nothing where the data lie in none
    notes: tuple[str, ...]  # lines for the user

    @property
    def description(self) -> str:
        """How many images of what, and where: ``photos: 20 test images in photos/test``."""
        place, here = Path(self.place), Path.cwd()
        shown = place.relative_to(here) if place.is_relative_to(here) else place
        where = f" in {shown}" if self.place else ""
        return f"{self.name}: {count_images(len(self.images), self.kind)}{where}"


def count_images(count: int, kind: str) -> str:
    """So many images in words: ``20 test images``, or ``20 images`` where *kind* is empty."""
    return f"{count} {kind} images" if kind else f"{count} images"


@dataclass(frozen=True)
class Known:
    """What is known of the images that a network was made with.

    *images* are what a run keeps of them (``sparsenet.data.identity.to_tensors``); a weights file
    has only the *record*.
    """

    images: Mapping[str, Tensor]
    record: DataRecord | None
    own: bool = False  # whether the data that are looked at are those of the run

    def in_splits(self, part: Labelled, *splits: str) -> Tensor:
        """Which images are in one of *splits* of the training, bool ``(N,)``."""
        names = [f"{split}.ids" for split in splits]
        ids = [self.images[name] for name in names if name in self.images]
        return torch.isin(part.ids, torch.cat(ids)) if ids else torch.zeros(len(part.ids)).bool()

    def changes(self, part: Labelled) -> tuple[str, ...]:
        """A line where the images that the run was tested on have changed since."""
        if not self.own or "test.ids" not in self.images:
            return ()
        before = self.images["test.ids"]
        new, gone = int((~torch.isin(part.ids, before)).sum()), ~torch.isin(before, part.ids)
        counts = {"new": new, "gone": int(gone.sum())}
        named = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        return (f"warning: since the training, test images are {named}",) if named else ()

    def warning(self, part: Labelled) -> tuple[str, ...]:
        """A line where some of the images were trained on."""
        count = int(self.in_splits(part, "train").sum())
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
        source = find(config)
    name = split or next((each for each in ("test", "val") if each in source.splits), "")
    if name in source.splits and name != "train":
        part, notes = _decoded(source, name, config)
        kind = SPLITS[name]
        notes += known.warning(part)
        if name == "test" or "test" not in source.splits:
            notes += known.changes(part)
    elif "train" in source.splits and not (name == "test" and "val" in source.splits):
        whole, notes = _decoded(source, "train", config)
        part, kind, note = _part_of_training(whole, name, _drawn(known, whole, config), config)
        notes += note
    else:
        found = ", ".join(source.splits)
        raise DataError(f"--split: expected one of those that there are ({found}), found {split}")
    labels = _labels(part, source, classes)
    part = part._replace(images=Images(part.images.pixels, labels))
    if missing := part.missing(classes):
        notes = (*notes, f"no image of {missing}")
    return Selection(
        name=printable(config.dataset_name or source.name),
        images=part.images,
        kind=kind,
        place=source.places.get(name or "train", config.dataset_dir),
        notes=notes,
    )


def _decoded(source: Source, name: str, config: DataConfig) -> tuple[Labelled, tuple[str, ...]]:
    with one_line():
        size, channels = config.image_size, config.in_chans
        # The network's range, which is empty where it was trained on no deep greys.
        decoded = drained(decode(source, name, config, size, channels, config.grey_range))
    notes, skipped = (*source.notes, *clipping(decoded, name)), decoded.skipped
    if skipped:
        notes = (*notes, f"left out: {len(skipped)} unreadable images, the first: {skipped[0]}")
    return Labelled(decoded.images, decoded.ids), notes


def _drawn(known: Known, whole: Labelled, config: DataConfig) -> Known:
    """*known* with the images of a network's splits, where *whole* is what they were drawn from."""
    record = known.record
    if known.images or record is None or record.tested_on != "held-out":
        return known
    parts = draw(whole, config.test_fraction, "test")
    if "val" in record.images:
        parts |= draw(parts["train"], config.val_fraction, "val")
    if digest(parts["train"].ids, parts["train"].images.labels) != record.digests["train"]:
        return known
    return Known({f"{name}.ids": part.ids for name, part in parts.items()}, record)


def _part_of_training(
    whole: Labelled, name: str, known: Known, config: DataConfig
) -> tuple[Labelled, str, tuple[str, ...]]:
    """The images of *whole*, all there are to train on, that are in a split; kind and notes."""
    folder = config.dataset_dir
    if name == "val":
        part, kind = whole.pick(known.in_splits(whole, "val")), "validation"
        if not len(part.ids):
            raise DataError(f"--split val: expected validation images in {folder}, found none")
        return part, kind, ()
    if name == "train":
        learned = known.in_splits(whole, "train")
        return (whole.pick(learned) if learned.any() else whole), "training", ()
    if known.record and known.record.tested_on != "held-out":
        return whole, "", known.warning(whole)
    if not known.images:
        warning = "which of these images the network was trained on, if any, is not recorded"
        return whole, "", (f"warning: {warning}",)
    learned = known.in_splits(whole, "train", "val")
    count = int(learned.sum())
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


def _labels(part: Labelled, source: Source, classes: Sequence[str]) -> Tensor:
    """The labels of *part* as the numbers of *classes*, by their names."""
    numbers = {normalize("NFC", name): number for number, name in enumerate(classes)}
    names = [normalize("NFC", name) for name in source.classes]
    present = [names[label] for label in part.images.labels.unique().tolist()]
    if unknown := [name for name in present if name not in numbers]:
        raise DataError(
            f"--dataset_dir: expected images of the {len(classes)} classes of the training "
            f"({', '.join(classes[:5])}{', …' * (len(classes) > 5)}), "
            f"found also {', '.join(unknown[:5])}"
        )
    table = torch.tensor([numbers.get(name, -1) for name in names])
    return table[part.images.labels]
