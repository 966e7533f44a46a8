"""Labels of images that lie in several files, brought to one numbering of the classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsenet.data.errors import DataError, shortened

MAX_CLASSES = 1 << 16  # of texts and of names; ImageNet-21k has 21,841
# Of labels without names, all numbers up to the largest are classes: so many, or so many for each
# that there is, as of 10 classes of ImageNet's 1,000 or of a tenth of its 21,841.
ALWAYS_CLASSES, MAX_SPARE = 1000, 10


@dataclass(frozen=True)
class Labels:
    """The labels of a file: int64 ``(N,)``, numbers in *names* where it has some, -1 for none."""

    path: Path
    content: str
    names: tuple[str, ...]
    labels: np.ndarray


def numbered(
    splits: Mapping[str, list[Labels]], root: Path
) -> tuple[tuple[str, ...], dict[str, list[np.ndarray]], tuple[str, ...]]:
    """The classes of all *splits*, the labels of each file as numbers of these, and notes.

    Splits without labels, such as of a contest's test images, are left out. Raises ``DataError``
    where some images of a file have none, or all there are in *root*, and where the labels of files
    do not go together.
    """
    labelled = {split: parts for split, parts in splits.items() if _have_labels(split, parts)}
    notes = tuple(
        f"{split}: {sum(len(part.labels) for part in parts)} images without labels, left out"
        for split, parts in splits.items()
        if split not in labelled
    )
    if not labelled:
        raise DataError(f"--dataset_dir: expected images with labels in {root}, found none")
    classes, more = _joint_classes(labelled)
    numbers = {
        split: [_numbers_in(part, classes) for part in parts] for split, parts in labelled.items()
    }
    return classes, numbers, (*notes, *more)


def _have_labels(split: str, parts: list[Labels]) -> bool:
    """Whether the images of *split* have labels; ``DataError`` where only some have."""
    absent = [(part, row) for part in parts for row in np.flatnonzero(part.labels < 0)[:1]]
    if not absent:
        return True
    if split != "train" and all((part.labels < 0).all() for part in parts):
        return False
    part, row = absent[0]
    expected, found = "a label", "none"
    if part.content == "integers":
        expected, found = f"a label from 0 to {(len(part.names) or MAX_CLASSES) - 1}", "-1"
    raise DataError(f"{part.path} row {row}: expected {expected}, found {found}")


def _joint_classes(columns: Mapping[str, list[Labels]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of all files, and notes on how their labels were taken."""
    parts = [(split, part) for split, column in columns.items() for part in column]
    first = parts[0][1]
    for _, part in parts:
        if part.content != first.content:
            expected = f"labels as in {first.path}, {first.content}"
            raise DataError(f"{part.path}: expected {expected}, found {part.content}")
    if first.content == "string":
        return tuple(sorted({name for _, part in parts for name in part.names})), ()
    if first.content == "bool":
        return ("False", "True"), ()
    named = [part for _, part in parts if part.names]
    if not named:
        largest = _largest(part for _, part in parts)
        return tuple(str(label) for label in range(largest + 1)), ()
    model = named[0]
    notes = []
    for split, part in parts:
        unknown, missing = set(part.names) - set(model.names), set(model.names) - set(part.names)
        if not part.names:
            notes.append(f"{part.path.name} has no class names: numbered as {model.path.name} is")
        elif unknown or (missing and split == "train"):
            signed = [f"+{name}" for name in sorted(unknown)]
            signed += [f"-{name}" for name in sorted(missing)]
            raise DataError(
                f"{part.path}: expected the classes of {model.path}, "
                f"found unknown (+), missing (-): {shortened(signed)}"
            )
        elif part.names != model.names[: len(part.names)]:
            notes.append(f"{part.path.name} numbers the classes otherwise: taken by their names")
    return model.names, tuple(notes)


def _largest(parts: Iterable[Labels]) -> int:
    """The largest of labels without names, all below which are classes.

    Raises ``DataError`` where next to none of these classes has an image.
    """
    known = list(parts)
    different = len(np.unique(np.concatenate([part.labels for part in known])))
    most = ALWAYS_CLASSES + different * MAX_SPARE
    for part in known:
        row = int(part.labels.argmax()) if len(part.labels) else 0
        if (largest := part.labels.max(initial=0)) > most:
            raise DataError(
                f"{part.path} row {row}: expected a label of at most {most}, as there are "
                f"{different} different ones without names, found {largest}"
            )
    return max(int(part.labels.max(initial=0)) for part in known)


def _numbers_in(part: Labels, classes: tuple[str, ...]) -> np.ndarray:
    """The labels of a file as numbers in *classes*, int64 ``(N,)``."""
    if not part.names:
        return check_labels(part.labels, len(classes), f"{part.path} row")
    number = {name: number for number, name in enumerate(classes)}
    numbers: np.ndarray = np.array([number[name] for name in part.names], np.int64)[part.labels]
    return numbers


def check_labels(labels: np.ndarray, classes: int, where: str, first: int = 0) -> np.ndarray:
    """*labels* as int64 ``(N,)``; ``DataError`` where one is not from 0 to ``classes - 1``.

    *where* is what the message says before the number of the image, such as ``FILE row``, which
    is *first* for the first one.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        expected = f"a label from 0 to {classes - 1}"
        raise DataError(
            f"{where} {first + wrong[0]}: expected {expected}, found {labels[wrong[0]]}"
        )
    return labels.astype(np.int64)
