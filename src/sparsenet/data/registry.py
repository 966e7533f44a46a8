"""The kinds of data set, by the names that ``--dataset`` takes.

A new kind is one entry here and the module that the entry names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetKind:
    """What is known of a kind of data set before its module is loaded.

    The module offers ``holds(root, name) -> bool``, whether the folder or file *root* holds such data, and
    ``open_source(root, name) -> Source``. With *download* it also offers ``fetch(root, name)``.
    """

    module: str
    preset: str  # the recipe for it where none is named
    expected: str = ""  # what a folder of the kind holds, for messages
    in_folder: bool = True  # whether ``--dataset_dir`` says where it lies
    download: bool = False


# The order is that in which ``auto`` tries them; the first one that needs no folder is what ``auto`` is without one.
KINDS = {
    "digits": DatasetKind("sparsenet.data.digits", preset="digits", in_folder=False),
    "c10": DatasetKind(
        "sparsenet.data.archives",
        "paper",
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz",
        download=True,
    ),
    "c100": DatasetKind(
        "sparsenet.data.archives",
        "paper",
        "cifar-100-python.tar.gz or cifar-100-binary.tar.gz",
        download=True,
    ),
    "parquet": DatasetKind("sparsenet.data.parquet", "short", "train*.parquet"),
    "folder": DatasetKind("sparsenet.data.folder", "short", "class folders"),
}
DATASETS = ("auto", *KINDS)


def resolve(dataset: str, dataset_dir: str) -> str:
    """The name of the kind where nothing needs to be looked at: ``auto`` stays only where there is a folder."""
    if dataset == "auto" and not dataset_dir:
        return next(name for name, kind in KINDS.items() if not kind.in_folder)
    return dataset
