"""Parquet files as the Hugging Face hub has them, and as other programs write them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import normalize

import numpy as np

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source
from sparsenet.data.errors import DataError, decoding, shortened
from sparsenet.data.labels import MAX_CLASSES, Labels, check_labels, numbered
from sparsenet.data.shards import find_files, left_out, missing_parts
from sparsenet.data.splits import SPLIT_COLUMNS, split_of
from sparsenet.data.tree import SUFFIXES
from sparsenet.extras import require
from sparsenet.files import file_state

IMAGES = ("image", "img")  # the column that is meant where several hold images
LABELS = ("label", "labels", "fine_label", "class", "category", "target")
HOLD_LABELS = ("integers", "bool", "string", "null")  # what cells of a label column may hold
# A file of 2 KB can claim to hold any number of any cells, as what repeats takes no place.
MAX_ROWS = 1 << 24  # in all files; ImageNet-21k has 14 million, and each image is held in memory
MAX_METADATA = 1 << 24  # bytes; the names of ImageNet-21k's classes have 1 MB
# What a group of rows may unpack to: so many bytes, or so many times what the file has. Images are
# packed already, and of pictures that are not, few are nothing but one colour.
ALWAYS_UNPACKED, MAX_RATIO = 1 << 24, 100
AT_ONCE = 1 << 30  # bytes of images read at once, where each may be as large as its column
IMAGE_ROWS, LABEL_ROWS = 64, 1 << 16  # read at once; more are not faster


def read_parquet(root: Path, config: DataConfig) -> Source | None:
    """The splits in *root*: a file, or a folder as the hub has them.

    A file is that file alone, as ``train``, and so are files whose names say no split. Images are
    bytes, or paths that lead, from the folder of their file or from *root*, to files in *root* or
    in the folder of that one file. Labels are integers, of which the
    ``huggingface`` metadata may have the names, booleans or strings. Files that number the same
    names otherwise are brought to one order. Raises ``DataError`` naming file, column or row.
    """
    files = find_files(root, ".parquet")
    if not files:
        return None
    image, label, notes = _columns(next(iter(files.values()))[0], config)
    notes += (*left_out(root, files, ".parquet"), *missing_parts(files))
    _check_rows(files)
    labels = {
        split: [_read_labels(path, image, label, split) for path in paths]
        for split, paths in files.items()
    }
    classes, numbers, more = numbered(labels, root)
    folder = root if root.is_dir() else root.parent
    splits = {
        split: ParquetSplit(tuple(zip(files[split], parts, strict=True)), folder, image)
        for split, parts in numbers.items()
    }
    name = root.resolve()
    title = name.stem if root.is_file() else name.name
    return Source(title, classes, 3, splits, notes + more, is_table=True)


# --- which columns --------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, dictionaries: Collection[str] = ()) -> Iterator[Any]:
    """The file, read piece by piece; texts at *dictionaries* are not repeated in memory."""
    parquet = require("pyarrow.parquet", "train")
    options = {"read_dictionary": list(dictionaries), "buffer_size": 1 << 20, "pre_buffer": False}
    with decoding(str(path), "a parquet file"), parquet.ParquetFile(path, **options) as file:
        yield file


def _check_rows(files: Mapping[str, list[Path]]) -> None:
    """Raises ``DataError`` naming the file whose rows are the first that are too many."""
    total = 0
    for path in (path for paths in files.values() for path in paths):
        with _opened(path) as file:
            total += file.metadata.num_rows
        if total > MAX_ROWS:
            raise DataError(f"{path}: expected at most {MAX_ROWS:,} images in all, found {total:,}")


def _contents(file: Any) -> dict[str, str]:
    """What the cells of each column hold."""
    schema = file.schema_arrow
    return dict(zip(schema.names, map(_content, schema.types), strict=True))


def _content(kind: Any) -> str:
    """What the cells of a pyarrow type hold: ``integers``, ``string``, ``bool``, ``binary``, …"""
    types = require("pyarrow.types", "train")
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind) and _fields(kind):
        return "images"
    if types.is_integer(kind):
        return "integers"
    return str(kind).removeprefix("large_").removesuffix("_view")


def _fields(struct: Any) -> list[str]:
    """The fields of a struct that can hold an image."""
    fields = {field.name: _content(field.type) for field in struct}
    return [
        name for name, each in (("bytes", "binary"), ("path", "string")) if fields.get(name) == each
    ]


def _leaves(file: Any, column: str) -> list[str]:
    """What is read of *column*: all of it, or the fields of a struct that can hold an image."""
    kind = file.schema_arrow.field(column).type
    if _content(kind) != "images":
        return [column]
    return [f"{column}.{name}" for name in _fields(kind)]


def _batches(path: Path, column: str, rows: int, dictionary: bool = False) -> Iterator[Any]:
    """The cells of *column*, as pyarrow arrays of *rows* or fewer.

    Raises ``DataError`` where the file says that they unpack to much more than it has.
    """
    with _opened(path, [column] * dictionary) as file:
        leaves = _leaves(file, column)
        packed = path.stat().st_size
        most = max(ALWAYS_UNPACKED, MAX_RATIO * packed)
        for group in range(file.metadata.num_row_groups):
            # Of a whole group: where it is damaged, asking for a column's ends the process.
            unpacked = file.metadata.row_group(group).total_byte_size
            if not 0 <= unpacked <= most:
                raise DataError(
                    f"{path}: expected rows that unpack from its {packed:,} bytes to at most "
                    f"{most:,}, found that they are {unpacked:,}; write it without compression"
                )
            if rows <= IMAGE_ROWS:  # each cell may repeat one that is as large as all
                rows = min(rows, max(1, AT_ONCE // max(1, unpacked)))
        for batch in file.iter_batches(batch_size=rows, columns=leaves):
            yield batch.column(0)


def _columns(path: Path, config: DataConfig) -> tuple[str, str, tuple[str, ...]]:
    """Names of the image column and of the label column, and a note where there are others."""
    with _opened(path) as file:
        contents = _contents(file)
        for flag in ("image_column", "label_column"):
            name = getattr(config, flag)
            if name and name not in contents:
                raise DataError(
                    f"--{flag}: expected a column of {path}, found {name!r}; "
                    f"the columns are {shortened(contents, 40)}"
                )
        features = _features(path, file)
    image = config.image_column or _image_column(path, contents)
    label = config.label_column or _label_column(features, contents, image)
    _refuse_split_column(path, contents)
    if image == label:
        raise DataError(f"--label_column: expected another than the image column, found {label!r}")
    note = f"images: column {image} of {path.name}; classes: column {label}"
    others = [name for name in contents if name not in (image, label) and name[:2] != "__"]
    return image, label, (f"{note}; not used: {shortened(others)}",) if others else ()


def _refuse_split_column(path: Path, contents: Mapping[str, str]) -> None:
    for name, content in contents.items():
        if name.lower() in SPLIT_COLUMNS and content == "string" and not split_of(path.stem):
            batches = _batches(path, name, LABEL_ROWS, dictionary=True)
            if all(text and split_of(text) for cells in batches for text in _texts(cells)[0]):
                raise DataError(
                    f"{path}: expected a file for each split, found a column {name} that says "
                    "which; write train.parquet, test.parquet"
                )


def _image_column(path: Path, contents: Mapping[str, str]) -> str:
    def holds(content: str) -> list[str]:
        return [name for name, found in contents.items() if found == content]

    paths = (name for name in holds("string") if _has_image_paths(path, name))
    candidates = holds("images") or holds("binary") or list(paths)
    best = [name for name in candidates if name in IMAGES] or candidates
    return _only(best, contents, "image", "bytes, paths, or a struct of them")


def _has_image_paths(path: Path, column: str) -> bool:
    batch = next(_batches(path, column, IMAGE_ROWS), ())
    values = [value for cell in batch if (value := cell.as_py())]
    return bool(values) and all(Path(value).suffix.lower() in SUFFIXES for value in values)


def _label_column(
    features: Mapping[str, dict[str, Any]], contents: Mapping[str, str], image: str
) -> str:
    others = [name for name, found in contents.items() if name != image and found in HOLD_LABELS]
    named = [name for name in others if features.get(name, {}).get("_type") == "ClassLabel"]
    found = [name for name in others if name in LABELS] or named
    return _only(found, contents, "label", f"named {', '.join(LABELS)}, or a ClassLabel")


def _only(found: list[str], contents: Mapping[str, str], kind: str, meaning: str) -> str:
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{name} ({content})" for name, content in contents.items())
    shown = f"{' and '.join(found)}" if found else f"the columns {columns}"
    raise DataError(
        f"--dataset_dir: expected one {kind} column ({meaning}), found {shown}; "
        f"--{kind}_column says which"
    )


def _features(path: Path, file: Any) -> dict[str, dict[str, Any]]:
    """What the ``huggingface`` metadata says of each column."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    if len(text) > MAX_METADATA:
        expected = f"at most {MAX_METADATA:,} bytes of huggingface metadata"
        raise DataError(f"{path}: expected {expected}, found {len(text):,}")
    with decoding(str(path), "huggingface metadata in JSON"):
        features = json.loads(text).get("info", {}).get("features", {})
        return {name: value for name, value in features.items() if isinstance(value, dict)}


# --- labels ---------------------------------------------------------------------------------------


def _read_labels(path: Path, image: str, label: str, split: str) -> Labels:
    with _opened(path) as file:
        contents = _contents(file)
        if contents.get(image) not in ("images", "binary", "string"):
            _refuse_column(path, image, "images (bytes, paths, or a struct of them)", contents)
        if label not in contents and split != "train":  # as where labels are kept secret
            contents[label] = "null"
        if contents.get(label) not in HOLD_LABELS:
            _refuse_column(path, label, "integers, booleans or strings", contents)
        if contents[label] == "null":
            return Labels(path, "null", (), np.full(file.metadata.num_rows, -1))
        names = _features(path, file).get(label, {}).get("names") or []
    if contents[label] == "integers":
        names = _class_names(path, names)
        labels = _read_integers(path, label, len(names) or MAX_CLASSES)
        return Labels(path, "integers", names, labels)
    return Labels(path, contents[label], *_read_texts(path, label))


def _read_integers(path: Path, column: str, classes: int) -> np.ndarray:
    labels = [np.empty(0, np.int64)]
    row = 0
    for cells in _batches(path, column, LABEL_ROWS):
        absent = cells.is_null().to_numpy(zero_copy_only=False)
        values = np.array(cells.fill_null(0))
        if values.dtype.kind == "i":
            absent = absent | (values == -1)
        values[absent] = 0
        values = check_labels(values, classes, f"{path} row", row)
        values[absent] = -1
        labels.append(values)
        row += len(values)
    return np.concatenate(labels)


def _read_texts(path: Path, column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The different texts of a column, sorted, and for each row the number of its own."""
    known = {"": 0}
    labels = [np.empty(0, np.int64)]
    for cells in _batches(path, column, LABEL_ROWS, dictionary=True):
        texts, places = _texts(cells)
        numbers = np.array([known.setdefault(text, len(known)) for text in texts])
        if len(known) > MAX_CLASSES + 1:
            found = f"more in column {column}"
            raise DataError(f"{path}: expected at most {MAX_CLASSES:,} classes, found {found}")
        labels.append(numbers[places])
    names = tuple(sorted(known.keys() - {""}))
    number = {name: number for number, name in enumerate(names)} | {"": -1}
    numbers = np.array([number[name] for name in known], np.int64)
    return names, numbers[np.concatenate(labels)]


def _texts(cells: Any) -> tuple[list[str], np.ndarray]:
    """The different texts or booleans in an array, empty for none, and the place of each row's."""
    if not hasattr(cells, "dictionary"):
        cells = cells.dictionary_encode()
    used, places = np.unique(np.array(cells.indices.fill_null(-1)), return_inverse=True)
    values = [None if place < 0 else cells.dictionary[place].as_py() for place in used.tolist()]
    return ["" if value is None else normalize("NFC", str(value)) for value in values], places


def _refuse_column(path: Path, column: str, expected: str, contents: Mapping[str, str]) -> NoReturn:
    found = contents.get(column) or f"the columns {shortened(contents, 40)}"
    raise DataError(f"{path}: expected {expected} in a column {column}, found {found}")


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    """Names of classes from the metadata: a list, or a table by number."""
    with decoding(str(path), "names of classes in its metadata"):
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
        if not isinstance(names, list):
            raise TypeError(f"{type(names).__name__} instead of a list")
        names = [normalize("NFC", name) for name in names]
    if len(names) > MAX_CLASSES:
        raise DataError(f"{path}: expected at most {MAX_CLASSES:,} classes, found {len(names):,}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: expected other names for other classes, found {twice[0]!r} twice")
    return tuple(names)


# --- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetSplit:
    """The files of one split with their labels; images are read a few rows at a time.

    A path in a cell leads to a file in *root*, through whatever links lie there, and nowhere else.
    """

    files: tuple[tuple[Path, np.ndarray], ...]
    root: Path
    column: str

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self.files)

    def labels(self) -> np.ndarray:
        """int64 ``(N,)``."""
        return np.concatenate([labels for _, labels in self.files])

    def names(self) -> Iterator[str]:
        """The file and the row of each image."""
        return (f"{path} row {row}" for path, labels in self.files for row in range(len(labels)))

    def identity(self) -> list[str] | None:
        """What changes when an image does; ``None`` where the first lies in a file of its own."""
        if any(isinstance(example.source, Path) for example in islice(self, 1)):
            return None
        return [f"{self.column} in {file_state(path)}" for path, _ in self.files]

    def __iter__(self) -> Iterator[Example]:
        roots = tuple(dict.fromkeys((self.root.absolute(), self.root.resolve())))
        names = self.names()
        for path, labels in self.files:
            starts = tuple(dict.fromkeys((path.parent.absolute(), *roots)))
            with decoding(str(path), "an image and a label in each row"):
                pairs = zip(_images(path, self.column), labels.tolist(), strict=True)
                for cell, label in pairs:
                    name = next(names)
                    image = _file(name, cell, starts, roots) if isinstance(cell, str) else cell
                    yield Example(name, image or b"", label)


def _images(path: Path, column: str) -> Iterator[bytes | str | None]:
    """What each row has: the bytes of an image, else a path."""
    for cells in _batches(path, column, IMAGE_ROWS):
        parts = [cells]
        if hasattr(cells, "flatten"):  # a struct, whose fields come in the order of the file
            names = [field.name for field in cells.type]
            fields = dict(zip(names, cells.flatten(), strict=True))
            parts = [fields[name] for name in ("bytes", "path") if name in fields]
        for row in zip(*(part.to_pylist() for part in parts), strict=True):
            yield next(filter(None, row), None)


def _file(
    name: str, content: str, starts: tuple[Path, ...], roots: tuple[Path, ...]
) -> Path | bytes:
    """The file in *roots*, names of one folder, that a path leads to; no bytes for what is none.

    Raises ``DataError`` where it leads out of them, whatever is there.
    """
    inside = []
    for start, root in product(starts, roots):
        with suppress(ValueError):  # another drive
            inner = Path(os.path.relpath(start / content, root))
            if inner.parts[:1] != (os.pardir,):
                inside.append(root / inner)
    if not inside:
        raise DataError(
            f"{name}: expected the path of an image in {roots[0]}, found {content!r}; "
            "--dataset_dir names the folder that holds the table and its images"
        )
    for path in inside:
        with suppress(OSError, ValueError):  # no name that a file can have
            if path.is_file():
                return path
            if path.exists():  # a folder, or a device that never ends
                return b""
    return inside[0]
