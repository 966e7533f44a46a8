"""The tables and pictures of README.md, from the records in results/.

    python -m benchmarks.readme_tables [--pictures] PAGE...

A table of a Markdown page stands between ``<!-- report FOLDER... -->`` and ``<!-- /report -->``;
folders are relative to the page and may be globs. Besides the runs in these folders, which are
those of ``sparsenet report``, a table has the rows of ``published.json``, which others measured,
and the seconds of a training step from ``bench.json``, which ``python -m benchmarks.bench`` writes.
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

from sparsenet.files import read_json, write_atomic
from sparsenet.pictures.comparison import COSTS, draw_comparison
from sparsenet.records import Environment, read_summaries, run_folders
from sparsenet.summary import HEADINGS, RunSummary, format_seconds, markdown_table

BENCH, PUBLISHED = "bench.json", "published.json"
TABLE = re.compile(
    r"(<!-- report (?P<runs>[^\n]*?) -->\n)(?:(?!<!-- report ).)*?(<!-- /report -->)", re.DOTALL
)
STEP = ("step_seconds", "training step, benchmarked (s)")
COLUMNS = list(HEADINGS.items())
COLUMNS.insert(list(HEADINGS).index("duration"), STEP)
# What a run and a row of the benchmark must agree in: folder, machine, batch and image size.
Workload = tuple[str, str | None, int | None, int | None]


@dataclass(frozen=True)
class PublishedRow:
    """What others measured; texts stand in the table as they are."""

    error: float | None = None
    platform: str = ""
    architecture: str = ""
    depth: int | str = ""
    growth: str = ""
    parameters: str = ""
    macs: str = ""
    dataset: str = ""
    train_seconds: str = ""
    test_seconds: str = ""
    recipe: str = ""

    def cells(self) -> dict[str, str]:
        texts = {key: str(value) for key, value in dataclasses.asdict(self).items()}
        error = "" if self.error is None else f"{self.error:.2f}"
        return texts | {"platform": f"*published:* {self.platform}", "error": error}


@dataclass(frozen=True)
class Published:
    published: list[PublishedRow]


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
        return super().cells() | {"step_seconds": format_seconds(self.step_seconds)}


def read_published(paths: Sequence[Path]) -> list[PublishedRow]:
    """Returns the rows of all files ``published.json`` in *paths*, each row once, best first."""
    rows: list[PublishedRow] = []
    for path in paths:
        files = [path] if path.suffix == ".json" else sorted(path.rglob(PUBLISHED))
        rows += [row for file in files for row in read_json(file, Published).published]
    return sorted(dict.fromkeys(rows), key=lambda row: (row.error is None, row.error or 0.0))


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


def table(paths: Sequence[Path]) -> str:
    """Returns the Markdown table of what lies in *paths*; ``ValueError`` where one has nothing."""
    for path in paths:
        records = any(path.rglob(BENCH)) or any(path.rglob(PUBLISHED))
        if not (records or run_folders(path) or path.is_file()):
            raise ValueError(f"{path}: expected a run folder or records, found none")
    rows = [row.cells() for row in read_published(paths)]
    rows += [row.cells() for row in read_runs(paths)]
    return markdown_table(rows, dict(COLUMNS))


def update(page: Path) -> int:
    """Writes the tables of a *page* anew, and returns how many there are. Raises ``ValueError``."""
    text = _read(page)
    updated, count = TABLE.subn(
        lambda match: f"{match[1]}\n{table(_paths(page, match['runs']))}\n{match[3]}", text
    )
    if not count:
        expected = "a table between <!-- report RUN... --> and <!-- /report -->"
        raise ValueError(f"{page}: expected {expected}, found none")
    write_atomic(page, updated)
    return count


def draw(page: Path) -> Iterator[Path]:
    """Draws ``FOLDER-comparison.png`` for each table of a *page* that also shows it."""
    text = _read(page)
    for match in TABLE.finditer(text):
        picture = f"{match['runs']}-comparison.png"
        if f"]({picture})" in text:
            costs = {**COSTS, "step_seconds": ("a training step, benchmarked (ms)", 1e-3)}
            draw_comparison(read_runs(_paths(page, match["runs"])), page.parent / picture, costs)
            yield page.parent / picture


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page}: expected a page of text, found: {error}") from None


def _paths(page: Path, runs: str) -> list[Path]:
    paths: list[Path] = []
    for pattern in split(runs):
        matches = [] if Path(pattern).is_absolute() else sorted(page.parent.glob(pattern))
        paths += matches or [page.parent / pattern]
    return paths


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
