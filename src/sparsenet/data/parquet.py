"""A folder of parquet files as the Hugging Face hub has them: files of a split, images as files' bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsenet.data.dataset import Example, Source, Split
from sparsenet.data.errors import DataError, decoding
from sparsenet.extras import require

LABELS = ("label", "fine_label", "labels")


def parquet_files(root: Path, split: str = "") -> list[Path]:
    """The parquet files of a split, by name, in *root* or its folder ``data``."""
    return sorted(root.glob(f"{split}*.parquet")) or sorted(root.glob(f"data/{split}*.parquet"))


def holds(root: Path, name: str) -> bool:
    """Whether there is a parquet file in *root* or its folder ``data``."""
    return bool(parquet_files(root))


def open_source(root: Path, name: str) -> Source:
    return open_parquet(root)


def open_parquet(root: Path) -> Source:
    """The splits train, test and validation in *root*. Raises :class:`DataError` naming file, column or row.

    The image column is a struct with the field ``bytes``, the label column integer; class names come from
    the ``huggingface`` metadata. A validation split without a test split is the test split.
    """
    files = {
        split: paths for split in ("train", "val", "test") if (paths := parquet_files(root, split))
    }
    if "train" not in files:
        found = ", ".join(path.name for path in parquet_files(root)[:5]) or "none"
        raise DataError(f"--dataset_dir: expected train*.parquet in {root}, found {found}")
    if "test" not in files and "val" in files:
        files["test"] = files.pop("val")
    image, column, classes = _columns(files["train"][0])
    labels = {
        s: np.concatenate([_labels(path, column, len(classes)) for path in files[s]]) for s in files
    }
    if not classes:
        classes = tuple(
            map(str, range(1 + max(int(part.max(initial=0)) for part in labels.values())))
        )
    splits: dict[str, Split] = {s: ParquetSplit(tuple(files[s]), image, labels[s]) for s in files}
    return Source(root.resolve().name, classes, 3, splits)


@dataclass(frozen=True)
class ParquetSplit:
    """The files of one split, read record batch by record batch."""

    paths: tuple[Path, ...]
    image: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Example]:
        labels = iter(self.labels.tolist())
        for path in self.paths:
            with _opened(path) as file:
                batches = file.iter_batches(batch_size=1024, columns=[self.image])
                cells = (cell for batch in batches for cell in batch.column(self.image).to_pylist())
                for row, cell in enumerate(cells):
                    yield Example(
                        f"{path} row {row}", (cell or {}).get("bytes") or b"", next(labels)
                    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with (
        decoding(str(path), "a parquet file"),
        require("pyarrow.parquet", "train").ParquetFile(path) as file,
    ):
        yield file


def _columns(path: Path) -> tuple[str, str, tuple[str, ...]]:
    """The names of the image column, of the label column, and of the classes where the file has them."""
    types = require("pyarrow.types", "train")
    with _opened(path) as file:
        schema = file.schema_arrow
        kinds = dict(zip(schema.names, schema.types, strict=True))
        images = [
            name
            for name in kinds
            if types.is_struct(kinds[name]) and kinds[name].get_field_index("bytes") >= 0
        ]
        labels = [name for name in LABELS if name in kinds and types.is_integer(kinds[name])]
        if not images or not labels:
            expected = (
                f"an image column (struct with bytes) and an integer column {' or '.join(LABELS)}"
            )
            raise DataError(f"{path}: expected {expected}, found the columns {', '.join(kinds)}")
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata.get("info", {}).get("features", {}).get(labels[0], {}).get("names") or ()
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
        return images[0], labels[0], tuple(map(str, names))


def _labels(path: Path, column: str, classes: int) -> np.ndarray:
    with _opened(path) as file:
        values = file.read(columns=[column]).column(column)
        labels = np.asarray(values.fill_null(-1).to_numpy(), np.int64)
    limit = classes or 1 << 16  # where the classes have no names, anything reasonable
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        row, label = wrong[0], labels[wrong[0]]
        raise DataError(f"{path} row {row}: expected a label from 0 to {limit - 1}, found {label}")
    return labels
