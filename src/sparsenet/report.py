"""One self-contained HTML page that compares runs, from what lies in their folders."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from shlex import quote

from sparsenet import __version__
from sparsenet.files import write_atomic
from sparsenet.pictures import KINDS, draw_comparison
from sparsenet.records import COLUMNS, Row, cell, columns, rank, read_json, read_metrics, read_rows

PICTURES = {
    "curves.png": "Loss and error",
    "confusion.png": "Confusion matrix",
    "samples.png": "Most confident mistakes",
    "graph.svg": "Network",
    "filters.png": "How strongly layers weigh their sources",
}
WIDE, ON_DEMAND = ("curves.png", "graph.svg", "filters.png"), ("filters.png",)
# No script runs and nothing is loaded, whatever lies in a run folder that somebody else made.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { margin: 0 } h2 { margin: 3rem 0 .2rem } h3 { margin: 2rem 0 .3rem; font-size: 1rem }
p { margin: .3rem 0 } .faint { color: var(--faint) } .scroll { overflow-x: auto; margin: 1.2rem 0 .4rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .45rem .5rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--faint); vertical-align: bottom; white-space: normal } td.error { font-weight: 700 }
td.platform { white-space: normal; min-width: 8rem }
i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem }
.pictures .wide { grid-column: 1 / -1 }
figure { margin: 0; padding: .6rem; background: #fff; border: 1px solid var(--line); border-radius: 10px }
figure img, figure svg { display: block; max-width: 100%; height: auto; margin: auto }
figcaption { color: #555; font-size: 13px; padding-bottom: .4rem }
details { margin-top: .8rem } summary { cursor: pointer } pre { overflow-x: auto; font-size: 13px }
.chart { width: 100%; min-width: 640px; font-size: 13px } .chart text { fill: var(--faint) }
.chart polyline { fill: none; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round }
.chart .grid { stroke: var(--line); stroke-width: 1 }
"""


def write_report(paths: Sequence[Path], target: Path) -> Path:
    """Writes one page about the runs in *paths* (see :func:`sparsenet.records.read_rows`), the smallest error first.

    Where networks can be compared, a picture of error against their costs lies beside the page: ``*-comparison.png``.
    What a run lacks, because it goes on or was stopped, is named on the page. Returns *target*. Raises
    ``ValueError`` where there is no run, for a damaged file, or for a *target* that cannot be written.
    """
    rows = sorted(read_rows(paths), key=rank)
    coloured = [
        (run, row, KINDS[number % len(KINDS)])
        for number, row in enumerate(rows)
        for run in row["runs"]
    ]
    runs = [_Shown(f"run{number}", *one) for number, one in enumerate(coloured)]
    try:
        compared = _comparison(rows, target.with_name(f"{target.stem}-comparison.png"))
        parts = [_table(rows, runs), compared, _chart(runs), *map(_section, runs)]
        write_atomic(
            target,
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SparseNet runs</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
            f"<h1>SparseNet runs</h1><p class=faint>{len(runs)} compared by sparsenet {escape(__version__)}; "
            f"seconds are medians over the epochs, then means over the seeds; ± is the seeds' standard deviation</p>"
            f"{''.join(parts)}</body></html>\n",
        )
    except OSError as error:
        raise ValueError(
            f"{target}: expected a file that can be written, found: {error.strerror}"
        ) from None
    return target


@dataclass(frozen=True)
class _Shown:
    """A run on the page: its folder, the row of the table that it belongs to, and that row's colour."""

    anchor: str
    path: Path
    row: Row
    colour: str

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def link(self) -> str:
        return f'<a href="#{self.anchor}">{escape(self.name)}</a>'


def _table(rows: Sequence[Row], runs: Sequence[_Shown]) -> str:
    names = columns(rows)
    head = "".join(f"<th>{escape(name)}" for name in ("run", *(COLUMNS[key] for key in names)))
    body = ""
    for row in rows:
        cells = "".join(f"<td class={key}>{escape(cell(row, key))}" for key in names)
        own = [run for run in runs if run.row is row]
        dot = f'<i style="background:{own[0].colour}"></i>' if own else ""
        body += f"<tr><td>{dot}{'<br>'.join(run.link for run in own)}{cells}"
    note = (
        ""
        if all(row["final"] for row in rows)
        else "<p class=faint>* last epoch so far, no final result</p>"
    )
    return f"<div class=scroll><table><thead><tr>{head}<tbody>{body}</table></div>{note}"


def _comparison(rows: Sequence[Row], target: Path) -> str:
    """Error against what networks cost, where there are two or more that saw the same data in the same way."""
    measured = [
        row for row in rows if row["runs"] and row["final"] and row["parameters"] and row["macs"]
    ]
    if len(measured) < 2 or len({(row["dataset"], row["recipe"]) for row in measured}) > 1:
        return ""
    draw_comparison(measured, target)
    return f"<div class=pictures>{_figure(target, 'Error and cost', True)}</div>"


def _chart(runs: Sequence[_Shown]) -> str:
    """Error in percent over the epochs, one line a run."""
    curves = [(run, _curve(read_metrics(run.path))) for run in runs]
    points = [point for _, curve in curves for point in curve]
    if not points:
        return "<p class=faint>No run has measured an error yet.</p>"
    last, top = max(epoch for epoch, _ in points), max(error for _, error in points) or 1
    step = next((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10) if top / step <= 6), 20)

    def place(epoch: float, error: float) -> str:
        return f"{40 + 940 * epoch / last:.1f},{290 - 270 * error / top:.1f}"

    parts = []
    for error in (step * tick for tick in range(int(top / step) + 1)):
        parts.append(f'<polyline points="{place(0, error)} {place(last, error)}" class="grid"/>')
        parts.append(
            f'<text x="32" y="{294 - 270 * error / top:.1f}" text-anchor="end">{error:g}</text>'
        )
    for run, curve in reversed(curves):  # the best run is drawn last, on top
        places = " ".join(
            place(*point) for point in [*curve, *curve[-1:]]
        )  # an end twice: one epoch is a dot
        parts.append(
            f'<polyline points="{places}" stroke="{run.colour}"><title>{escape(run.name)}</title></polyline>'
        )
    parts.append('<text x="40" y="310">epoch 0</text>')
    parts.append(f'<text x="980" y="310" text-anchor="end">epoch {last:g}</text>')
    return f'<h3>Error in %</h3><div class=scroll><svg class="chart" viewBox="0 0 1000 316">{"".join(parts)}</svg></div>'


def _curve(rows: Sequence[Mapping[str, float | None]]) -> list[tuple[float, float]]:
    for column in ("test_error", "val_error", "train_error"):
        cells = [(row.get("epoch"), row.get(column)) for row in rows]
        if curve := [
            (epoch, error) for epoch, error in cells if epoch is not None and error is not None
        ]:
            return curve
    return []


def _section(shown: _Shown) -> str:
    run = shown.path
    pictures = {name: run / name for name in PICTURES if (run / name).is_file()}
    wanted = (
        "config.json",
        "environment.json",
        "graph.json",
        "metrics.csv",
        "result.json",
        *PICTURES,
    )
    missing = [name for name in wanted if not (run / name).is_file() and name not in ON_DEMAND]
    parts = [
        f'<h2 id="{shown.anchor}">{escape(shown.name)}</h2><p class=faint>{escape(str(run))}</p>'
    ]
    if not (run / "result.json").is_file():
        parts.append(
            "<p><b>This run is still going or was stopped: it has no final result.</b></p>"
        )
    if missing:
        parts.append(f"<p class=faint>Not in the folder: {', '.join(missing)}</p>")
    figures = "".join(
        _figure(file, PICTURES[name], name in WIDE) for name, file in pictures.items()
    )
    parts.append(f"<div class=pictures>{figures}</div>")
    if config := read_json(run / "config.json"):
        command = f"sparsenet train --config {quote(str(run / 'config.json'))}"
        parts.append(
            _details("Command and configuration", f"{command}\n\n{json.dumps(config, indent=2)}")
        )
    for name, title in (("environment", "Environment"), ("result", "Result")):
        if value := read_json(run / f"{name}.json"):
            parts.append(_details(title, json.dumps(value, indent=2)))
    return f"<section>{''.join(parts)}</section>"


def _figure(file: Path, title: str, wide: bool) -> str:
    kind = (
        "svg+xml" if file.suffix == ".svg" else "png"
    )  # as an image, an SVG can neither run nor load anything
    data = b64encode(file.read_bytes()).decode()
    drawn = f'<img src="data:image/{kind};base64,{data}" alt="{title}">'
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption>{title}</figcaption>{drawn}</figure>"
    )


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
