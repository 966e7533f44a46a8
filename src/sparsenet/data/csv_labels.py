"""Images in a folder, with a CSV file that says which class each has."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source
from sparsenet.data.errors import DataError, decoding, shortened
from sparsenet.data.splits import SPLIT_COLUMNS, SPLITS, split_of
from sparsenet.data.tree import list_folder
from sparsenet.files import user_path

# Of a table. The 1.3 million lines of ImageNet have 50 MB, and a cell takes a hundred bytes.
MAX_BYTES, MAX_CELLS, MAX_COLUMNS = 1 << 28, 1 << 24, 10_000
DELIMITERS = ",;\t"
EXCELS_LINE = re.compile(r'\A"?sep=."?(?=\r?\n)')
LABELS = ("label", "labels", "class", "category", "target", "breed", "species", "diagnosis", "dx")


def read_csv_labels(root: Path, config: DataConfig) -> Source | None:
    """The images below *root* that the file ``labels`` of *config* names, with their classes.

    A column names images by their path from *root*, by their name, or by either without suffix.
    Another has their classes, or several columns have a 1 for one of them and a 0 for the others.
    A column ``split`` says which are ``train``, ``val`` and ``test``. Raises ``DataError`` naming
    file and line; images without a line are counted in the notes.
    """
    if not config.labels:
        if config.dataset == "csv":
            raise DataError("--labels: expected a CSV file with --dataset csv, found none given")
        return None
    if not root.is_dir():
        raise DataError(f"--dataset_dir: expected the folder of the images, found the file {root}")
    table = _read_table(user_path(config.labels), root)
    images = _Images(root)
    image, same = _image_column(table, images, config)
    split, splits = _split_column(table, {image, *same, config.label_column})
    taken = {"", image, split, *same}
    others = [name for name in table.columns if name not in taken]
    label, labels = _labels(table, others, config.label_column)
    notes = [_used_columns(table, image, label, split)]
    paths = images.find_all(table, image)
    rows, more = _rows(table, image, paths, labels, splits, config.skip_corrupt)
    notes += more
    if rest := len(images.paths) - len(rows):
        notes.append(f"left out: {rest} images without a line in {table.path.name}")
    classes = tuple(sorted({row.label for row in rows}))
    number = {name: number for number, name in enumerate(classes)}
    examples: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for row in rows:
        examples[row.split].append(Example(str(row.path), row.path, number[row.label]))
    found = {name: part for name, part in examples.items() if part}
    return Source(root.resolve().name, classes, 3, found, tuple(notes), is_table=True)


def _used_columns(table: _Table, image: str, label: str, split: str) -> str:
    """A line that says what was taken from which column."""
    splits = f", splits from {split}" if split else ""
    used = f"{table.path.name}: images from column {image}, classes from {label}{splits}"
    others = [name for name in table.columns if name and name not in {image, label, split}]
    return used if not others or ", " in label else f"{used}; not used: {shortened(others)}"


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """The cells of each column, and the lines of the file that the rows end in."""

    path: Path
    columns: Mapping[str, list[str]]
    lines: list[int]

    def where(self, row: int) -> str:
        return f"{self.path} line {self.lines[row]}"

    def column(self, flag: str, name: str) -> str:
        if name not in self.columns:
            found = f"found {name!r}; the columns are {', '.join(self.columns)}"
            raise DataError(f"--{flag}: expected a column of {self.path}, {found}")
        return name


def _read_table(path: Path, root: Path) -> _Table:
    if not path.is_file():
        hint = f"; --labels {root / path.name}?" if (root / path.name).is_file() else ""
        raise DataError(f"--labels: expected a CSV file, found none at {path.absolute()}{hint}")
    _check_count(path, path.stat().st_size, MAX_BYTES, "bytes")
    content = path.read_bytes()
    try:
        text = normalize("NFC", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: expected text in UTF-8, found the byte "
            f"0x{content[error.start]:02x}; save it as CSV in UTF-8"
        ) from None
    text = EXCELS_LINE.sub("", text)  # without its end, so that lines keep their numbers
    with decoding(str(path), "a CSV file", csv.Error):
        first = text.lstrip().partition("\n")[0]
        for sign in DELIMITERS:
            _check_count(path, first.count(sign) + 1, MAX_COLUMNS, "columns")
        widths = {sign: len(next(csv.reader([first], delimiter=sign))) for sign in DELIMITERS}
        delimiter = max(widths, key=lambda sign: widths[sign])
        cells = text.count(delimiter) + text.count("\n") + 1  # and those in quotes
        _check_count(path, cells, MAX_CELLS, "cells")
        rows = list(_cells(text, delimiter))
    header = rows.pop(0)[1] if rows else []
    _check_table(path, header, rows)
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(header)}
    return _Table(path, columns, [line for line, _ in rows])


def _check_count(path: Path, count: int, most: int, kind: str) -> None:
    if count > most:
        raise DataError(f"{path}: expected at most {most:,} {kind} in a table, found {count:,}")


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that has some, and the line in which it ends."""
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield reader.line_num, cells


def _check_table(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> None:
    if len(header) < 2 or not rows:
        expected = "a header, and lines of an image and its class"
        found = f"{len(header)} columns and {len(rows)} lines below the header"
        raise DataError(f"{path}: expected {expected}, found {found}")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: expected other names for other columns, found {twice[0]!r} twice")
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path} line {line}: expected {len(header)} cells, found {len(row)}")


# --- which files ----------------------------------------------------------------------------------


class _Images:
    """The images below a folder, by what a table may call them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = list_folder(root).images
        # By path and by name, then the same without suffix: the first that has a name counts.
        self.names = [defaultdict[str, list[Path]](list) for _ in range(4)]
        for path in self.paths:
            inner = path.relative_to(root)
            keys = (inner.as_posix(), inner.name, inner.with_suffix("").as_posix(), inner.stem)
            for names, key in zip(self.names, keys, strict=True):
                names[normalize("NFC", key)].append(path)

    def find(self, name: str) -> list[Path]:
        """The images that *name* may be; more than one where it does not say which."""
        name = name.replace("\\", "/").removeprefix("./")
        return next((names[name] for names in self.names if name in names), [])

    def find_all(self, table: _Table, column: str) -> list[Path | None]:
        """The image of each row, or ``None``; ``DataError`` where a name stands for several."""
        found: list[Path | None] = []
        for row, name in enumerate(table.columns[column]):
            paths = self.find(name)
            if len(paths) > 1:
                raise DataError(
                    f"{table.where(row)}: expected the name of one image, found {name!r} for "
                    f"{', '.join(map(str, paths[:4]))}; --dataset_dir can name the folder of one"
                )
            found.append(paths[0] if paths else None)
        return found


def _image_column(table: _Table, images: _Images, config: DataConfig) -> tuple[str, set[str]]:
    """The column that names images, and others that name the same ones."""
    if config.image_column:
        return table.column("image_column", config.image_column), set()
    for name in table.columns:
        if "." in name and images.find(name):
            raise DataError(f"{table.path} line 1: expected names of columns, found image {name!r}")
    found = {}
    for name, cells in table.columns.items():
        if name and name != config.label_column:
            named = {cell: tuple(images.find(cell)) for cell in set(cells)}
            found[name] = [named[cell] for cell in cells]
    counts = {name: len({paths for paths in column if paths}) for name, column in found.items()}
    best = max(counts, key=lambda name: counts[name], default="")
    if not images.paths:
        raise DataError(f"--dataset_dir: expected images in {images.root}, found none")
    if not counts.get(best):
        expected = f"a column that names the {len(images.paths)} images below {images.root}"
        raise DataError(f"{table.path}: expected {expected}, found {_quoted(table.columns)}")
    rivals = {name for name, count in counts.items() if count and 2 * count > counts[best]} - {best}
    if any(found[name] != found[best] for name in rivals):
        raise DataError(
            f"{table.path}: expected one column that names images, found "
            f"{_quoted(sorted(rivals | {best}))}; --image_column says which"
        )
    return best, rivals


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# --- labels ---------------------------------------------------------------------------------------


def _split_column(table: _Table, taken: set[str]) -> tuple[str, list[str]]:
    """The column of splits, and the split of each row: ``train`` where there is no such column."""
    for name, cells in table.columns.items():
        if name.lower() in SPLIT_COLUMNS and name not in taken:
            meanings = [split_of(cell) for cell in cells]
            if all(meanings):
                return name, [meaning[0] for meaning in meanings if meaning]
            row = meanings.index(None)
            expected = f"train, val or test in column {name}"
            raise DataError(
                f"{table.where(row)}: expected {expected}, found {cells[row]!r}; another name of "
                "the column has it passed over"
            )
    return "", ["train"] * len(table.lines)


def _labels(table: _Table, others: list[str], stated: str) -> tuple[str, list[str]]:
    """The name of the label column and the class of each row."""
    usual = [name for name in others if name.lower() in LABELS]
    if stated:
        label = table.column("label_column", stated)
    elif len(others) == 1 or len(usual) == 1:
        label = (usual or others)[0]
    elif not usual and (hot := _hot_columns(table, others)):
        return f"the 1 in {', '.join(others)}", hot
    else:
        found = _quoted(usual or others) or "none beside that of the images"
        raise DataError(
            f"{table.path}: expected one column of classes, found {found}; "
            "--label_column says which"
        )
    cells = table.columns[label]
    if label not in others:
        raise DataError(
            f"--label_column: expected another than that of the images, found {label!r}"
        )
    if "" in cells:
        where = table.where(cells.index(""))
        raise DataError(f"{where}: expected a class in column {label}, found none")
    return label, cells


def _hot_columns(table: _Table, columns: list[str]) -> list[str]:
    """Which of *columns* has the 1 in each row; nothing where not every row has one 1 and zeros."""
    rows = list(zip(*(table.columns[name] for name in columns), strict=True))
    ones = [[cell in ("1", "1.0") for cell in cells] for cells in rows]
    zeros = [[cell in ("0", "0.0") for cell in cells] for cells in rows]
    if any(
        sum(one) != 1 or sum(zero) != len(columns) - 1
        for one, zero in zip(ones, zeros, strict=True)
    ):
        return []
    return [columns[one.index(True)] for one in ones]


# --- rows -----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    path: Path
    label: str
    split: str


def _rows(
    table: _Table,
    image: str,
    found: list[Path | None],
    labels: list[str],
    splits: list[str],
    skip: bool,
) -> tuple[list[_Row], list[str]]:
    """The image, class and split of each row, each image once, and notes on those left out."""
    missing = [row for row, path in enumerate(found) if path is None]
    if missing and (not skip or len(missing) == len(found)):
        names = "names none" if len(missing) == 1 else f"and {len(missing) - 1} others name none"
        raise DataError(
            f"{table.where(missing[0])}: expected an image below --dataset_dir, found that "
            f"{table.columns[image][missing[0]]!r} {names}; --skip_corrupt leaves such lines out"
        )
    first: dict[Path, int] = {}
    for row, path in enumerate(found):
        if path is None:
            continue
        before = first.setdefault(path, row)
        if (labels[row], splits[row]) != (labels[before], splits[before]):
            first_said, now_said = (
                f"{labels[each]!r}" + f" in {splits[each]}" * (splits[before] != splits[row])
                for each in (before, row)
            )
            raise DataError(
                f"{table.where(row)}: expected {first_said} for {path} as in line "
                f"{table.lines[before]}, found {now_said}"
            )
    notes = []
    if missing:
        lines = f"{len(missing)} line{'s' * (len(missing) != 1)}"
        notes.append(f"left out: {lines} of {table.path.name} whose image is missing")
    if repeated := len(found) - len(missing) - len(first):
        notes.append(f"lines of {table.path.name} that repeat another: {repeated}, taken once")
    return [_Row(path, labels[row], splits[row]) for path, row in first.items()], notes
