"""Which images a network was trained and tested on: known by their bytes, not by their places."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sparsenet.data.dataset import Dataset, Part
from sparsenet.data.errors import shortened
from sparsenet.data.splits import SPLITS
from sparsenet.validation import Count, Name


def copies(part: Part) -> int:
    """The number of images that come after another of the same bytes and class."""
    return len(part.ids) - len(_distinct(part))


def repeated(part: Part) -> int:
    """The number of images that are in several classes, their copies not counted."""
    _, counts = _distinct(part)[:, 0].unique(return_counts=True)
    return int(counts[counts > 1].sum())


def _distinct(part: Part) -> Tensor:
    rows: Tensor = torch.stack([part.ids, part.images.labels], 1).unique(dim=0)
    return rows


@dataclass(frozen=True)
class DataRecord:
    """What weights say of the images they were made with, by the splits train, val and test."""

    tested_on: Name = "test"  # what the test images were: "test", "validation" or "held-out"
    images: dict[Name, Count] = field(default_factory=dict)
    digests: dict[Name, Name] = field(default_factory=dict)  # the same for the same images

    def without_test(self) -> tuple[str, dict[str, str]]:
        """What training depends on: all but which the test images are."""
        return self.tested_on, {name: each for name, each in self.digests.items() if name != "test"}

    def are_trained_on(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether *tensors* (``to_tensors``) are of the same training images."""
        found = digest(tensors["train.ids"], tensors["train.labels"])
        return self.digests.get("train", found) == found


def record(data: Dataset) -> DataRecord:
    """The record of a data set."""
    ids = data.ids
    counts = {name: len(each) for name, each in ids.items()}
    digests = {name: digest(each, data.labels(name)) for name, each in ids.items()}
    return DataRecord(data.tested_on, counts, digests)


def digest(ids: Tensor, labels: Tensor) -> str:
    """16 hexadecimal digits that are a function of which images have which labels, in any order."""
    pairs = np.stack([ids.cpu().numpy(), labels.cpu().numpy()], 1).astype("<i8")
    rows = pairs[np.lexsort(pairs.T)]
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def to_tensors(data: Dataset) -> dict[str, Tensor]:
    """The ids and labels of each split, as a run keeps them."""
    return {
        f"{name}.{part}": tensor.cpu()
        for name, ids in data.ids.items()
        for part, tensor in (("ids", ids), ("labels", data.labels(name)))
    }


def checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """*tensors*, if they are ids and labels as ``to_tensors`` gives them, or nothing at all.

    Raises ``ValueError`` in one line that says what else they are.
    """
    splits = {name.partition(".")[0] for name in tensors}
    names = {f"{split}.{part}" for split in splits for part in ("ids", "labels")}
    if names != tensors.keys() or (splits and not {"train"} <= splits <= set(SPLITS)):
        found = shortened(sorted(tensors))
        raise ValueError(f"{found} instead of ids and labels of train, val and test")
    for name, tensor in tensors.items():
        count = tensors[f"{name.partition('.')[0]}.ids"].numel()
        if tensor.dtype != torch.int64 or tensor.shape != (count,):
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise ValueError(f"{name} of {found} instead of int64 ({count},)")
    return tensors


def in_order(data: Dataset, before: Mapping[str, Tensor]) -> Dataset:
    """*data* with its training images in the order of *before* (``to_tensors``), if they are those.

    Files that were renamed come in another order.
    """
    now = to_tensors(data)
    if "train.ids" not in before or len(before["train.ids"]) != len(now["train.ids"]):
        return data
    if all(torch.equal(now[name], before[name]) for name in ("train.ids", "train.labels")):
        return data
    old, new = (
        np.lexsort([tensors["train.labels"].numpy(), tensors["train.ids"].numpy()])
        for tensors in (before, now)
    )
    index = torch.empty(len(old), dtype=torch.int64)
    index[torch.from_numpy(old)] = torch.from_numpy(new)
    if not torch.equal(now["train.ids"][index], before["train.ids"]):
        return data
    ids = {**data.ids, "train": data.ids["train"][index]}
    return replace(data, train=data.train[index], ids=ids)


def differences(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> str:
    """What distinguishes the images of now from those before, both as ``to_tensors`` gives them.

    It is empty where there are only other numbers of copies.
    """
    if not before:
        return "which they were is no longer recorded"
    old, new = _by_id(before), _by_id(now)
    common = old.keys() & new.keys()
    counts = {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "of another class": sum(old[each][1] != new[each][1] for each in common),
        "in another split": sum(old[each][0] != new[each][0] for each in common),
    }
    named = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join(named)


def _by_id(tensors: Mapping[str, Tensor]) -> dict[int, tuple[str, int]]:
    found: dict[int, tuple[str, int]] = {}
    for name in ("train", "val", "test"):
        if f"{name}.ids" in tensors:
            ids, labels = tensors[f"{name}.ids"].tolist(), tensors[f"{name}.labels"].tolist()
            found |= {each: (name, label) for each, label in zip(ids, labels, strict=True)}
    return found
