"""The clock, and measurements that need a process of their own: memory, the first step, the best batch."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.bench import memory
from benchmarks.bench.variants import Variant, Workload
from sparsenet.architecture import Architecture
from sparsenet.memory import memory_mb, peak_memory_mb

WARM_UP = 1  # rounds, after those of the check
SAMPLE = 0.05  # seconds that a sample takes at least on an accelerator, whose clock is read by waiting for it
GAIN = 1.03  # of images a second, below which a batch of twice the size is not worth it
FULL = (
    "OutOfMemoryError",
    "can't allocate memory",
    "MemoryError",
)  # how a process says that memory is full
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")

Key = TypeVar("Key")
Spread = dict[str, float]


def spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(act: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one of *repeats* calls, the device's work included."""
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        act()
    wait(device)
    return (time.perf_counter() - begin) / repeats


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def interleaved(
    acts: Mapping[Key, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Key, Spread]:
    """Seconds of each act, which take turns, so that all see the same machine; warm-up rounds do not count."""
    repeats = dict.fromkeys(acts, 1)
    found: dict[Key, list[float]] = {key: [] for key in acts}
    for turn in range(WARM_UP + rounds):
        for key, act in acts.items():
            taken = seconds(act, device, repeats[key])
            if turn >= WARM_UP:
                found[key].append(taken)
            elif device.type != "cpu":
                repeats[key] = max(1, round(SAMPLE / taken))
    return {key: spread(values) for key, values in found.items()}


def alone(task: str, work: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """What ``TASKS[task](**work)`` returns in a process of its own.

    Raises ``torch.OutOfMemoryError``, or ``ValueError`` with the last line of any other failure.
    """
    call = json.dumps([task, torch.get_num_threads(), work])
    command = [sys.executable, "-m", "benchmarks.bench.worker", call]
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if found.returncode:
        said = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        if found.returncode == -signal.SIGKILL or any(word in found.stderr for word in FULL):
            raise torch.OutOfMemoryError(f"bench: {task} of {work['variant']}: out of memory")
        raise ValueError(f"bench: {task} of {work['variant']} failed: {said}")
    return json.loads(found.stdout.splitlines()[-1])


def work_of(
    variant: Variant, architecture: Architecture, batch_size: int, size: int, device: torch.device
) -> Any:
    """The keywords that make a workload in another process."""
    return {
        "variant": str(variant), "architecture": architecture.to_dict(), "batch_size": batch_size,
        "image_size": size, "device": str(device),
    }  # fmt: skip


def made(
    variant: str, architecture: Mapping[str, Any], batch_size: int, image_size: int, device: str
) -> Workload:
    """The workload that :func:`work_of` described."""
    where = torch.device(device)
    return Workload(
        Variant.parse(variant), Architecture(**architecture), batch_size, image_size, where
    )


def measure_memory(parts: bool = False, **description: Any) -> dict[str, Any]:
    """Peak memory of training above the base (model, optimizer and data made), in MB.

    With *parts* also what it consists of, unless it is recorded or compiled: then tensors cannot be watched.
    """
    work = made(**description)
    base = memory_mb(work.device)
    work.mode(training=True)
    work.settle(work.step)
    work.step()
    peak = _peak_above(base, work.device)
    if (
        parts
        and peak is not None
        and not {"captured", "compiled"}.intersection(work.variant.options)
    ):
        return {"peak_memory_mb": peak, "memory_parts": memory.parts(work, peak)}
    return {"peak_memory_mb": peak}


def _peak_above(base: float | None, device: torch.device) -> float | None:
    """In MB; ``None`` where the device does not say."""
    wait(device)
    peak = peak_memory_mb(device)
    return None if base is None or peak is None else round(peak - base, 1)


def measure_first(since: float = 0.0, **description: Any) -> dict[str, float]:
    """Seconds from the moment *since* (Unix time) to the end of the first step, recorded or compiled if asked for."""
    work = made(**description)
    work.mode(training=True)
    work.settle(work.step)
    wait(work.device)
    return {"seconds": time.time() - since}


def first_step(work: Mapping[str, Any]) -> dict[str, float]:
    """Seconds from the start of a process to the end of the first training step: caches empty, and filled."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, name)) for name in CACHES}
        cold, warm = (
            alone("first", {**work, "since": time.time()}, caches)["seconds"] for _ in range(2)
        )
    return {"cold": cold, "warm": warm}


def measure_throughput(steps: int = 3, **description: Any) -> dict[str, Any]:
    """Images a second in training and inference, and the peak of memory above the base, in MB."""
    work = made(**description)
    base = memory_mb(work.device)
    found: dict[str, Any] = {"batch_size": len(work.images)}
    for kind, training in (("train", True), ("infer", False)):
        work.mode(training)
        act = work.step if training else work.infer
        work.settle(act)
        taken = interleaved({kind: act}, steps, work.device)[kind]
        found[f"{kind}_seconds"] = taken
        found[f"{kind}_images_per_second"] = len(work.images) / taken["median"]
        if training:
            found["peak_memory_mb"] = _peak_above(base, work.device)
    return found


def best_batch(steps: int, work: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, doubled from that of *work*, with the most images a second in training; and how the search ended."""
    trials: list[dict[str, Any]] = []
    batch = work["batch_size"]
    while True:
        if reason := _too_large(trials, work["device"]):
            break
        try:
            trials.append(alone("throughput", {**work, "batch_size": batch, "steps": steps}))
        except torch.OutOfMemoryError:
            reason = f"batch {batch} does not fit into memory"
            break
        rates = [trial["train_images_per_second"] for trial in trials]
        if len(rates) > 1 and rates[-1] < GAIN * rates[-2]:
            reason = f"batch {batch} gains less than {GAIN - 1:.0%}"
            break
        batch *= 2
    if not trials:
        raise torch.OutOfMemoryError(f"bench: {work['variant']}: {reason}")
    return {
        **max(trials, key=lambda trial: trial["train_images_per_second"]),
        "trials": trials,
        "ended": reason,
    }


def _too_large(trials: list[dict[str, Any]], device: str) -> str | None:
    """Whether twice the last batch would not fit: a CPU's memory is shared, so it is better not tried out."""
    peak = trials[-1]["peak_memory_mb"] if trials and device == "cpu" else None
    if peak is not None and (free := memory.available_mb()) is not None:
        needed = 2 * peak
        if needed > free:
            return f"batch {2 * trials[-1]['batch_size']} needs about {needed:.0f} MB, {free:.0f} MB are free"
    return None


TASKS: dict[str, Callable[..., Any]] = {
    "memory": measure_memory,
    "first": measure_first,
    "throughput": measure_throughput,
}
