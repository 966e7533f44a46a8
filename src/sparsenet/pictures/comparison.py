"""Runs side by side: error against what networks cost, and error over the epochs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsenet.pictures.figure import (
    SERIES_COLOURS,
    escaped,
    measured_points,
    picture,
    series,
    shorten,
)
from sparsenet.results import EpochMetrics
from sparsenet.summary import RunSummary

TITLE = "SparseNet runs"  # what the file of a comparison says that it is
# Of a cost, which is an attribute of the rows: its label and unit.
COSTS = {
    "parameters": ("parameters (thousands)", 1e3),
    "macs": ("multiply-accumulates an image (millions)", 1e6),
    "depth": ("depth", 1.0),
}


def draw_comparison(
    rows: Sequence[RunSummary],
    target: Path,
    costs: Mapping[str, tuple[str, float]] = COSTS,
) -> None:
    """Draws a PNG of error against what networks cost, one colour for each kind of network.

    Every seed is a dot, the mean of a network a ring with its depth and growth rate; networks of
    one kind are joined. All *rows* have an error, parameters and MACs. Another of the *costs* is
    shown where all rows have it, the depth where it takes three values or more.
    """
    shown = [cost for cost in costs if all(getattr(row, cost) for row in rows)]
    if len({row.depth for row in rows}) < 3 and "depth" in shown:
        shown.remove("depth")
    kinds: dict[str, list[RunSummary]] = {}
    for row in sorted(rows, key=lambda row: row.architecture or ""):
        kinds.setdefault(row.architecture or "unknown", []).append(row)
    title = f"{rows[0].dataset}, {rows[0].recipe}"
    size = 2 + 4.5 * len(shown), 4.6
    with picture(target, *size, title, metadata={"Title": TITLE}) as figure:
        axes = figure.subplots(1, len(shown), sharey=True)
        for axis, cost in zip(axes, shown, strict=True):
            label, unit = costs[cost]
            axis.set(xlabel=label, xscale="log")
            axis.margins(y=0.08)
            axis.grid(axis="y")
            for number, (kind, networks) in enumerate(kinds.items()):
                points = [(getattr(row, cost) / unit, row) for row in networks]
                points.sort(key=lambda point: point[0])
                _draw_kind(axis, points, kind, SERIES_COLOURS[number % len(SERIES_COLOURS)])
            _set_plain_ticks(axis, [getattr(row, cost) / unit for row in rows])
        axes[0].set_ylabel("test error (%)")
        legend = axes[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=min(len(kinds), 4))


def _draw_kind(
    axis: Any, points: Sequence[tuple[float, RunSummary]], kind: str, colour: str
) -> None:
    xs = [x for x, _ in points]
    ys = [row.error for _, row in points]
    axis.plot(xs, ys, "-", color=colour, lw=1.2)
    axis.plot(xs, ys, "o", color=colour, mfc="white", ms=8, mew=1.8, label=kind)
    for x, row in points:
        axis.plot([x] * len(row.errors), row.errors, ".", color=colour, ms=4, zorder=3)
        style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
        axis.annotate(f"{row.depth}-{row.growth}", (x, row.error), (7, 5), **style)


def _set_plain_ticks(axis: Any, values: Sequence[float]) -> None:
    # Powers of ten, the usual ticks of a logarithmic axis, may all lie outside of a narrow one.
    left, right = 0.8 * min(values), 1.35 * max(values)
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 1.5, 2, 3, 5, 7)]
    inside = [tick for tick in ticks if left <= tick <= right]
    axis.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axis.set_xticks([], minor=True)
    axis.set_xlim(left, right)


def draw_errors(rows: Sequence[RunSummary], target: Path | io.BytesIO) -> None:
    """Draws a PNG of error in percent over the epochs: a line for each run, a colour for each row.

    The errors are those on test images, else on held-out ones, else on training images. The first
    of *rows* is drawn on top.
    """
    with picture(target, 11, 4.4) as figure:
        axis = figure.subplots()
        axis.set(xlabel="epoch", ylabel="error (%)")
        axis.grid(axis="y")
        axis.xaxis.get_major_locator().set_params(integer=True)
        for number, row in enumerate(rows):
            colour, dashes = series(number)
            label = shorten(escaped(row.runs[0].path.name), 60)
            if len(row.runs) > 1:
                label += f" and {len(row.runs) - 1} more"
            for points in filter(None, (error_points(run.metrics) for run in row.runs)):
                marker = "." if len(points) <= 40 else ""
                look = {"c": colour, "ls": (0, dashes) if dashes else "-", "marker": marker}
                order = 3 - number / 1000
                axis.plot(*zip(*points, strict=True), **look, zorder=order, label=label)
                label = "_"  # leaves the other seeds out of the legend
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        if len(rows) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, handlelength=3.5)


def error_points(metrics: Sequence[EpochMetrics]) -> list[tuple[int, float]]:
    """Pairs of epoch and error in percent, as ``draw_errors`` draws them."""
    for column in ("test_error", "val_error", "train_error"):
        points = measured_points(metrics, column)
        if points:
            return points
    return []
