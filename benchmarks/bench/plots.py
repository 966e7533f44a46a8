"""The figures of a record as pictures, and all the files that a record leaves.

``python -m benchmarks.bench.plots BENCH.JSONL FOLDER`` writes the files of every record of gpu.sh.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.bench.record import Record, Row, Spread
from benchmarks.bench.tables import report
from sparsenet.files import parse_json, write_atomic, write_json
from sparsenet.pictures.figure import SERIES_COLOURS, picture

BARS = {
    "train_seconds": "training step (s)",
    "infer_seconds": "inference pass (s)",
    "peak_memory_mb": "peak memory above base (MB)",
}


def write_record(record: Record, folder: Path) -> None:
    """Writes ``bench.json``, ``bench.md`` and the pictures into *folder*, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for model, group in groupby(record.rows, lambda row: row.model):
        rows = list(group)
        if any(getattr(row, quantity) is not None for row in rows for quantity in BARS):
            pictures.append(f"{model.strip('/').replace('/', '-')}.png")
            draw_bars(rows, folder / pictures[-1], f"{model}, batch {rows[0].batch_size}")
    lines = report(record)
    for name in pictures:
        lines += ["", f"![{name}]({name})"]
    write_atomic(folder / "bench.md", "\n".join(lines) + "\n")
    write_json(folder / "bench.json", record)


def draw_bars(rows: Sequence[Row], target: Path, title: str) -> None:
    """Draws a PNG of time and memory: a bar for each variant, with minimum and maximum."""
    shown = [key for key in BARS if any(getattr(row, key) is not None for row in rows)]
    with picture(target, 4 + 3.2 * len(shown), 1.4 + 0.34 * len(rows), title) as figure:
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, quantity in zip(axes, shown, strict=True):
            axis.grid(axis="x")
            axis.set_axisbelow(True)
            for y, row in enumerate(rows):
                _draw_bar(axis, y, getattr(row, quantity))
            axis.set_xlim(left=0)
            axis.locator_params(axis="x", nbins=6)
            axis.set(title=BARS[quantity])
        axes[0].set_yticks(range(len(rows)), [row.variant for row in rows])
        axes[0].invert_yaxis()


def _draw_bar(axis: Any, y: int, value: Spread | float | None) -> None:
    if isinstance(value, Spread):
        axis.barh(y, value.median, 0.62, color=SERIES_COLOURS[0])
        ends = [value.min, value.max]
        axis.plot(ends, [y, y], color=SERIES_COLOURS[1], lw=1.6, solid_capstyle="butt")
    elif value is not None:
        axis.barh(y, value, 0.62, color=SERIES_COLOURS[0])


def main(lines: Path, folder: Path) -> None:
    for number, line in enumerate(lines.read_text().splitlines(), start=1):
        record = parse_json(line, Record, f"{lines}, line {number}")
        write_record(record, folder / f"gpu-{record.record}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
