"""One self-contained HTML page that compares runs, from what lies in their folders."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

from sparsenet.run import Run, version, write_atomic

COLUMNS = {
    "platform": "platform",
    "architecture": "architecture",
    "depth": "depth",
    "growth": "growth",
    "parameters": "parameters",
    "dataset": "dataset",
    "error": "error %",
    "train_seconds": "train epoch (s)",
    "test_seconds": "test pass (s)",
    "epochs": "epochs",
    "peak_memory_mb": "peak memory (MB)",
    "seed": "seed",
}
PICTURES = {
    "curves.png": "Loss and error",
    "confusion.png": "Confusion matrix",
    "samples.png": "Most confident mistakes",
    "graph.svg": "Network",
}
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
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

Cells = dict[str, Any]


def write_report(runs: Sequence[Path], target: Path) -> Path:
    """Writes one page about *runs*, the one with the smallest error first; returns *target*.

    What a run lacks, because it goes on or was stopped, is named on the page. Raises ``ValueError`` for a folder
    that is no run, a damaged file in it, or a *target* that cannot be written.
    """
    rows = [summarise(run) | {"path": run} for run in runs]
    rows.sort(key=lambda row: (row["error"] is None, row["error"]))
    for number, row in enumerate(rows):
        row["colour"], row["anchor"] = LINES[number % len(LINES)], f"run{number}"
    parts = [_table(rows), _chart(rows), *map(_section, rows)]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SparseNet runs</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>SparseNet runs</h1><p class=faint>{len(rows)} compared by sparsenet {escape(version())}; "
        f"seconds are medians over the epochs</p>{''.join(parts)}</body></html>\n"
    )
    try:
        write_atomic(target, page)
    except OSError as error:
        raise ValueError(f"{target}: expected a file that can be written, found: {error.strerror}") from None
    return target


def summarise(run: Path) -> Cells:
    """The values of a run's row, by the keys of :data:`COLUMNS`; ``None`` where its folder does not say.

    ``final`` is false where the run has no result: then ``error`` is that of the last epoch tested. Raises
    ``ValueError`` for a folder that is no run or a file in it that cannot be read.
    """
    names = ("config", "environment", "graph", "result")
    config, environment, graph, result = (_read(run / f"{name}.json") for name in names)
    rows = _metrics(run)
    if not (config or result or rows):
        raise ValueError(f"{run}: expected a run folder with config.json, metrics.csv or result.json, found none")
    network, train = config.get("network", {}), config.get("train", {})
    tested = _column(rows, "test_error") or _column(rows, "val_error")
    device, threads = environment.get("device_name") or environment.get("device"), environment.get("threads")
    rates, data = network.get("growth_rate"), config.get("data", {})
    done, planned = len(rows) or result.get("epochs"), train.get("max_epoch")
    return {
        "platform": f"{device}, {threads} threads" if environment.get("device") == "cpu" else device,
        "architecture": _architecture(network) if network else None,
        "depth": network.get("depth"),
        "growth": "-".join(map(str, rates)) if isinstance(rates, list) else rates,
        "parameters": graph.get("parameters"),
        "dataset": result.get("dataset") or data.get("dataset_name") or data.get("dataset"),
        "error": result.get("error", tested[-1] if tested else None),
        "train_seconds": _median(rows, "seconds"),
        "test_seconds": _median(rows, "eval_seconds"),
        "epochs": done if planned in (None, done) else f"{done or 0} of {planned}",
        "peak_memory_mb": max(_column(rows, "peak_memory_mb"), default=None),
        "seed": train.get("seed"),
        "final": bool(result),
    }


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows that :func:`summarise` gives as a Markdown table, best first; ``*`` marks an error that is not final."""
    ordered = sorted(rows, key=lambda row: (row["error"] is None, row["error"]))
    cells = [[_cell(row, key).replace("|", "\\|") for key in COLUMNS] for row in ordered]
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in *file*; an empty one where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected readable JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _metrics(run: Path) -> list[dict[str, float | None]]:
    try:
        return Run(run).metrics()
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run / 'metrics.csv'}: expected a table of numbers, found: {error}") from None


def _column(rows: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _median(rows: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = _column(rows, name)
    return median(values) if values else None


def _architecture(network: Mapping[str, Any]) -> str:
    fetch = network.get("fetch", "sparse")
    kinds = {"sparse": "SparseNet", "dense": "DenseNet", "harmonic": "HarDNet"}
    name = kinds.get(fetch, f"SparseNet ({fetch})") if isinstance(fetch, str) else "SparseNet (own topology)"
    return name + "-BC" * bool(network.get("bottleneck")) + " (sum)" * (network.get("aggregation") == "sum")


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    if key == "error":
        return f"{value:.2f}" + "*" * (not row["final"])
    if key.endswith("seconds"):
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,.0f}" if key in ("parameters", "peak_memory_mb") else str(value)


def _table(rows: Sequence[Cells]) -> str:
    head = "".join(f"<th>{escape(name)}" for name in ("run", *COLUMNS.values()))
    body = ""
    for row in rows:
        cells = "".join(f"<td class={key}>{escape(_cell(row, key))}" for key in COLUMNS)
        name = escape(row["path"].name or str(row["path"]))
        body += f'<tr><td><i style="background:{row["colour"]}"></i><a href="#{row["anchor"]}">{name}</a>{cells}'
    note = "" if all(row["final"] for row in rows) else "<p class=faint>* last epoch so far, no final result</p>"
    return f"<div class=scroll><table><thead><tr>{head}<tbody>{body}</table></div>{note}"


def _chart(rows: Sequence[Cells]) -> str:
    """Error in percent over the epochs, one line a run."""
    curves = [(row, _curve(_metrics(row["path"]))) for row in rows]
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
        parts.append(f'<text x="32" y="{294 - 270 * error / top:.1f}" text-anchor="end">{error:g}</text>')
    for row, curve in reversed(curves):  # the best run is drawn last, on top
        places = " ".join(place(*point) for point in [*curve, *curve[-1:]])  # an end twice: one epoch is a dot
        name = escape(row["path"].name)
        parts.append(f'<polyline points="{places}" stroke="{row["colour"]}"><title>{name}</title></polyline>')
    parts.append('<text x="40" y="310">epoch 0</text>')
    parts.append(f'<text x="980" y="310" text-anchor="end">epoch {last:g}</text>')
    return (
        f'<h3>Error in %</h3><div class=scroll><svg class="chart" viewBox="0 0 1000 316">{"".join(parts)}</svg></div>'
    )


def _curve(rows: Sequence[Mapping[str, float | None]]) -> list[tuple[float, float]]:
    for column in ("test_error", "val_error", "train_error"):
        cells = [(row.get("epoch"), row.get(column)) for row in rows]
        if curve := [(epoch, error) for epoch, error in cells if epoch is not None and error is not None]:
            return curve
    return []


def _section(row: Cells) -> str:
    run: Path = row["path"]
    pictures = {name: run / name for name in PICTURES if (run / name).is_file()}
    wanted = ("config.json", "environment.json", "graph.json", "metrics.csv", "result.json", *PICTURES)
    missing = [name for name in wanted if not (run / name).is_file()]
    parts = [f'<h2 id="{row["anchor"]}">{escape(run.name or str(run))}</h2><p class=faint>{escape(str(run))}</p>']
    if not row["final"]:
        parts.append("<p><b>This run is still going or was stopped: it has no final result.</b></p>")
    if missing:
        parts.append(f"<p class=faint>Not in the folder: {', '.join(missing)}</p>")
    figures = "".join(_figure(name, file) for name, file in pictures.items())
    parts.append(f"<div class=pictures>{figures}</div>")
    if config := _read(run / "config.json"):
        command = f"sparsenet train --config {quote(str(run / 'config.json'))}"
        parts.append(_details("Command and configuration", f"{command}\n\n{json.dumps(config, indent=2)}"))
    for name, title in (("environment", "Environment"), ("result", "Result")):
        if value := _read(run / f"{name}.json"):
            parts.append(_details(title, json.dumps(value, indent=2)))
    return f"<section>{''.join(parts)}</section>"


def _figure(name: str, file: Path) -> str:
    if name.endswith(".svg"):
        drawn = file.read_text(encoding="utf-8")
    else:
        data = b64encode(file.read_bytes()).decode()
        drawn = f'<img src="data:image/png;base64,{data}" alt="{PICTURES[name]}">'
    wide = " class=wide" if name in ("curves.png", "graph.svg") else ""
    return f"<figure{wide}><figcaption>{PICTURES[name]}</figcaption>{drawn}</figure>"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
