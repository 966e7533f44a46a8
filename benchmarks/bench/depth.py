"""How the time and memory of sparse and dense networks grow with their depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench.measure import TrainingCost, run_alone, training_cost
from benchmarks.bench.record import Point, Sweep
from benchmarks.bench.variants import Variant
from benchmarks.bench.workload import Case
from sparsenet.architecture import Architecture
from sparsenet.graph import count

FETCHES = ("sparse", "dense")
GROWTH_RATE = 12
LONGEST = 120.0  # seconds that one network may take


def network_of_depth(fetch: str, depth: int) -> Architecture:
    """Returns the network whose depth is nearest, of those that three stages can have."""
    layers = max(1, round((depth - 4) / 3))
    return Architecture(fetch=fetch, depth=4 + 3 * layers, growth_rate=GROWTH_RATE)


def sweep(variants: Sequence[Variant], depths: Sequence[int], template: Case, steps: int) -> Sweep:
    """Measures a training step of each variant, topology and depth; the template gives the rest."""
    points: list[Point] = []
    for variant in variants:
        for fetch in FETCHES:
            networks = [network_of_depth(fetch, depth) for depth in sorted(depths)]
            cases = [replace(template, network=network) for network in networks]
            points += _points(variant, fetch, cases, steps)
    return Sweep(template.batch_size, GROWTH_RATE, points)


def _points(variant: Variant, fetch: str, cases: Sequence[Case], steps: int) -> Iterator[Point]:
    """Yields points up to the first one that is left out, since deeper networks take more."""
    before: tuple[Case, TrainingCost] | None = None
    for case in cases:
        layers = sum(case.network.stage_depths)
        point = Point(str(variant), fetch, case.network.depth, layers)
        try:
            point.left_out = _too_large(case, *before, steps) if before else None
            if not point.left_out:
                cost = run_alone(training_cost, variant, case, steps, False)
        except torch.OutOfMemoryError:
            point.left_out = "out of memory"
        if not point.left_out:
            before = case, cost
            point.train_seconds = cost.train_seconds
            point.seconds_per_layer = cost.train_seconds.median / layers
            if cost.peak_memory_mb is not None:
                point.peak_memory_mb = cost.peak_memory_mb
                point.mb_per_layer = cost.peak_memory_mb / layers
        yield point
        if point.left_out:
            return


def _too_large(case: Case, last: Case, cost: TrainingCost, steps: int) -> str | None:
    """Says why *case* is not tried: time and memory grow with the multiply-accumulates."""
    macs, last_macs = (count(each.network, each.image_size)[1] for each in (case, last))
    seconds = cost.train_seconds.median * macs / last_macs * (steps + 2)
    if seconds > LONGEST:
        return f"about {seconds:.0f} s"
    free = available_mb() if case.device.type == "cpu" else None
    if free is None or cost.peak_memory_mb is None:
        return None  # an accelerator may be asked for more than it has
    needed = cost.peak_memory_mb * macs / last_macs
    return f"about {needed:.0f} MB, {free:.0f} MB are free" if needed > free else None


def available_mb() -> float | None:
    """Returns the memory that can be used without swapping; ``None`` where it is unknown."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None
