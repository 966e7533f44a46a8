"""Which split the name of a folder or of a file stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sparsenet.data.errors import DataError

SPLITS = ("train", "val", "test")
IMAGES_OF = {"train": "training", "val": "validation", "test": "test"}  # as "training images"
LIES_IN = {"test": "test", "validation": "val", "held-out": "train"}  # what is tested on
SPLIT_COLUMNS = ("split", "set", "subset", "usage")  # of tables, in any case
WORDS = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "valset": "val",
    "test": "test",
    "testing": "test",
    "testset": "test",
}


def split_of(name: str) -> tuple[str, str] | None:
    """The split that *name* stands for, and the rest of the name; ``None`` where it is no split's.

    Case and what joins words do not matter: ``seg_train``, ``Training`` and ``TrainImages`` are
    ``train``, with the rests ``seg *``, ``*`` and ``* images``. A name with two such words
    (``train_val``) stands for none.
    """
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    words = [word.lower() for word in words]
    found = [word for word in words if word in WORDS]
    if len(found) != 1:
        return None
    return WORDS[found[0]], " ".join("*" if word in WORDS else word for word in words)


def find_splits(names: Iterable[str], where: str, kind: str = "folder") -> dict[str, str]:
    """The split that each of *names* stands for, as split to name, without the names of none.

    Where several stand for one split, those count whose rests are the same, so that ``train`` and
    ``test`` stand beside a folder ``my_test_photos``. Raises ``DataError`` where that does not
    settle it; *where* begins its message, and *kind* is what *names* are the names of.
    """
    found = sorted((name, *meaning) for name in names if (meaning := split_of(name)))
    if len({split for _, split, _ in found}) < len(found):
        kin: dict[str, dict[str, list[str]]] = {}
        for name, split, rest in found:
            kin.setdefault(rest, {}).setdefault(split, []).append(name)
        family = max(kin.values(), key=len)
        most = [each for each in kin.values() if len(each) == len(family)]
        if len(most) > 1 or any(len(each) > 1 for each in family.values()):
            rivals = ", ".join(name for name, _, _ in found)
            raise DataError(
                f"{where}: expected one {kind} for each of train, val and test, found {rivals}; "
                "rename or move away those that are not meant"
            )
        return {split: names[0] for split, names in family.items()}
    return {split: name for name, split, _ in found}
