"""One self-contained HTML page that compares runs, from what lies in their folders."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count, cycle
from pathlib import Path
from shlex import quote

from sparsenet import __version__
from sparsenet.extras import MissingExtra
from sparsenet.files import behind_link, write_atomic
from sparsenet.pictures.comparison import TITLE, draw_comparison, draw_errors, error_points
from sparsenet.pictures.figure import render, series
from sparsenet.records import read_summaries
from sparsenet.run import Run
from sparsenet.summary import HEADINGS, NO_VALUE, RunSummary, used_columns

PICTURES = {
    "curves.png": "Loss and error",
    "confusion.png": "Confusion matrix",
    "reliability.png": "How sure and how right",
    "samples.png": "Most confident mistakes",
    "graph.svg": "Network",
    "filters.png": "How strongly layers weigh their sources",
}
WIDE = ("curves.png", "graph.svg", "filters.png")
ON_DEMAND = ("filters.png", "reliability.png")  # not asked for, or not drawn by older versions
TEXTS = {
    "config.json": "Command and configuration",
    "environment.json": "Environment",
    "result.json": "Result",
}
# How a page begins, and the picture beside one.
BEGINNINGS = (b"<title>SparseNet runs</title>", b"tEXtTitle\0" + TITLE.encode())
MOST_TEXT = 2**20  # characters that are shown of a file
COMPARISON = "-comparison.png"  # beside a page: the end of its picture's name
EXPECTED = (*TEXTS, "graph.json", "metrics.csv", *PICTURES)


@dataclass(frozen=True)
class Figure:
    """A picture on the page."""

    title: str
    source: str  # its bytes as a data address
    is_wide: bool


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    path: Path
    name: str
    anchor: str
    missing: list[str]  # files
    figures: list[Figure]
    texts: dict[str, str]  # by their titles


def write_report(paths: Sequence[Path], target: Path) -> Path:
    """Writes one page about the runs in *paths*, the smallest error first, and returns *target*.

    *paths* are as for ``sparsenet.records.read_summaries``. Where networks can be compared, a
    picture of error against their costs lies beside the page: ``*-comparison.png``. What a run
    lacks, because it goes on or was stopped, is named on the page. Raises ``ValueError`` where
    there is no run, for a damaged file, or for a *target* that cannot be written, or whose picture
    would replace one that is no report's.
    """
    summaries = read_summaries(paths)
    cells = [summary.cells() for summary in summaries]
    anchors = (f"run{number}" for number in count())
    by_row = [
        [_read_section(run.path, next(anchors)) for run in summary.runs] for summary in summaries
    ]
    measured = any(error_points(run.metrics) for row in summaries for run in row.runs)
    try:
        page = render(
            "report.html",
            version=__version__,
            rows=list(zip(cells, by_row, map(_line, count()), strict=False)),
            sections=[section for sections in by_row for section in sections],
            unfinished=not all(summary.is_final for summary in summaries),
            columns=used_columns(cells, HEADINGS),
            headings=HEADINGS,
            no_value=NO_VALUE,
            comparison=_comparison(summaries, target),
            errors=_error_curves(summaries) if measured else None,
            measured=measured,
        )
        write_atomic(behind_link(target), page + "\n")
    except OSError as error:
        raise ValueError(
            f"{target}: expected a file that can be written, found: {error.strerror}"
        ) from None
    return target


def wrote(path: Path) -> bool:
    """Whether what is at *path* begins as a page of ``write_report`` does, or its picture."""
    with path.open("rb") as file:
        start = file.read(1000)
    return any(each in start for each in BEGINNINGS)


def is_page(path: Path) -> bool:
    """Whether *path* is a page that ``write_report`` wrote, or the picture beside one."""
    return path.is_file() and path.name.endswith((".html", COMPARISON))


def _line(number: int) -> str:
    """A line as ``series`` has it, as the background of a thing."""
    colour, dashes = series(number)
    ends = [2 * each for each in accumulate(dashes)]
    stops = zip(cycle((colour, "#fff")), [0, *ends], ends, strict=False)
    parts = ", ".join(f"{each} {first:g}px {end:g}px" for each, first, end in stops)
    return f"repeating-linear-gradient(90deg, {parts})" if dashes else colour


def _read_section(run: Path, anchor: str) -> Section:
    folder = Run(run)
    present = [name for name in EXPECTED if folder.file(name).is_file()]
    texts = {
        TEXTS[name]: _beginning(folder.read(name).decode(errors="replace"))
        for name in TEXTS
        if name in present
    }
    if "config.json" in present:
        command = f"sparsenet train --config {quote(str(run / 'config.json'))}"
        texts[TEXTS["config.json"]] = f"{command}\n\n{texts[TEXTS['config.json']]}"
    figures = []
    for name, title in PICTURES.items():
        if name in present:
            source = _data_address(folder.read(name), name)
            figures.append(Figure(title, source, name in WIDE))
    missing = [name for name in EXPECTED if name not in (*present, *ON_DEMAND)]
    return Section(run, run.name or str(run), anchor, missing, figures, texts)


def _beginning(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"


def _data_address(data: bytes, name: str) -> str:
    # As an image an SVG can neither run nor load anything.
    kind = "svg+xml" if name.endswith(".svg") else "png"
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def _comparison(summaries: Sequence[RunSummary], page: Path) -> Figure | None:
    # Networks can be compared where two or more saw the same data in the same way.
    networks = [row for row in summaries if row.is_final and row.parameters and row.macs]
    if len(networks) < 2 or len({(row.dataset, row.recipe) for row in networks}) > 1:
        return None
    target = page.with_name(f"{page.stem}{COMPARISON}")
    # Older versions did not say in a picture whose it is.
    if target.is_file() and not wrote(target) and not (page.is_file() and wrote(page)):
        raise ValueError(
            f"report: expected no other picture at {target}, which is the place of the page's, "
            "found one of no report; --out names another page"
        )
    draw_comparison(networks, target)
    return Figure("Error and cost", _data_address(target.read_bytes(), target.name), is_wide=True)


def _error_curves(summaries: Sequence[RunSummary]) -> Figure | None:
    png = io.BytesIO()
    try:
        draw_errors(summaries, png)
    except MissingExtra:  # the page is of use without this picture
        return None
    source = _data_address(png.getvalue(), "errors.png")
    return Figure("Error in percent over the epochs", source, is_wide=True)
