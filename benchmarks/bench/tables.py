"""The figures of a record as Markdown: ``python -m benchmarks.bench.tables RECORD.json``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.bench.record import Epoch, Point, Record, Row, Spread, Sweep
from sparsenet.files import read_json

Figure = Spread | float | None

# Of CIFAR-10 with SparseNet-100-24, batch 64, 50,000 and 10,000 images, as others published them.
PUBLISHED = {
    "sparsenet_100_24": (
        ("*published:* TensorFlow 1.15 and tensorpack, one GPU", "61–70", "3.8–4.1"),
        ("*published:* the same on one Ascend NPU", "60–61", "3.4–3.5"),
    )
}
COLUMNS = (
    "training step, s",
    "inference, s",
    "peak memory above base, MB",
    "first step, s, caches empty",
    "caches filled",
)


def _figures(row: Row) -> tuple[Figure, ...]:
    """Returns a figure for each of the columns."""
    first = row.first_step_seconds
    first_step = (first.cold, first.warm) if first else (None, None)
    return row.train_seconds, row.infer_seconds, row.peak_memory_mb, *first_step


def report(record: Record) -> list[str]:
    """Returns all that was measured as lines of Markdown."""
    env = record.environment
    commit = f", commit {env.commit[:10]}" if env.commit else ""
    lines = [
        f"{env.device_name}, {env.threads} threads, torch {env.torch}{commit}; "
        f"medians of {record.steps} (min–max); "
        "ratios to the first row and to the reference in the same precision."
    ]
    for _, rows in groupby(record.rows, lambda row: row.model):
        lines += _network(list(rows))
    if record.depth is not None:
        lines += _depth(record.depth)
    if record.absent:
        lines.append("")
    for reason in dict.fromkeys(record.absent.values()):
        names = ", ".join(name for name, why in record.absent.items() if why == reason)
        lines.append(f"Not run: {names}: {reason}.")
    return lines


def _network(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    yield from ("", f"### {first.model}, {first.image_size}²", "")
    figures = {row.variant: _figures(row) for row in rows}
    shown = [
        i for i in range(len(COLUMNS)) if any(each[i] is not None for each in figures.values())
    ]
    header, lines = [f"batch {first.batch_size}"], []
    for i in shown:
        header += [COLUMNS[i], "ratio", "same precision"]
    for row in rows:
        values, cells = figures[row.variant], [row.variant]
        same_precision = figures.get(f"reference-{row.precision}")
        for i in shown:
            cells += [
                _format(values[i]),
                _ratio(values[i], figures[first.variant][i]),
                _ratio(values[i], same_precision[i] if same_precision else None),
            ]
        lines.append(cells)
    if shown:
        yield from table(header, lines)
    yield from _epochs(rows)
    yield from _memory_parts(rows)


def _ratio(value: Figure, base: Figure) -> str:
    numerator = value.median if isinstance(value, Spread) else value
    denominator = base.median if isinstance(base, Spread) else base
    if numerator is None or not denominator:
        return "–"
    return f"{numerator / denominator:.2f}"


def _epochs(rows: Sequence[Row]) -> Iterator[str]:
    measured = [(row.variant, row.epoch) for row in rows if row.epoch is not None]
    if not measured:
        return
    yield ""
    yield "A whole epoch of `sparsenet train`, data included, and the pass over the test images:"
    yield ""
    cells = [
        [name, "64", train, "", test, "", "50,000"]
        for name, train, test in PUBLISHED.get(rows[0].model, ())
    ]
    first = measured[0][1]
    cells += [_epoch_cells(variant, epoch, first) for variant, epoch in measured]
    header = ["", "batch", "training epoch, s", "ratio", "test pass, s", "ratio", "images"]
    yield from table(header, cells)


def _epoch_cells(variant: str, epoch: Epoch, first: Epoch) -> list[str]:
    images = f"{epoch.images:,}"
    if epoch.estimated_from_steps is not None:
        images = f"estimated from {epoch.estimated_from_steps} steps"
    return [
        variant,
        str(epoch.batch_size),
        _format(epoch.train_seconds),
        _ratio(epoch.train_seconds, first.train_seconds),
        _format(epoch.test_seconds),
        _ratio(epoch.test_seconds, first.test_seconds),
        images,
    ]


def _memory_parts(rows: Sequence[Row]) -> Iterator[str]:
    columns = {row.variant: row.memory_parts for row in rows if row.memory_parts is not None}
    if not columns:
        return
    yield ""
    yield (
        "What the peak of memory consists of, MB (what comes before the gradients is in the base):"
    )
    yield ""
    parts = dict.fromkeys(part for each in columns.values() for part in each)
    cells = [
        [part, *(f"{each[part]:,.1f}" if part in each else "" for each in columns.values())]
        for part in parts
    ]
    yield from table(["", *columns], cells)


def _depth(sweep: Sweep) -> Iterator[str]:
    yield ""
    yield f"### Depth: growth rate {sweep.growth_rate}, batch {sweep.batch_size}"
    yield ""
    header = ["", "topology", "depth", "training step, s", "ms/layer", "peak memory, MB"]
    yield from table([*header, "MB/layer"], map(_point_cells, sweep.points))


def _point_cells(point: Point) -> list[str]:
    cells = [point.variant, point.fetch, str(point.depth)]
    if point.left_out is not None or point.seconds_per_layer is None:
        return [*cells, f"left out: {point.left_out}", "", "", ""]
    milliseconds = 1000 * point.seconds_per_layer
    figures = (point.train_seconds, milliseconds, point.peak_memory_mb, point.mb_per_layer)
    return cells + [_format(figure) for figure in figures]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _format(value: Figure) -> str:
    """Writes a number with three digits and never an exponent; of a spread all three numbers."""
    if value is None:
        return "–"
    if isinstance(value, Spread):
        return f"{_format(value.median)} ({_format(value.min)}–{_format(value.max)})"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


if __name__ == "__main__":
    print(*report(read_json(Path(sys.argv[1]), Record)), sep="\n")
