"""The figures as pictures: bars for each network, and the depth sweep with its lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.bench.tables import report
from sparsenet.files import write_atomic, write_json
from sparsenet.pictures.figure import FAINT, picture
from sparsenet.pictures.figure import SERIES_COLOURS as KINDS

BARS = {
    "train_seconds": "training step (s)",
    "infer_seconds": "inference pass (s)",
    "peak_memory_mb": "peak memory above base (MB)",
}

Row = Mapping[str, Any]


def write(found: Mapping[str, Any], folder: Path) -> None:
    """``bench.json``, ``bench.md`` and the pictures, into *folder*, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for model, rows in groupby(found["rows"], lambda row: row["model"]):
        own = list(rows)
        if any(key in row for row in own for key in BARS):
            file = f"{str(model).strip('/').replace('/', '-')}.png"
            draw_bars(own, folder / file, f"{model}, batch {own[0]['batch_size']}")
            pictures.append(file)
    if any(not point["left_out"] for point in found.get("depth", {}).get("points", ())):
        draw_depth(found["depth"], folder / "depth.png")
        pictures.append("depth.png")
    lines = [*report(found), *(line for name in pictures for line in ("", f"![{name}]({name})"))]
    write_atomic(folder / "bench.md", "\n".join(lines) + "\n")
    write_json(folder / "bench.json", found)


def draw_bars(rows: Sequence[Row], target: Path, title: str) -> None:
    """A PNG of the time of a step and a pass, and of memory: a bar for each variant, with min and max."""
    shown = [key for key in BARS if any(row.get(key) is not None for row in rows)]
    with picture(target, 4 + 3.2 * len(shown), 1.4 + 0.34 * len(rows), title) as figure:
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, key in zip(axes, shown, strict=True):
            _draw_bars(axis, [row.get(key) for row in rows])
            axis.set(title=BARS[key])
        axes[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes[0].invert_yaxis()


def _draw_bars(axis: Any, values: Sequence[Any]) -> None:
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    for y, value in enumerate(values):
        if value is None:
            continue
        middle = value["median"] if isinstance(value, Mapping) else value
        axis.barh(y, middle, 0.62, color=KINDS[0])
        if isinstance(value, Mapping):
            axis.plot(
                [value["min"], value["max"]], [y, y], color=KINDS[1], lw=1.6, solid_capstyle="butt"
            )
    axis.set_xlim(left=0)
    axis.locator_params(axis="x", nbins=6)


def draw_depth(found: Mapping[str, Any], target: Path) -> None:
    """A PNG of time and memory per layer over the depth, measured (dots) and fitted (lines)."""
    quantities = (
        ("seconds_per_layer", "training step, ms per layer", 1000),
        ("mb_per_layer", "MB per layer", 1),
    )
    title = f"Growth rate {found['growth_rate']}, batch {found['batch_size']}"
    with picture(target, 11, 4.4, title) as figure:
        for axis, (quantity, label, scale) in zip(figure.subplots(1, 2), quantities, strict=True):
            axis.set_xscale("log", base=2)
            axis.set(title=label, xlabel="depth")
            axis.grid(axis="y")
            _draw_series(axis, found, quantity, scale)
        axis.legend(fontsize=8)


def _draw_series(axis: Any, found: Mapping[str, Any], quantity: str, scale: float) -> None:
    own = [
        point for point in found["points"] if not point["left_out"] and point[quantity] is not None
    ]
    depths = sorted({point["depth"] for point in own})
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.minorticks_off()
    for number, name in enumerate(
        dict.fromkeys((point["variant"], point["fetch"]) for point in own)
    ):
        colour = KINDS[number % len(KINDS)]
        points = [
            (p["depth"], scale * p[quantity]) for p in own if (p["variant"], p["fetch"]) == name
        ]
        axis.plot(*zip(*points, strict=True), "o", color=colour, ms=5, label=", ".join(name))
        for fit in found["fits"]:
            if (fit["variant"], fit["fetch"], fit["quantity"]) == (*name, quantity):
                ends = [points[0][0], points[-1][0]]
                line = [scale * (fit["a"] + fit["b"] * math.log2(depth)) for depth in ends]
                axis.plot(ends, line, color=colour, lw=1)
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", color=FAINT)
