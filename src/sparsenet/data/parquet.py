"""Parquet files as the Hugging Face hub has them, and as other programs write them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import normalize

import numpy as np

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source, check_labels
from sparsenet.data.errors import DataError, decoding, shortened
from sparsenet.data.splits import SPLIT_COLUMNS, SPLITS, find_splits, split_of
from sparsenet.data.tree import SUFFIXES, is_folder, is_visible, list_folder
from sparsenet.extras import require

IMAGES = ("image", "img")  # the column that is meant where several hold images
LABELS = ("label", "labels", "fine_label", "class", "category", "target")
HOLD_LABELS = ("integers", "bool", "string", "null")  # what cells of a label column may hold
MAX_CLASSES = 1 << 16  # where the classes have no names
# What ends the name of one of several files: train-00000-of-00002-a09b74b3ef9c3b56, train_1.
PART = re.compile(r"[-_. ]?\d+(-of-\d+)?(-[0-9a-f]{8,})?$")


def read_parquet(root: Path, config: DataConfig) -> Source | None:
    """The splits in *root*: a file, or a folder as the hub has them.

    A file is that file alone, as ``train``, and so are files whose names say no split. Images are
    bytes, or paths from the folder of their file or from *root*. Labels are integers, of which the
    ``huggingface`` metadata may have the names, booleans or strings. Files that number the same
    names otherwise are brought to one order. Raises ``DataError`` naming file, column or row.
    """
    files = _find_files(root)
    if not files:
        return None
    image, label, notes = _columns(next(iter(files.values()))[0], config)
    notes += (*_left_out(root, files), *_missing_parts(files))
    columns: dict[str, list[Labels]] = {}
    for split, paths in files.items():
        columns[split] = [_read_labels(path, image, label, split) for path in paths]
        if not _have_labels(split, columns[split]):
            count = sum(len(column.labels) for column in columns.pop(split))
            notes += (f"{split}: {count} images without labels, left out",)
    if not columns:
        raise DataError(f"--dataset_dir: expected images with labels in {root}, found none")
    classes, more = _classes(columns)
    splits = {
        split: ParquetSplit(tuple(files[split]), root, image, _numbers(parts, classes))
        for split, parts in columns.items()
    }
    name = root.resolve()
    title = name.stem if root.is_file() else name.name
    return Source(title, classes, 3, splits, notes + more, is_table=True)


# --- which files ----------------------------------------------------------------------------------


def _find_files(root: Path) -> dict[str, list[Path]]:
    """The files of each split, in the order of ``SPLITS``; nothing where there are none."""
    if not root.is_dir():
        return {"train": [root]} if _is_parquet(root) else {}
    for folder in (root, root / "data"):
        entries = _entries(folder)
        plain = [path for name, paths in entries.items() if name[-1:] != "/" for path in paths]
        if found := _splits(folder, entries) or ({"train": sorted(plain)} if plain else {}):
            return found
    folders = _look_into(root)[1]
    configs = {path: found for path in folders if (found := _splits(path, _entries(path)))}
    if len(configs) > 1:
        names = ", ".join(path.name for path in configs)
        raise DataError(
            f"--dataset_dir: expected one data set in {root}, found {names}; "
            f"--dataset_dir {next(iter(configs))} takes the first"
        )
    return next(iter(configs.values()), {})


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" and is_visible(path.name) and path.is_file()


def _look_into(folder: Path) -> tuple[list[Path], list[Path]]:
    """The parquet files and the folders straight in *folder*, which may hold many others; sorted.

    There are none where it may not be read, which other readers report.
    """
    files, folders = [], []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(".parquet") and _is_parquet(folder / entry.name):
                files.append(folder / entry.name)
            elif is_visible(entry.name) and is_folder(entry):
                folders.append(folder / entry.name)
    return sorted(files), sorted(folders)


def _entries(folder: Path) -> dict[str, list[Path]]:
    """The parquet files in *folder* by their names without numbers, and in folders, as ``NAME/``"""
    entries: dict[str, list[Path]] = {}
    files, folders = _look_into(folder)
    for path in files:
        entries.setdefault(PART.sub("", path.stem), []).append(path)
    entries |= {f"{path.name}/": _look_into(path)[0] for path in folders}
    return {name: files for name, files in entries.items() if files}


def _splits(folder: Path, entries: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    names = find_splits(entries, f"--dataset_dir {folder}", "name")
    for split, name in names.items():
        for path in entries[name]:
            meaning = split_of(path.stem)
            if meaning and meaning[0] != split:
                raise DataError(
                    f"--dataset_dir: expected the files of {split} in {path.parent}, found "
                    f"{path.name}; --dataset_dir {path.parent} takes the splits in it"
                )
    return {split: entries[names[split]] for split in SPLITS if split in names}


def _left_out(root: Path, files: Mapping[str, list[Path]]) -> tuple[str, ...]:
    if root.is_file():
        return ()
    used = {path for paths in files.values() for path in paths}
    others = [path for path in list_folder(root).others if _is_parquet(path) and path not in used]
    if not others:
        return ()
    names = shortened(path.relative_to(root).as_posix() for path in others)
    count = f"{len(others)} parquet file{'s' * (len(others) > 1)}"
    return (f"{count} beside those of {' and '.join(files)} left out: {names}",)


def _missing_parts(files: Mapping[str, list[Path]]) -> Iterator[str]:
    """Lines about files whose names say that there are more of them than there are."""
    for split, paths in files.items():
        parts = [found for path in paths if (found := re.search(r"-of-0*(\d+)", path.stem))]
        if parts and len(parts) < (total := int(parts[0][1])):
            yield f"warning: {split} has {len(parts)} of {total} files, as their names say"


# --- which columns --------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "train")
    with decoding(str(path), "a parquet file"), parquet.ParquetFile(path) as file:
        yield file


def _content(kind: Any) -> str:
    """What the cells of a pyarrow type hold: ``integers``, ``string``, ``bool``, ``binary``, …"""
    types = require("pyarrow.types", "train")
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind) and {"bytes", "path"} & {kind.field(i).name for i in range(len(kind))}:
        return "images"
    if types.is_integer(kind):
        return "integers"
    return str(kind).removeprefix("large_").removesuffix("_view")


def _columns(path: Path, config: DataConfig) -> tuple[str, str, tuple[str, ...]]:
    """Names of the image column and of the label column, and a note where there are others."""
    with _opened(path) as file:
        schema = file.schema_arrow
        contents = dict(zip(schema.names, map(_content, schema.types), strict=True))
        for flag in ("image_column", "label_column"):
            name = getattr(config, flag)
            if name and name not in contents:
                raise DataError(
                    f"--{flag}: expected a column of {path}, found {name!r}; "
                    f"the columns are {shortened(contents, 40)}"
                )
        image = config.image_column or _image_column(file, contents)
        features = _features(path, file)
        label = config.label_column or _label_column(features, contents, image)
        _refuse_split_column(path, file, contents)
    if image == label:
        raise DataError(f"--label_column: expected another than the image column, found {label!r}")
    note = f"images: column {image} of {path.name}; classes: column {label}"
    others = [name for name in contents if name not in (image, label) and name[:2] != "__"]
    return image, label, (f"{note}; not used: {shortened(others)}",) if others else ()


def _refuse_split_column(path: Path, file: Any, contents: Mapping[str, str]) -> None:
    for name, content in contents.items():
        if name.lower() in SPLIT_COLUMNS and content == "string" and not split_of(path.stem):
            cells = set(file.read(columns=[name]).column(name).to_pylist())
            if all(cell and split_of(cell) for cell in cells):
                raise DataError(
                    f"{path}: expected a file for each split, found a column {name} that says "
                    "which; write train.parquet, test.parquet"
                )


def _image_column(file: Any, contents: Mapping[str, str]) -> str:
    def holds(content: str) -> list[str]:
        return [name for name, found in contents.items() if found == content]

    paths = (name for name in holds("string") if _has_image_paths(file, name))
    candidates = holds("images") or holds("binary") or list(paths)
    best = [name for name in candidates if name in IMAGES] or candidates
    return _only(best, contents, "image", "bytes, paths, or a struct of them")


def _has_image_paths(file: Any, column: str) -> bool:
    batch = next(file.iter_batches(batch_size=64, columns=[column]), None)
    values = [value for value in batch.column(0).to_pylist() if value] if batch else []
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
    with decoding(str(path), "huggingface metadata in JSON"):
        metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        return {name: value for name, value in features.items() if isinstance(value, dict)}


# --- labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The labels of a file: int64 ``(N,)``, numbers in *names* where it has some, -1 for none."""

    path: Path
    content: str
    names: tuple[str, ...]
    labels: np.ndarray


def _read_labels(path: Path, image: str, label: str, split: str) -> Labels:
    with _opened(path) as file:
        schema = file.schema_arrow
        contents = dict(zip(schema.names, map(_content, schema.types), strict=True))
        if contents.get(image) not in ("images", "binary", "string"):
            _refuse_column(path, image, "images (bytes, paths, or a struct of them)", contents)
        if label not in contents and split != "train":  # as where labels are kept secret
            return Labels(path, "null", (), np.full(file.metadata.num_rows, -1))
        if contents.get(label) not in HOLD_LABELS:
            _refuse_column(path, label, "integers, booleans or strings", contents)
        cells = file.read(columns=[label]).column(label).to_pylist()
        if contents[label] == "integers":
            names = _class_names(path, _features(path, file).get(label, {}).get("names") or [])
            known = np.array([0 if cell in (None, -1) else cell for cell in cells], object)
            labels = check_labels(known, len(names) or MAX_CLASSES, f"{path} row")
            labels[[cell in (None, -1) for cell in cells]] = -1
            return Labels(path, contents[label], names, labels)
    texts = ["" if cell is None else normalize("NFC", str(cell)) for cell in cells]
    names = tuple(sorted(set(texts) - {""}))
    number = {name: number for number, name in enumerate(names)} | {"": -1}
    return Labels(path, contents[label], names, np.array([number[t] for t in texts], np.int64))


def _refuse_column(path: Path, column: str, expected: str, contents: Mapping[str, str]) -> NoReturn:
    found = contents.get(column) or f"the columns {shortened(contents, 40)}"
    raise DataError(f"{path}: expected {expected} in a column {column}, found {found}")


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    """Names of classes from the metadata: a list, or a table by number."""
    with decoding(str(path), "names of classes in its metadata"):
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
        names = [normalize("NFC", name) for name in names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: expected other names for other classes, found {twice[0]!r} twice")
    return tuple(names)


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


def _classes(columns: Mapping[str, list[Labels]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
        largest = max(int(part.labels.max(initial=0)) for _, part in parts)
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


def _numbers(parts: list[Labels], classes: tuple[str, ...]) -> np.ndarray:
    """The labels of a split as numbers in *classes*, int64 ``(N,)``."""
    number = {name: number for number, name in enumerate(classes)}
    labels = []
    for part in parts:
        if part.names:
            labels.append(np.array([number[name] for name in part.names], np.int64)[part.labels])
        else:
            labels.append(check_labels(part.labels, len(classes), f"{part.path} row"))
    return np.concatenate(labels)


# --- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetSplit:
    """The files of one split; images are read record batch by record batch."""

    paths: tuple[Path, ...]
    root: Path  # of paths in cells that do not lead from the folder of their file
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
                        source = _source(cell, (path.parent, self.root))
                        yield Example(f"{path} row {row}", source, next(labels))
                        row += 1


def _source(cell: Any, folders: tuple[Path, ...]) -> Path | bytes:
    """The bytes in a cell, else the file that its path leads to; no bytes where it has neither."""
    fields = cell if isinstance(cell, dict) else {"bytes": cell}
    content = fields.get("bytes") or fields.get("path")
    if not isinstance(content, str):
        return content if isinstance(content, bytes) else b""
    for path in (folder / content for folder in folders):
        with suppress(OSError, ValueError):  # no name that a file can have
            if path.is_file():
                return path
            if path.exists():  # a folder, or a device that never ends
                return b""
    return folders[0] / content
