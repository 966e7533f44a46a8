"""Which implementation is the fastest here: a few small layers are timed once.

It depends on the processor, on PyTorch's build, on threads and on the precision, and no rule that
knows only names gets it right: bf16 in C is the fastest on one processor and far from it on another
that multiplies tiles. The result is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet.architecture import Architecture, StageLayout
from sparsenet.device import LEAST_SECONDS, device_name, end_idle_threads
from sparsenet.files import cache_folder, read_json, write_json
from sparsenet.memory import shortage
from sparsenet.ops.plan import Operands, Plan, Reader, Statistics

Clock = Callable[[], float]
Aggregate = Callable[[Plan, Tensor, Operands], Tensor]

MODES = ("training", "inference")
MARGIN = 1.05  # another implementation has to be faster by this factor than a preferred one
NETWORKS = (  # a stage of each is timed: plain layers that read several features, and bottlenecks
    Architecture(fetch="dense", blocks=(3,), growth_rate=24),
    Architecture(fetch="dense", blocks=(2,), growth_rate=24, bottleneck=True),
)
BATCHES = ((8, 32), (32, 8))  # images, pixels a side
ROUNDS = (3, 12)  # least and most, after one to warm up
SECONDS = 0.8  # after which only the least number of rounds is completed
LIMIT = 10.0  # seconds, after which no round is begun
BUSY = 0.8  # a thread gets less than this share of its time where other work has the cores
SETTINGS = (
    "CC",
    "CFLAGS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)


@dataclass(frozen=True)
class Timings:
    """Seconds by implementation, in order of preference.

    Training is forward and backward, inference is forward without a gradient. On a *busy* machine
    they are the time that one thread has had to itself.
    """

    training: dict[str, float]
    inference: dict[str, float]
    busy: bool = False

    def of(self, training: bool) -> dict[str, float]:
        return self.training if training else self.inference


@dataclass(frozen=True)
class _CachedTimings:
    """The content of a file in the user's cache."""

    conditions: dict[str, Any]
    timings: Timings


def fastest(seconds: Mapping[str, float]) -> str:
    """The first one, in order of preference, that takes at most ``MARGIN`` of the least."""
    least = min(seconds.values())
    return next(name for name, each in seconds.items() if each <= MARGIN * least)


def describe_speedup(name: str, seconds: Mapping[str, float]) -> str:
    """How many times as fast as the others *name* is: ``1.9 times shared, 3.1 times reference``."""
    others = [other for other in seconds if other != name]
    return ", ".join(f"{seconds[other] / seconds[name]:.1f} times {other}" for other in others)


# What this process has measured or read, because every forward pass asks.
_known: dict[tuple[torch.device, torch.dtype, int], Timings] = {}
_lock = threading.Lock()


def timings(
    device: torch.device,
    dtype: torch.dtype,
    implementations: Callable[[], Mapping[str, Aggregate]],
    anew: bool = False,
) -> Timings:
    """Those of the *implementations* that take *dtype* on *device*, in order of preference.

    They come from this process, from the user's cache or, with *anew* in any case, from a
    measurement that takes about a second. A cache that cannot be read or written is no error.
    """
    key = device, dtype, torch.get_num_threads()
    if key in _known and not anew:
        return _known[key]
    with _lock:
        if key not in _known or anew:
            _known[key] = _read_or_measure(device, dtype, implementations(), anew)
    return _known[key]


def _read_or_measure(
    device: torch.device, dtype: torch.dtype, implementations: Mapping[str, Aggregate], anew: bool
) -> Timings:
    conditions = _conditions(device, dtype, list(implementations))
    cached = None if anew else _read(conditions)
    if cached is not None:
        return cached
    measurement = measure(device, dtype, implementations)
    # Processes that begin together agree on what the first of them has written.
    cached = None if anew else _read(conditions)
    measurement = cached or measurement
    _write(conditions, measurement)
    return measurement


def measure(
    device: torch.device, dtype: torch.dtype, implementations: Mapping[str, Aggregate]
) -> Timings:
    """Times each implementation, in turns. One that raises an error for *dtype* is left out.

    On a CPU that other work keeps busy it is the time of one thread, which the other work hardly
    changes: for that long the process computes with one thread. All of it happens in a thread of
    its own, because autocast, inference mode and a default device hold for the caller's thread.
    """
    end_idle_threads()
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_measure, device, dtype, implementations).result()


def _measure(
    device: torch.device, dtype: torch.dtype, implementations: Mapping[str, Aggregate]
) -> Timings:
    threads, on_cpu = torch.get_num_threads(), device.type == "cpu"
    busy = on_cpu and threads > 1 and _cores_are_busy()
    clock = time.thread_time if busy or (on_cpu and threads == 1) else time.perf_counter
    workloads = [
        _Workload(network.stages[0], batch, device, dtype, clock)
        for network, batch in product(NETWORKS, BATCHES)
    ]
    if busy:  # threads that wait for each other take a hundred times as long as their work
        torch.set_num_threads(1)
    try:
        # Weights are fp32 and autocast casts each once a step, as in use.
        cast = dtype != torch.float32
        casting = torch.autocast(device.type, dtype, cache_enabled=False) if cast else None
        with casting or contextlib.nullcontext():
            return replace(_time_rounds(workloads, implementations), busy=busy)
    finally:
        if busy:
            torch.set_num_threads(threads)


def _cores_are_busy() -> bool:
    """Whether threads that work together have to wait for cores."""
    numbers = torch.ones(1 << 18, dtype=torch.float32, device="cpu")
    numbers.mul_(1.0)
    start, thread_start = time.perf_counter(), time.thread_time()
    for _ in range(5000):  # not without end where the clock stands still
        numbers.mul_(1.0)
        if time.perf_counter() - start >= 0.05:
            break
    return time.thread_time() - thread_start < BUSY * (time.perf_counter() - start)


def _time_rounds(
    workloads: Sequence[_Workload], implementations: Mapping[str, Aggregate]
) -> Timings:
    """For each workload the least of several rounds counts, in the sum over all workloads.

    The first round warms up, and counts where there is no time for another.
    """

    def time_all(mode: str, aggregate: Aggregate) -> list[float]:
        return [workload.seconds(mode, aggregate) for workload in workloads]

    start = time.perf_counter()
    warm_up: dict[str, dict[str, list[float]]] = {}  # implementation -> mode -> seconds
    for name, aggregate in implementations.items():
        try:
            warm_up[name] = {mode: time_all(mode, aggregate) for mode in MODES}
        except (RuntimeError, ValueError, TypeError) as error:
            if shortage(error):  # which passes, while timings are kept
                raise
    rounds = []
    for number in range(ROUNDS[1]):
        limit = LIMIT if number < ROUNDS[0] else SECONDS
        if time.perf_counter() - start > limit:
            break
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in warm_up}
        for mode, name in product(MODES, warm_up):
            seconds[name][mode] = time_all(mode, implementations[name])
        rounds.append(seconds)

    def least(name: str, mode: str) -> float:
        by_workload = zip(*(each[name][mode] for each in rounds or [warm_up]), strict=True)
        return math.fsum(min(column) for column in by_workload)

    training, inference = ({name: least(name, mode) for name in warm_up} for mode in MODES)
    return Timings(training, inference)


class _Workload:
    """A stage on random features; *batch* is the number of images and their side in pixels."""

    def __init__(
        self,
        stage: StageLayout,
        batch: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock,
    ):
        generator = torch.Generator().manual_seed(0)  # the global one is whoever's has seeded it

        def random(*shape: int) -> Tensor:
            numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return numbers.to(device)

        def reader(width: int, weight: Tensor | None) -> Reader:
            return Reader(random(width).requires_grad_(), random(width).requires_grad_(), weight)

        self.clock = clock
        self.plan = Plan(stage.reads, stage.aggregation)
        images, side = batch
        self.x = random(images, stage.in_width, side, side).to(dtype).requires_grad_()
        self.readers = []
        for layer in range(1, stage.topology.depth + 1):
            for width, kernel, out in stage.units(layer):
                weight = random(out, width, kernel, kernel) / (width * kernel)
                self.readers.append(reader(width, weight.requires_grad_()))
        self.readers.append(reader(stage.out_width, None))
        self.statistics = [Statistics(random(w), random(w).abs()) for w in stage.unit_widths]
        self.inputs = [self.x]
        self.inputs += [each for reader in self.readers for each in reader if each is not None]

    def seconds(self, mode: str, aggregate: Aggregate) -> float:
        """Those of one call, the device's work included."""
        training = mode == "training"
        start = self.clock()
        with torch.set_grad_enabled(training):
            result = aggregate(self.plan, self.x, Operands(self.readers, self.statistics, training))
            if training:
                result, *_ = torch.autograd.grad(result, self.inputs, result.detach().clone())
        result.flatten()[0].item()  # there is a value only when the device is done
        return max(self.clock() - start, LEAST_SECONDS)


def _write(conditions: dict[str, Any], timings: Timings) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        target = _file(conditions)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, _CachedTimings(conditions, timings))


def _read(conditions: dict[str, Any]) -> Timings | None:
    """What ``_write`` wrote; ``None`` where there is nothing or something else."""
    try:
        cached = read_json(_file(conditions), _CachedTimings)
    except (ValueError, RuntimeError):
        return None
    timings = cached.timings
    seconds = (*timings.training.values(), *timings.inference.values())
    named = set(timings.training)
    usable = (
        cached.conditions == conditions
        and named == set(timings.inference)
        and set() < named <= set(conditions["implementations"])
        and all(0 < each < math.inf for each in seconds)
    )
    return timings if usable else None


def _file(conditions: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"timings-{digest[:16]}.json"


def _conditions(
    device: torch.device, dtype: torch.dtype, implementations: list[str]
) -> dict[str, Any]:
    """All that timings depend on and that can change between processes, as a JSON value."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "device": device_name(device),
        # A virtual machine hides some of what the device's name promises.
        "capabilities": {name: str(value) for name, value in capabilities.items()},
        "torch": str(torch.__version__),
        "precision": str(dtype),
        "threads": torch.get_num_threads(),
        "implementations": implementations,
        "sources": _hash_of_sources(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


@cache
def _hash_of_sources() -> str:
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
