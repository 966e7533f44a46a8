"""The figures as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]

# Of CIFAR-10 with SparseNet-100-24, batch 64, 50,000 and 10,000 images, as their authors or users published them.
PUBLISHED = {
    "sparsenet_100_24": (
        ("*published:* TensorFlow 1.15 and tensorpack, one GPU", "61–70", "3.8–4.1"),
        ("*published:* the same on one Ascend NPU", "60–61", "3.4–3.5"),
    )
}


def report(found: Mapping[str, Any]) -> list[str]:
    """All that was measured, as lines of Markdown."""
    env = found["environment"]
    commit = f", commit {env['commit'][:10]}" if env["commit"] else ""
    lines = [
        f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}{commit}; medians of {found['steps']} "
        "(min–max); ratios to the first row and to the reference in the same precision."
    ]
    for _, rows in groupby(found["rows"], lambda row: row["model"]):
        lines += _network(list(rows))
    if "depth" in found:
        lines += _depth(found["depth"])
    if found["absent"]:
        lines += ["", *_absent(found["absent"])]
    return lines


def _absent(reasons: Mapping[str, str]) -> Iterator[str]:
    for reason in dict.fromkeys(reasons.values()):
        yield f"Not run: {', '.join(name for name, why in reasons.items() if why == reason)}: {reason}."


def _network(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    yield from ("", f"### {first['model']}, {first['image_size']}²", "")
    columns: list[tuple[str, Callable[[Row], Any], Callable[[Any], str]]] = [
        ("training step, s", lambda row: row.get("train_seconds"), _spread),
        ("inference, s", lambda row: row.get("infer_seconds"), _spread),
        (
            "peak memory above base, MB",
            lambda row: row.get("peak_memory_mb"),
            lambda mb: f"{mb:,.0f}",
        ),
        (
            "first step, s, caches empty",
            lambda row: row.get("first_step_seconds", {}).get("cold"),
            _number,
        ),
        ("caches filled", lambda row: row.get("first_step_seconds", {}).get("warm"), _number),
    ]
    columns = [column for column in columns if any(column[1](row) is not None for row in rows)]
    if columns:
        header = [f"batch {first['batch_size']}"]
        header += [part for name, *_ in columns for part in (name, "ratio", "same precision")]
        yield from table(header, [_ratio_cells(row, rows, columns) for row in rows])
    for what in (_best, _epoch, _parts):
        if lines := list(what(rows)):
            yield from ("", *lines)


def _ratio_cells(
    row: Row, rows: Sequence[Row], columns: Sequence[tuple[str, Callable[..., Any], Any]]
) -> list[str]:
    cells = [row["variant"]]
    for _, value, shown in columns:
        own = value(row)
        cells.append("–" if own is None else shown(own))
        cells += [
            _ratio(own, base and value(base)) for base in (rows[0], same_precision(row, rows))
        ]
    return cells


def same_precision(row: Row, rows: Sequence[Row]) -> Row | None:
    """The plain reference in the precision of *row*."""
    name = f"reference-{row['precision']}"
    return next((other for other in rows if other["variant"] == name), None)


def _ratio(value: Any, base: Any) -> str:
    own, other = (x["median"] if isinstance(x, Mapping) else x for x in (value, base))
    return f"{own / other:.2f}" if own is not None and other else "–"


def _best(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if "best_batch" in row]
    if not own:
        return
    yield from ("Batch with the most images a second in training, by doubling:", "")
    cells = [
        [
            row["variant"], str(best["batch_size"]), f"{best['train_images_per_second']:,.0f}",
            _ratio(best["train_images_per_second"], own[0]["best_batch"]["train_images_per_second"]),
            f"{best['infer_images_per_second']:,.0f}",
            _ratio(best["infer_images_per_second"], own[0]["best_batch"]["infer_images_per_second"]),
            "–" if best["peak_memory_mb"] is None else f"{best['peak_memory_mb']:,.0f}", best["ended"],
        ]
        for row in own for best in [row["best_batch"]]
    ]  # fmt: skip
    yield from table(
        [
            "",
            "batch",
            "training, images/s",
            "ratio",
            "inference, images/s",
            "ratio",
            "peak memory, MB",
            "search ended",
        ],
        cells,
    )


def _epoch(rows: Sequence[Row]) -> Iterator[str]:
    own = [(row, row[key]) for key in ("epoch", "best_epoch") for row in rows if key in row]
    if not own:
        return
    yield from (
        "A whole epoch of `sparsenet train`, data included, and the pass over the test images:",
        "",
    )
    cells = [
        [name, "64", train, "", test, "", "50,000"]
        for name, train, test in PUBLISHED.get(rows[0]["model"], ())
    ]
    for row, epoch in own:
        steps = epoch["estimated_from_steps"]
        cells.append(
            [
                row["variant"], str(epoch["batch_size"]),
                _spread(epoch["train_seconds"]), _ratio(epoch["train_seconds"], own[0][1]["train_seconds"]),
                _spread(epoch["test_seconds"]), _ratio(epoch["test_seconds"], own[0][1]["test_seconds"]),
                f"{epoch['images']:,}" if steps is None else f"estimated from {steps} steps",
            ]
        )  # fmt: skip
    yield from table(
        ["", "batch", "training epoch, s", "ratio", "test pass, s", "ratio", "images"], cells
    )


def _parts(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if "memory_parts" in row]
    if not own:
        return
    yield from (
        "What the peak of memory consists of, MB (what comes before the gradients is in the base):",
        "",
    )
    names = list(own[0]["memory_parts"])
    cells = [[name, *(f"{row['memory_parts'][name]:,.1f}" for row in own)] for name in names]
    yield from table(["", *(row["variant"] for row in own)], cells)


def _depth(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        f"### Depth: growth rate {found['growth_rate']}, batch {found['batch_size']}",
        "",
    )
    cells = []
    for point in found["points"]:
        figures = [f"left out: {point['left_out']}", "", "", ""]
        if not point["left_out"]:
            memory = [_number(point["peak_memory_mb"]), _number(point["mb_per_layer"])]
            figures = [
                _spread(point["train_seconds"]),
                _number(1000 * point["seconds_per_layer"]),
                *memory,
            ]
        cells.append([point["variant"], point["fetch"], str(point["depth"]), *figures])
    yield from table(
        ["", "topology", "depth", "training step, s", "ms/layer", "peak memory, MB", "MB/layer"],
        cells,
    )
    yield ""
    for fit in found["fits"]:
        unit, scale = ("ms", 1000) if fit["quantity"] == "seconds_per_layer" else ("MB", 1)
        yield (
            f"- {fit['variant']}, {fit['fetch']}: {unit} per layer = {scale * fit['a']:.3g} "
            f"{'+' if fit['b'] >= 0 else '−'} {abs(scale * fit['b']):.3g}·log2(depth), R² {fit['r2']:.3f}; "
            f"from {fit['from']} to {fit['to']} layers ×{fit['growth']:.2f}, the logarithm ×{fit['log_growth']:.2f}"
        )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _spread(taken: Mapping[str, float]) -> str:
    return f"{_number(taken['median'])} ({_number(taken['min'])}–{_number(taken['max'])})"


def _number(value: float | None) -> str:
    """Three digits, and never an exponent."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"
