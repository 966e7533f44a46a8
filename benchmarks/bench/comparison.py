"""What is compared, and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bench import depth, measure
from benchmarks.bench.epoch import TRAIN_IMAGES, can_train, measure_epochs
from benchmarks.bench.equality import check
from benchmarks.bench.record import Record, Row, Sweep
from benchmarks.bench.variants import Variant, default_variants
from benchmarks.bench.workload import Case, Workload
from sparsenet import zoo
from sparsenet.architecture import Architecture
from sparsenet.device import choose_device
from sparsenet.environment import environment
from sparsenet.files import read_json
from sparsenet.records import Costs
from sparsenet.run import Run

MEASURES = ("step", "infer", "memory", "parts", "first", "epoch")
FEWEST_IMAGES = 5  # of an epoch: CIFAR-10 has five files


@dataclass(frozen=True)
class BenchConfig:
    """What is compared and how: the flags of the command line, which says what they mean."""

    model: tuple[str, ...] = ("sparsenet_100_24",)
    batch_size: int = 64
    image_size: int = 0
    steps: int = 5
    precision: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    measures: tuple[str, ...] = MEASURES[:3]
    depths: tuple[int, ...] = ()
    device: str = "auto"

    def network_and_size(self, model: str) -> tuple[Architecture, int]:
        """Returns the network of a name or of a run folder, and the pixels of its images."""
        if Path(model).is_dir():
            network = Run.open(Path(model)).config().network
            size = read_json(Path(model) / "graph.json", Costs).image_size or 32
        else:
            network, size = zoo.architecture(model), zoo.image_size(model)
        network.sizes(self.image_size or size)  # an error where it is too small
        return network, self.image_size or size


def bench(config: BenchConfig) -> Record:
    """Measures each network and variant, and the depth sweep.

    Variants take turns step by step in this process. Memory, the time to the first step and the
    depth sweep are measured in processes of their own. Raises ``ValueError`` where a variant that
    was asked for cannot run or is wrong.
    """
    device = choose_device(config.device)
    networks = {model: config.network_and_size(model) for model in config.model}
    variants, absent = _select_variants(config, device)
    rows: list[Row] = []
    if config.measures != ("none",):
        for model, (network, image_size) in networks.items():
            case = Case(network, config.batch_size, image_size, device)
            rows += _compare(config, model, variants, case)
    return Record(
        model=config.model,
        batch_size=config.batch_size,
        image_size=config.image_size,
        precision=tuple(dict.fromkeys(variant.precision for variant in variants)),
        steps=config.steps,
        environment=environment(device),
        absent=absent,
        rows=rows,
        depth=_sweep(config, variants, device) if config.depths else None,
    )


def _select_variants(
    config: BenchConfig, device: torch.device
) -> tuple[list[Variant], dict[str, str]]:
    """Returns what can run, and why the rest cannot: an error only where it was asked for."""
    precisions = config.precision or ("fp32", "bf16")[: 1 if device.type == "cpu" else 2]
    able, absent = [], {}
    for variant in dict.fromkeys(config.variants or default_variants(precisions, device)):
        reason = variant.unavailable(device)
        if reason is None:
            able.append(variant)
        elif config.variants:
            raise ValueError(f"--variants: {variant} cannot run here: {reason}")
        else:
            absent[str(variant)] = reason
    return able, absent


def _compare(config: BenchConfig, model: str, variants: Sequence[Variant], case: Case) -> list[Row]:
    rows = {
        variant: Row(
            model=model,
            image_size=case.image_size,
            batch_size=case.batch_size,
            variant=str(variant),
            implementation=variant.implementation,
            precision=variant.precision,
            options=variant.options,
        )
        for variant in variants
    }
    _check_and_time(config, rows, case)
    for variant, row in rows.items():
        parts = "parts" in config.measures
        if parts or "memory" in config.measures:
            cost = measure.run_alone(measure.training_cost, variant, case, 1, parts)
            row.peak_memory_mb, row.memory_parts = cost.peak_memory_mb, cost.memory_parts
        if "first" in config.measures:
            row.first_step_seconds = measure.measure_first_step(variant, case)
    if "epoch" in config.measures:
        images = config.steps * case.batch_size if case.device.type == "cpu" else TRAIN_IMAGES
        images = max(images, case.batch_size, FEWEST_IMAGES)
        able = [variant for variant in variants if can_train(variant)]
        for variant, epoch in measure_epochs(able, case, images).items():
            rows[variant].epoch = epoch
    return list(rows.values())


def _check_and_time(config: BenchConfig, rows: dict[Variant, Row], case: Case) -> None:
    works = {variant: Workload(variant, case) for variant in rows}
    for variant, errors in check(works).items():
        rows[variant].errors = errors
    for name, field in (("step", "train_seconds"), ("infer", "infer_seconds")):
        if name in config.measures:
            for work in works.values():
                work.set_training(name == "step")
            acts = {variant: getattr(work, name) for variant, work in works.items()}
            for variant, seconds in measure.time_in_turns(acts, config.steps, case.device).items():
                setattr(rows[variant], field, seconds)


def _sweep(config: BenchConfig, variants: Sequence[Variant], device: torch.device) -> Sweep:
    for fetch in depth.FETCHES:
        network = depth.network_of_depth(fetch, min(config.depths))
        case = Case(network, config.batch_size, config.image_size or 32, device)
        check({variant: Workload(variant, case) for variant in variants})
    return depth.sweep(variants, config.depths, case, config.steps)
