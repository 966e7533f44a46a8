"""The kinds of data set, by the names that ``--dataset`` takes.

A new kind is one entry here and the functions that the entry names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetKind:
    """What is known of a kind of data set before its module is loaded.

    Functions are named as ``module:function``, so that only what is used is imported. *reader* is
    a function of the folder or file that ``--dataset_dir`` names, and of the ``DataConfig``: it
    returns a ``sparsenet.data.dataset.Source``, or ``None`` where there is no data of this kind.
    *downloader* is a function that fetches the data into that folder.
    """

    reader: str
    preset: str  # the settings to train with where no preset is named
    expected: str = ""  # what a folder with such data holds, for messages
    in_folder: bool = True  # whether the data lies in a folder at all
    downloader: str = ""  # none where the data cannot be downloaded


# The order is that in which ``auto`` tries them on a folder, and ``folder`` has the last word.
# Without a folder, ``auto`` is the first kind that needs none.
KINDS = {
    "digits": DatasetKind("sparsenet.data.digits:read_digits", "digits", in_folder=False),
    "c10": DatasetKind(
        "sparsenet.data.cifar:read_cifar10",
        "paper",
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz",
        downloader="sparsenet.data.cifar:download_cifar10",
    ),
    "c100": DatasetKind(
        "sparsenet.data.cifar:read_cifar100",
        "paper",
        "cifar-100-python.tar.gz or cifar-100-binary.tar.gz",
        downloader="sparsenet.data.cifar:download_cifar100",
    ),
    "parquet": DatasetKind("sparsenet.data.parquet:read_parquet", "short", "train*.parquet"),
    "tar": DatasetKind("sparsenet.data.tar:read_tar", "short", "*.tar with KEY.jpg and KEY.cls"),
    "csv": DatasetKind("sparsenet.data.csv_labels:read_csv_labels", "short"),
    "folder": DatasetKind("sparsenet.data.folder:read_folder", "short"),
}
DATASETS = ("auto", *KINDS)


def resolve(dataset: str, dataset_dir: str, labels: str = "") -> str:
    """The kind of a data set before it is looked at; still ``auto`` where it has a folder alone."""
    if dataset == "auto" and labels:
        return "csv"
    if dataset == "auto" and not dataset_dir:
        return next(name for name, kind in KINDS.items() if not kind.in_folder)
    return dataset


def lies_in_folder(dataset: str) -> bool:
    """Whether ``--dataset_dir`` says where such data lie; it does for ``auto``."""
    return dataset not in KINDS or KINDS[dataset].in_folder
