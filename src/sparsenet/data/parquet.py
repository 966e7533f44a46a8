"""A folder of parquet files as the Hugging Face hub has them, with images as files' bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source, check_labels
from sparsenet.data.errors import DataError, decoding
from sparsenet.extras import require

LABELS = ("label", "fine_label", "labels")  # names of the column
MAX_CLASSES = 1 << 16  # where the classes have no names


def read_parquet(root: Path, config: DataConfig) -> Source | None:
    """The splits train, test and validation in *root* or its folder ``data``.

    The image column is a struct with the field ``bytes``, the label column integer; class names
    come from the ``huggingface`` metadata. Raises ``DataError`` naming file, column or row.
    """
    if not _files(root):
        return None
    files = {split: _files(root, split) for split in ("train", "val", "test")}
    if not files["train"]:
        names = ", ".join(path.name for path in _files(root)[:5])
        raise DataError(f"--dataset_dir: expected train*.parquet in {root}, found {names}")
    images, labels, classes = _columns(files["train"][0])
    splits: dict[str, ParquetSplit] = {}
    for split, paths in files.items():
        if paths:
            parts = [_read_labels(path, labels, len(classes) or MAX_CLASSES) for path in paths]
            splits[split] = ParquetSplit(tuple(paths), images, np.concatenate(parts))
    if not classes:
        largest = max(int(split.labels.max(initial=0)) for split in splits.values())
        classes = tuple(str(label) for label in range(largest + 1))
    return Source(root.resolve().name, classes, 3, splits)


def _files(root: Path, split: str = "") -> list[Path]:
    return sorted(root.glob(f"{split}*.parquet")) or sorted(root.glob(f"data/{split}*.parquet"))


@dataclass(frozen=True)
class ParquetSplit:
    """The files of one split; images are read record batch by record batch."""

    paths: tuple[Path, ...]
    column: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Example]:
        labels = iter(self.labels.tolist())
        for path in self.paths:
            row = 0
            with _opened(path) as file:
                for batch in file.iter_batches(batch_size=1024, columns=[self.column]):
                    for cell in batch.column(self.column).to_pylist():
                        data = (cell or {}).get("bytes") or b""
                        yield Example(f"{path} row {row}", data, next(labels))
                        row += 1


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "train")
    with decoding(str(path), "a parquet file"), parquet.ParquetFile(path) as file:
        yield file


def _columns(path: Path) -> tuple[str, str, tuple[str, ...]]:
    """Names of the image column, of the label column, and of the classes, if the file has them."""
    arrow_types = require("pyarrow.types", "train")
    with _opened(path) as file:
        schema = file.schema_arrow
        types = dict(zip(schema.names, schema.types, strict=True))
        structs = [name for name, kind in types.items() if arrow_types.is_struct(kind)]
        images = [name for name in structs if types[name].get_field_index("bytes") >= 0]
        labels = [name for name in LABELS if name in types and arrow_types.is_integer(types[name])]
        if not images or not labels:
            raise DataError(
                f"{path}: expected an image column (struct with bytes) and an integer column "
                f"{' or '.join(LABELS)}, found the columns {', '.join(types)}"
            )
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        names = features.get(labels[0], {}).get("names") or ()
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
    return images[0], labels[0], tuple(map(str, names))


def _read_labels(path: Path, column: str, classes: int) -> np.ndarray:
    with _opened(path) as file:
        labels = file.read(columns=[column]).column(column).fill_null(-1).to_numpy()
    return check_labels(labels, classes, f"{path} row")
