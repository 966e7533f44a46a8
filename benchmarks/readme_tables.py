"""The tables and pictures of README.md and docs/results.md, from the records in results/.

    python -m benchmarks.readme_tables [--pictures] PAGE...

A table of a Markdown page stands between ``<!-- report FOLDER... [OPTION...] -->`` and
``<!-- /report -->``; folders are relative to the page and may be globs. Its rows are those of
``sparsenet report``; where a record of ``python -m benchmarks.bench`` lies among the runs, they
have the seconds of a training step from it. The options are ``columns=KEY,...``, by default all
that have values, and ``picture=FILE``, where ``--pictures`` draws error against costs.

Between ``<!-- defaults PATH... -->`` and ``<!-- /defaults -->`` stands the table of the records of
``python -m benchmarks.defaults`` on one data set: files, folders or globs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from statistics import fmean

from benchmarks.defaults import record as defaults
from sparsenet.files import read_json, write_atomic
from sparsenet.pictures.comparison import COSTS, draw_comparison
from sparsenet.records import Environment, read_summaries, run_folders
from sparsenet.summary import HEADINGS, RunSummary, format_seconds, markdown_table

BENCH = "bench.json"
TABLE = re.compile(
    r"(<!-- (report|defaults) ([^\n]*?) -->\n)(?:(?!<!-- (?:report|defaults) ).)*?(<!-- /\2 -->)",
    re.DOTALL,
)
STEP = {"step_seconds": "training step, benchmarked (s)"}
COLUMNS = {"network": "network", "epochs": "epochs", **HEADINGS, **STEP}
# What a run and a row of the benchmark must agree in: folder, machine, batch and image size.
Workload = tuple[str, str | None, int | None, int | None]


@dataclass(frozen=True)
class Spread:
    median: float


@dataclass(frozen=True)
class BenchRow:
    model: str
    batch_size: int
    image_size: int
    precision: str
    options: tuple[str, ...] = ()
    train_seconds: Spread | None = None


@dataclass(frozen=True)
class BenchRecord:
    environment: Environment
    rows: tuple[BenchRow, ...] = ()


@dataclass(frozen=True)
class BenchmarkedSummary(RunSummary):
    """Runs with the seconds of a training step, the mean over those that were benchmarked."""

    step_seconds: float | None

    def cells(self) -> dict[str, str]:
        texts = super().cells()
        texts["network"] = f"{self.architecture}-{self.depth}-{self.growth}"
        texts["epochs"] = str(max(len(run.metrics) for run in self.runs))
        texts["step_seconds"] = format_seconds(self.step_seconds)
        return texts


def read_steps(paths: Sequence[Path]) -> dict[Workload, float]:
    """Returns the seconds of a training step, of the fastest implementation without options."""
    steps: dict[Workload, float] = {}
    for file in sorted(file for path in paths for file in path.rglob(BENCH)):
        record = read_json(file, BenchRecord)
        for row in record.rows:
            if row.train_seconds and not row.options:
                machine = record.environment.machine(row.precision)
                work = (Path(row.model).name, machine, row.batch_size, row.image_size)
                steps[work] = min(row.train_seconds.median, steps.get(work, math.inf))
    return steps


def read_runs(paths: Sequence[Path]) -> list[BenchmarkedSummary]:
    """Returns the rows of the runs in *paths*, the best first."""
    steps = read_steps(paths)
    rows = []
    for row in read_summaries(path for path in paths if run_folders(path)):
        setup = row.machine, row.batch_size, row.image_size
        work = [(run.path.name, *setup) for run in row.runs]
        seconds = [steps[each] for each in work if each in steps]
        fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        rows.append(BenchmarkedSummary(**fields, step_seconds=fmean(seconds) if seconds else None))
    return rows


@dataclass(frozen=True)
class Marker:
    """What ``<!-- report ... -->`` asks for."""

    paths: tuple[Path, ...]
    columns: tuple[str, ...] = ()
    picture: Path | None = None

    @classmethod
    def parse(cls, page: Path, text: str) -> Marker:
        paths: list[Path] = []
        columns: tuple[str, ...] = ()
        picture = None
        for word in split(text):
            option, _, value = word.partition("=")
            if option == "columns":
                columns = tuple(value.split(","))
            elif option == "picture":
                picture = page.parent / value
            else:
                paths += _paths(page, word)
        if unknown := [key for key in columns if key not in COLUMNS]:
            expected = f"columns of {', '.join(COLUMNS)}"
            raise ValueError(f"{page}: expected {expected}, found {unknown[0]!r}")
        return cls(tuple(paths), columns, picture)


def table(marker: Marker) -> str:
    """Returns the Markdown table of runs; ``ValueError`` where a path has none."""
    for path in marker.paths:
        if not run_folders(path) and not any(path.rglob(BENCH)):
            raise ValueError(f"{path}: expected a run folder or records, found none")
    rows = [row.cells() for row in read_runs(marker.paths)]
    headings = {key: COLUMNS[key] for key in marker.columns or [*HEADINGS, *STEP]}
    return markdown_table(rows, headings)


def _paths(page: Path, word: str) -> list[Path]:
    """What a *word* of a marker names: a path relative to the *page*, or a glob."""
    matches = [] if Path(word).is_absolute() else sorted(page.parent.glob(word))
    return matches or [page.parent / word]


def _content(page: Path, kind: str, text: str) -> str:
    """The table that a marker of a *kind* asks for by its *text*."""
    if kind == "report":
        return table(Marker.parse(page, text))
    paths = [path for word in split(text) for path in _paths(page, word)]
    return defaults.table(defaults.read_trials(paths))


def update(page: Path) -> int:
    """Writes the tables of a *page* anew, and return how many there are. Raises ``ValueError``."""
    updated, count = TABLE.subn(
        lambda match: f"{match[1]}\n{_content(page, match[2], match[3])}\n{match[4]}", _read(page)
    )
    if not count:
        expected = "a table between <!-- report RUN... --> and <!-- /report -->"
        raise ValueError(f"{page}: expected {expected}, found none")
    write_atomic(page, updated)
    return count


def draw(page: Path) -> Iterator[Path]:
    """Draws the pictures that the tables of a *page* name, and yield their files."""
    costs = {**COSTS, "step_seconds": ("a training step, benchmarked (ms)", 1e-3)}
    for match in TABLE.finditer(_read(page)):
        marker = Marker.parse(page, match[3]) if match[2] == "report" else None
        if marker and marker.picture:
            draw_comparison(read_runs(marker.paths), marker.picture, costs)
            yield marker.picture


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page}: expected a page of text, found: {error}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.readme_tables", description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--pictures", action="store_true", help="also draw the comparisons anew")
    args = parser.parse_args(arguments)
    try:
        for page in args.pages:
            count = update(page)
            print(f"{page}: {count} table{'' if count == 1 else 's'} written anew")
            for picture in draw(page) if args.pictures else ():
                print(picture)
    except ValueError as error:
        sys.exit(f"readme_tables: {error}")


if __name__ == "__main__":
    main()
