"""Which implementation is the fastest here: measured once, on a few small layers, and kept in the user's cache.

It depends on the processor, on PyTorch's build, on threads and on the precision, and no rule that knows only names gets
it right: bf16 in C is the fastest there is on one processor and far from it on another that multiplies tiles.
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
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsenet.architecture import Architecture, Stage
from sparsenet.device import device_name
from sparsenet.files import cache_folder, write_atomic
from sparsenet.ops.plan import Plan, Reader, Statistics

Clock = Callable[[], float]
Aggregate = Callable[[Plan, Tensor, Sequence[Reader], Sequence[Statistics], bool], Tensor]

KINDS = ("training", "inference")
MARGIN = 1.05  # by how much another has to be faster than one that is preferred
NETWORKS = (  # a stage of each is timed: plain layers that read several features, and bottlenecks
    Architecture(fetch="dense", blocks=(3,), growth_rate=24),
    Architecture(fetch="dense", blocks=(2,), growth_rate=24, bottleneck=True),
)
BATCHES = ((8, 32), (32, 8))  # images, pixels a side
ROUNDS = (3, 12)  # least and most, after one to warm up
SECONDS = 0.8  # after which no further round is begun but the least
LIMIT = 10.0  # seconds, after which none is
BUSY = 0.8  # the share of its time that a thread gets on a machine left alone, at least
SETTINGS = (
    "CC",
    "CFLAGS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)


class Figures(NamedTuple):
    """Seconds by implementation, in order of preference: forward and backward, and forward without a gradient."""

    training: dict[str, float]
    inference: dict[str, float]
    busy: bool = (
        False  # whether other work had the cores: then the time that one thread has had to itself
    )

    def of(self, training: bool) -> dict[str, float]:
        return self.training if training else self.inference


def fastest(seconds: Mapping[str, float]) -> str:
    """The first one, in order of preference, that takes at most :data:`MARGIN` of the least."""
    least = min(seconds.values())
    return next(name for name, each in seconds.items() if each <= MARGIN * least)


def compared(name: str, seconds: Mapping[str, float]) -> str:
    """``1.9 times shared, 3.1 times reference``: how many times as fast as the others *name* is."""
    return ", ".join(
        f"{each / seconds[name]:.1f} times {other}"
        for other, each in seconds.items()
        if other != name
    )


_known: dict[
    tuple[torch.device, torch.dtype, int], Figures
] = {}  # by this process: every forward asks
_one_at_a_time = threading.Lock()


def figures(
    device: torch.device,
    dtype: torch.dtype,
    able: Callable[[], Mapping[str, Aggregate]],
    anew: bool = False,
) -> Figures:
    """Of the implementations that are *able* to run on *device*, those that take *dtype*, in order of preference.

    From this process, from the user's cache or, with *anew* in any case, measured now, which takes about a second.
    A cache that cannot be read or written is no error.
    """
    place = device, dtype, torch.get_num_threads()
    if place in _known and not anew:
        return _known[place]
    with _one_at_a_time:
        if place not in _known or anew:
            implementations = able()
            key = _key(device, dtype, tuple(implementations))
            found = None if anew else _read(key)
            if found is None:
                measured = measure(device, dtype, implementations)
                found = (
                    None if anew else _read(key)
                ) or measured  # processes that begin together agree
                keep(key, found)
            _known[place] = found
    return _known[place]


def measure(
    device: torch.device, dtype: torch.dtype, implementations: Mapping[str, Aggregate]
) -> Figures:
    """Times each, in turns; of several rounds the least. What raises an error for *dtype* is left out.

    On a CPU that other work keeps busy it is the time of one thread, which the other work hardly changes.
    In a thread of its own, since what the caller has switched on (autocast, inference mode, a default device) holds
    for the caller's thread. Random numbers are a generator's own. The number of threads belongs to the process: where
    cores are busy it is 1 as long as this takes, for other threads of the program too.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_measure, device, dtype, implementations).result()


def _measure(
    device: torch.device, dtype: torch.dtype, implementations: Mapping[str, Aggregate]
) -> Figures:
    threads, on_cpu = torch.get_num_threads(), device.type == "cpu"
    busy = on_cpu and threads > 1 and _busy()
    clock = time.thread_time if busy or (on_cpu and threads == 1) else time.perf_counter
    works = [
        _Work(network.stages[0], batch, device, dtype, clock)
        for network, batch in product(NETWORKS, BATCHES)
    ]
    # Weights are fp32 and cast by autocast, each once a step, as in use.
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        if not busy:
            return _timed(works, implementations)
        torch.set_num_threads(
            1
        )  # two that wait for each other take a hundred times as long as their work
        try:
            return _timed(works, implementations)._replace(busy=True)
        finally:
            torch.set_num_threads(threads)


def _busy() -> bool:
    """Whether threads that work together have to wait for cores."""
    numbers = torch.ones(1 << 18, dtype=torch.float32, device="cpu")
    numbers.mul_(1.0)
    begun, own = time.perf_counter(), time.thread_time()
    while time.perf_counter() - begun < 0.05:
        numbers.mul_(1.0)
    return time.thread_time() - own < BUSY * (time.perf_counter() - begun)


def _timed(works: Sequence[_Work], implementations: Mapping[str, Aggregate]) -> Figures:
    """Seconds by kind and implementation; the first round warms up, and counts where there is time for no other."""
    begun, able = time.perf_counter(), dict[str, Aggregate]()
    rounds: list[dict[tuple[str, str], list[float]]] = [{}]
    for name, aggregate in implementations.items():
        with contextlib.suppress(RuntimeError, ValueError, TypeError, MemoryError):
            rounds[0] |= {
                (kind, name): [work.seconds(kind, aggregate) for work in works] for kind in KINDS
            }
            able[name] = aggregate
    for number in range(ROUNDS[1]):
        if time.perf_counter() - begun > (LIMIT if number < ROUNDS[0] else SECONDS):
            break
        turns = product(KINDS, able)
        rounds.append(
            {
                (kind, name): [work.seconds(kind, able[name]) for work in works]
                for kind, name in turns
            }
        )

    def least(kind: str, name: str) -> float:
        columns = zip(*(each[kind, name] for each in rounds[1:] or rounds), strict=True)
        return math.fsum(min(column) for column in columns)

    training, inference = ({name: least(kind, name) for name in able} for kind in KINDS)
    return Figures(training, inference)


class _Work:
    """A stage on random features; *batch* is the number of images and their side."""

    def __init__(
        self,
        stage: Stage,
        batch: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock,
    ):
        self.clock = clock
        images, side = batch
        generator = torch.Generator().manual_seed(
            0
        )  # never the global one: whoever seeded it gets what they expect

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(
                device
            )

        def reader(width: int, *weight: Tensor) -> Reader:
            return Reader(*(random(width).requires_grad_() for _ in range(2)), *(weight or (None,)))

        units = [
            unit for layer in range(1, stage.topology.depth + 1) for unit in stage.units(layer)
        ]
        weights = [
            random(out, width, kernel, kernel).div_(width * kernel).requires_grad_()
            for width, kernel, out in units
        ]
        self.plan = Plan(stage.reads, stage.aggregation)
        self.x = random(images, stage.in_width, side, side).to(dtype).requires_grad_()
        self.readers = [reader(weight.shape[1], weight) for weight in weights] + [
            reader(stage.out_width)
        ]
        self.statistics = [
            Statistics(random(width), random(width).abs()) for width in stage.unit_widths
        ]
        self.learned = [tensor for each in self.readers for tensor in each if tensor is not None]

    def seconds(self, kind: str, aggregate: Aggregate) -> float:
        """Of one call, the device's work included."""
        begun = self.clock()
        with torch.set_grad_enabled(kind == "training"):
            found = aggregate(self.plan, self.x, self.readers, self.statistics, kind == "training")
            if kind == "training":
                found = torch.autograd.grad(found, [self.x, *self.learned], found.detach().clone())[
                    0
                ]
        found.flatten()[0].item()  # there is a value only when the device is done
        return self.clock() - begun


def keep(key: Mapping[str, Any], figures: Figures) -> None:
    """Writes *figures* to the user's cache, whole or not at all."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        target = _file(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, json.dumps({"of": key, **figures._asdict()}, indent=2) + "\n")


def _read(key: Mapping[str, Any]) -> Figures | None:
    """What :func:`keep` wrote; ``None`` where there is none, or something else."""
    try:
        value = json.loads(_file(key).read_text())
        training, inference = (
            {str(name): float(each) for name, each in value[kind].items()} for kind in KINDS
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None
    usable = all(0 < each < math.inf for each in (*training.values(), *inference.values()))
    found = Figures(training, inference, bool(value.get("busy")))
    return found if usable and value.get("of") == key else None


def _file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"figures-{digest[:16]}.json"


def _key(
    device: torch.device, dtype: torch.dtype, implementations: Sequence[str]
) -> dict[str, Any]:
    """All that the figures depend on and can change between processes, as a JSON value."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return {
        "device": device_name(device),
        "capabilities": {
            name: str(found) for name, found in capabilities().items()
        },  # a virtual machine hides some
        "torch": torch.__version__,
        "precision": str(dtype),
        "threads": torch.get_num_threads(),
        "implementations": list(implementations),
        "sources": _sources(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


@cache
def _sources() -> str:
    """A hash of the implementations' code."""
    files = sorted(
        path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".c", ".h")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
