"""How time and memory grow with depth: networks of growth rate 12, sparse and dense, and a line through them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.bench import measure, memory
from benchmarks.bench.variants import Variant
from sparsenet.architecture import Architecture
from sparsenet.graph import count

FETCHES = ("sparse", "dense")
GROWTH = 12
LONGEST = 120.0  # seconds that one network is worth
FROM = 100  # layers: where the comparison with the logarithm begins


def architecture(fetch: str, depth: int) -> Architecture:
    """The network whose depth is nearest, of those that three stages can have."""
    return Architecture(
        fetch=fetch, depth=4 + 3 * max(1, round((depth - 4) / 3)), growth_rate=GROWTH
    )


def sweep(
    variants: Sequence[Variant], depths: Sequence[int], batch_size: int, image_size: int, steps: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Time of a training step and peak memory per layer of each variant, topology and depth; and the fits."""
    points = [
        point
        for variant in variants
        for fetch in FETCHES
        for point in _points(variant, fetch, sorted(depths), batch_size, image_size, steps, device)
    ]
    return {"batch_size": batch_size, "growth_rate": GROWTH, "points": points, "fits": fits(points)}


def _points(
    variant: Variant, fetch: str, depths: Sequence[int], batch_size: int, image_size: int, steps: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    before: dict[str, Any] | None = None
    for depth in depths:
        network = architecture(fetch, depth)
        point = {
            "variant": str(variant),
            "fetch": fetch,
            "depth": network.depth,
            "layers": sum(network.stage_depths),
        }
        work = measure.work_of(variant, network, batch_size, image_size, device)
        reason = before and _too_large(before, network, image_size, device, steps)
        if not reason:
            try:
                found = measure.alone("throughput", {**work, "steps": steps})
                before = {**found, "architecture": network}
                point |= {key: found[key] for key in ("train_seconds", "peak_memory_mb")}
                point["seconds_per_layer"] = found["train_seconds"]["median"] / point["layers"]
                peak = found["peak_memory_mb"]
                point["mb_per_layer"] = None if peak is None else peak / point["layers"]
            except torch.OutOfMemoryError:
                reason = "out of memory"
        yield point | {"left_out": reason or None}
        if reason:
            return  # and so would be any deeper one


def _too_large(
    before: dict[str, Any], network: Architecture, image_size: int, device: torch.device, steps: int
) -> str | None:
    """Why a network is not tried, judged by the last one: time goes with the MACs, memory with what layers gather."""
    last: Architecture = before["architecture"]
    times = count(network, image_size)[1] / count(last, image_size)[1]
    needed = before["train_seconds"]["median"] * times * (steps + 2)
    if needed > LONGEST:
        return f"about {needed:.0f} s"
    free, peak = memory.available_mb() if device.type == "cpu" else None, before["peak_memory_mb"]
    if free is None or peak is None:
        return None  # an accelerator may be asked for more than it has
    gathered = peak * _gathered(network, image_size) / _gathered(last, image_size)
    return f"about {gathered:.0f} MB, {free:.0f} MB are free" if gathered > free else None


def _gathered(network: Architecture, image_size: int) -> int:
    pairs = zip(network.stages, network.sizes(image_size), strict=True)
    return sum(sum(stage.read_widths) * size * size for stage, size in pairs)


def fits(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each variant and topology ``quantity = a + b * log2(depth)`` by least squares, with R².

    ``growth`` is the quantity's from the first depth of at least 100 to the last, ``log_growth`` the logarithm's.
    """
    found = []
    for variant, fetch in dict.fromkeys((point["variant"], point["fetch"]) for point in points):
        own = [
            p
            for p in points
            if (p["variant"], p["fetch"]) == (variant, fetch) and not p["left_out"]
        ]
        for quantity in ("seconds_per_layer", "mb_per_layer"):
            pairs = [(math.log2(p["depth"]), p[quantity]) for p in own if p[quantity] is not None]
            if len(pairs) < 2:
                continue
            deep = [pair for pair in pairs if pair[0] >= math.log2(FROM)] or pairs
            (low, start), (high, end) = deep[0], deep[-1]
            line = fit(pairs)
            spans = {
                "from": round(2**low),
                "to": round(2**high),
                "growth": end / start,
                "log_growth": high / low,
            }
            found.append(
                {"variant": variant, "fetch": fetch, "quantity": quantity, **line, **spans}
            )
    return found


def fit(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The least-squares line ``a + b * x`` through points, and the share of the variance that it explains."""
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    b = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread if spread else 0.0
    a = mean_y - b * mean_x
    total = sum((y - mean_y) ** 2 for _, y in pairs)
    rest = sum((y - a - b * x) ** 2 for x, y in pairs)
    return {"a": a, "b": b, "r2": 1 - rest / total if total else 1.0}
