"""Time and memory of the implementations, side by side in one run and checked for equality before any timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import depth, measure
from benchmarks.bench.epoch import TRAIN, epochs, trained
from benchmarks.bench.equality import check
from benchmarks.bench.variants import OPTIONS, Variant, Workload, defaults
from sparsenet import zoo
from sparsenet.architecture import Architecture
from sparsenet.device import choose_device
from sparsenet.environment import environment
from sparsenet.records import read_json
from sparsenet.run import Run

__all__ = ["BenchConfig", "bench"]

MEASURES = ("step", "infer", "memory", "first", "epoch")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class BenchConfig:
    """What is compared, and in what. Raises ``ValueError`` naming the flag."""

    model: tuple[str, ...] = _option(
        ("sparsenet_100_24",), "names of 'sparsenet models', or run folders"
    )
    batch_size: int = _option(64, "images a step")
    image_size: int = _option(0, "pixels; 0: what the network is made for")
    steps: int = _option(5, "counted steps of each variant")
    precision: tuple[str, ...] = _option(
        (),
        "arithmetic of what is compared without --variants, as fp32,bf16; default: fp32 on a CPU, else both",
    )
    variants: tuple[str, ...] = _option(
        (),
        f"what to compare, as reference-fp32,shared-bf16; options: -{', -'.join(OPTIONS)}; default: all that can run",
    )
    compile: bool = _option(
        False, "compare the reference under torch.compile, too; it takes minutes"
    )
    measures: tuple[str, ...] = _option(
        MEASURES[:3],
        f"what to measure, of {','.join(MEASURES)}; none: nothing but what other flags ask for",
    )
    best_batch: bool = _option(
        False, "also the batch with the most images a second, found by doubling"
    )
    epoch: int = _option(
        -1, "also a whole epoch of so many images; 0: 50,000, or --steps batches on a CPU"
    )
    memory: bool = _option(False, "also what the peak of memory consists of")
    depths: tuple[int, ...] = _option(
        (), "also a sweep over depths, sparse and dense, as 40,100,250,500,1000"
    )
    device: str = _option("auto", "auto, cpu, cuda, …")

    def __post_init__(self) -> None:
        known = {"measures": (*MEASURES, "none"), "precision": ("fp32", "bf16")}
        for name in ("model", "measures"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: expected at least one name, found none")
        for name, allowed in known.items():
            for each in getattr(self, name):
                if each not in allowed:
                    raise ValueError(
                        f"--{name}: expected one or more of {','.join(allowed)}, found {each!r}"
                    )
        for name, least in (("batch_size", 1), ("image_size", 0), ("steps", 1), ("epoch", -1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name}: expected a whole number of at least {least}, found {getattr(self, name)}"
                )
        if self.depths and min(self.depths) < 7:
            raise ValueError(f"--depths: expected depths of at least 7, found {min(self.depths)}")
        for name in self.model:
            network, size = self.network(name)
            network.sizes(size)
        _ = self.asked
        if self.wants("epoch") and self.epoch > 0 and self.epoch < max(self.batch_size, 5):
            raise ValueError(
                f"--epoch: expected at least a batch of images and 5, found {self.epoch}"
            )

    def network(self, model: str) -> tuple[Architecture, int]:
        """The network of a name or of a run, and the pixels of its images."""
        if Path(model).is_dir():
            found, size = (
                Run.open(Path(model)).config().network,
                read_json(Path(model) / "graph.json").get("image_size"),
            )
        else:
            found, size = zoo.architecture(model), zoo.image_size(model)
        return found, self.image_size or size or 32

    def wants(self, measure: str) -> bool:
        return measure in self.measures or (measure == "epoch" and self.epoch >= 0)

    def images(self, device: torch.device, batch_size: int) -> int:
        """Of an epoch in such batches."""
        wanted = max(self.epoch, 0) or (TRAIN if device.type != "cpu" else batch_size * self.steps)
        return max(wanted, batch_size, 5)

    @cached_property
    def asked(self) -> tuple[Variant, ...]:
        return tuple(map(Variant.parse, self.variants))


def bench(config: BenchConfig) -> dict[str, Any]:
    """A JSON value: hardware, versions and commit; a row of figures for each network and variant; the depth sweep.

    Variants take turns step by step in this process. Memory, time to the first step and the best batch are measured
    in processes of their own. Raises ``ValueError`` where a variant that was asked for cannot run or is wrong.
    """
    device = choose_device(config.device)
    variants, absent = _select(config, device)
    rows = [row for name in config.model for row in _rows(config, name, variants, device)]
    found: dict[str, Any] = {
        "model": list(config.model), "batch_size": config.batch_size, "image_size": config.image_size,
        "precision": list(dict.fromkeys(v.precision for v in variants)), "steps": config.steps,
        "environment": dataclasses.asdict(environment(device)), "absent": absent, "rows": rows,
    }  # fmt: skip
    if config.depths:
        found["depth"] = _depths(config, variants, device)
    return found


def _select(config: BenchConfig, device: torch.device) -> tuple[list[Variant], dict[str, str]]:
    """What can run, and why the rest cannot; that is an error only where it was asked for."""
    precisions = config.precision or ("fp32", "bf16")[: 1 if device.type == "cpu" else 2]
    candidates = config.asked or tuple(defaults(precisions, config.compile, device))
    reasons = {variant: variant.absent(device) for variant in dict.fromkeys(candidates)}
    absent = {str(variant): reason for variant, reason in reasons.items() if reason}
    if config.asked and absent:
        name, reason = next(iter(absent.items()))
        raise ValueError(f"--variants: {name} cannot run here: {reason}")
    return [variant for variant, reason in reasons.items() if not reason], absent


def _rows(
    config: BenchConfig, name: str, variants: Sequence[Variant], device: torch.device
) -> list[dict[str, Any]]:
    """The figures of one network, a row for each variant."""
    if set(config.measures) == {"none"} and not (
        config.epoch >= 0 or config.memory or config.best_batch
    ):
        return []
    network, size = config.network(name)
    errors, times = _times(config, network, size, variants, device)
    work = {v: measure.work_of(v, network, config.batch_size, size, device) for v in variants}
    rows: dict[Variant, dict[str, Any]] = {
        v: {
            "model": name, "image_size": size, "batch_size": config.batch_size, "variant": str(v),
            "implementation": v.implementation, "precision": v.precision, "options": list(v.options),
            "errors": errors[v], **{f"{kind}_seconds": taken[v] for kind, taken in times.items()},
        }
        for v in variants
    }  # fmt: skip
    for v, row in rows.items():
        if config.wants("memory") or config.memory:
            row.update(measure.alone("memory", {**work[v], "parts": config.memory}))
        if config.wants("first"):
            row["first_step_seconds"] = measure.first_step(work[v])
        if config.best_batch:
            row["best_batch"] = measure.best_batch(config.steps, work[v])
    if config.wants("epoch"):
        _add_epochs(config, network, size, rows, device)
    return list(rows.values())


def _add_epochs(
    config: BenchConfig,
    network: Architecture,
    size: int,
    rows: dict[Variant, dict[str, Any]],
    device: torch.device,
) -> None:
    """Of the variants that the program can train, together at the batch of the call and each alone at its best one."""
    able = [v for v in rows if trained(v)]
    images = config.images(device, config.batch_size)
    for v, found in epochs(able, network, config.batch_size, size, device, images).items():
        rows[v]["epoch"] = found
    for v in able if config.best_batch else ():
        batch = rows[v]["best_batch"]["batch_size"]
        rows[v]["best_epoch"] = epochs(
            [v], network, batch, size, device, config.images(device, batch)
        )[v]


def _times(
    config: BenchConfig,
    network: Architecture,
    size: int,
    variants: Sequence[Variant],
    device: torch.device,
) -> tuple[dict[Variant, Any], dict[str, dict[Variant, measure.Spread]]]:
    """Errors of all variants, which are allowed, and then the seconds of a training step and an inference pass."""
    works = {v: Workload(v, network, config.batch_size, size, device) for v in variants}
    errors = check(works, network, config.batch_size, size)
    found = {}
    for kind, act in _kinds(config):
        for work in works.values():
            work.mode(training=kind == "train")
        acts = {v: act(work) for v, work in works.items()}
        found[kind] = measure.interleaved(acts, config.steps, device)
    return errors, found


def _kinds(config: BenchConfig) -> Iterator[tuple[str, Callable[[Workload], Callable[[], object]]]]:
    if config.wants("step"):
        yield "train", lambda work: work.step
    if config.wants("infer"):
        yield "infer", lambda work: work.infer


def _depths(
    config: BenchConfig, variants: Sequence[Variant], device: torch.device
) -> dict[str, Any]:
    size = config.image_size or 32
    for fetch in depth.FETCHES:
        least = depth.architecture(fetch, min(config.depths))
        check(
            {v: Workload(v, least, config.batch_size, size, device) for v in variants},
            least,
            config.batch_size,
            size,
        )
    return depth.sweep(variants, config.depths, config.batch_size, size, config.steps, device)
