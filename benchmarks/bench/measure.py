"""The clock, and what is measured in a process of its own: memory and the first step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.bench.record import FirstStep, Spread
from benchmarks.bench.variants import Variant
from benchmarks.bench.workload import Case, Workload
from sparsenet.device import tune_process
from sparsenet.memory import memory_mb, peak_memory_mb

WARM_UP_ROUNDS = 1  # after those of the check
SAMPLE = 0.05  # seconds: an accelerator's clock is read by waiting, so a sample takes at least this
OUT_OF_MEMORY = "can't allocate memory"  # what PyTorch's allocator for CPUs says
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
IN_BASE = ("parameters", "running statistics", "batch")  # parts that exist before the first step

Key = TypeVar("Key")
Result = TypeVar("Result")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def time_calls(act: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Returns the wall time of one of *repeats* calls in seconds, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        act()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def time_in_turns(
    acts: Mapping[Key, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Key, Spread]:
    """Times all *acts* in each round, so that all see the same machine."""
    repeats = dict.fromkeys(acts, 1)
    seconds: dict[Key, list[float]] = {key: [] for key in acts}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for key, act in acts.items():
            taken = time_calls(act, device, repeats[key])
            if turn >= WARM_UP_ROUNDS:
                seconds[key].append(taken)
            elif device.type != "cpu":
                repeats[key] = max(1, round(SAMPLE / taken))
    return {key: Spread.of(values) for key, values in seconds.items()}


def run_alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Returns ``function(*arguments)`` of a process of its own.

    Raises ``torch.OutOfMemoryError``, or ``ValueError`` with any other reason of a failure.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    call = (sender, torch.get_num_threads(), function, arguments)
    process = context.Process(target=_send_result, args=call)
    process.start()
    sender.close()
    try:
        result: Result | Failure = receiver.recv()
    except EOFError:
        result = Failure("the process ended early")
    process.join()
    if not isinstance(result, Failure):
        return result
    what = f"{function.__name__} of {arguments[0]}"
    if result.out_of_memory or process.exitcode == -signal.SIGKILL:
        raise torch.OutOfMemoryError(f"{what}: out of memory")
    raise ValueError(f"{what} failed with exit code {process.exitcode}: {result.reason}")


@dataclass(frozen=True)
class Failure:
    """What a process sends instead of a result."""

    reason: str
    out_of_memory: bool = False


def _send_result(
    sender: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    tune_process()
    torch.set_num_threads(threads)
    try:
        sender.send(function(*arguments))
    except BaseException as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        full = full or OUT_OF_MEMORY in str(error)
        sender.send(Failure(f"{type(error).__name__}: {error}", full))
        if not full:
            raise


@dataclass(frozen=True)
class TrainingCost:
    """What a training step takes in a process of its own."""

    peak_memory_mb: float | None  # above the base: model, optimizer and data; None: unknown
    memory_parts: dict[str, float] | None
    train_seconds: Spread


def training_cost(variant: Variant, case: Case, steps: int, with_parts: bool) -> TrainingCost:
    """Measures the time of training steps and their peak memory, on request with its parts.

    Parts are left out where steps are recorded or compiled: tensors cannot be watched there.
    """
    work = Workload(variant, case)
    base = memory_mb(work.device)
    work.set_training(True)
    work.warm_up(work.step)
    seconds = time_in_turns({"step": work.step}, steps, work.device)["step"]
    peak = peak_memory_mb(work.device)
    if base is None or peak is None:
        return TrainingCost(None, None, seconds)
    above_base, parts = round(peak - base, 1), None
    if with_parts and not {"captured", "compiled"}.intersection(variant.options):
        parts = parts_of_memory(work, above_base)
    return TrainingCost(above_base, parts, seconds)


def parts_of_memory(work: Workload, peak: float) -> dict[str, float]:
    """Divides the peak of memory by what it is for, in MB.

    ``other`` is what is neither a part of the model nor kept for the backward pass.
    """
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    states = [state.values() for state in work.optimizer.state.values()]
    groups: dict[str, Iterable[Any]] = {
        "parameters": work.model.parameters(),
        "running statistics": work.model.buffers(),
        "batch": [work.images, work.labels],
        "gradients": [gradient for _, gradient in work.gradients()],
        "optimizer state": [value for values in states for value in values],
        "saved for backward": saved,
    }
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        work.step()
    parts = {}
    counted: set[int] = set()
    for name, tensors in groups.items():
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
            if isinstance(tensor, Tensor)
        }
        new = storages.keys() - counted
        parts[name] = sum(storages[address] for address in new) / 1e6
        counted |= new
    parts["other"] = peak - sum(size for name, size in parts.items() if name not in IN_BASE)
    return {name: round(size, 1) for name, size in parts.items()}


def measure_first_step(variant: Variant, case: Case) -> FirstStep:
    """Measures the first step of two new processes: with empty caches, and with those it filled."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, name)) for name in CACHES}
        cold = run_alone(seconds_to_first_step, variant, case, time.time(), caches)
        warm = run_alone(seconds_to_first_step, variant, case, time.time(), caches)
    return FirstStep(cold, warm)


def seconds_to_first_step(
    variant: Variant, case: Case, since: float, caches: Mapping[str, str]
) -> float:
    """Returns the seconds from *since* (Unix time) to the end of the first training step."""
    os.environ.update(caches)
    work = Workload(variant, case)
    work.set_training(True)
    work.warm_up(work.step)
    synchronize(work.device)
    return time.time() - since
