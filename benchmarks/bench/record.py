"""What the benchmark measures, in the form of its JSON records.

These are structs, not dataclasses, because a record leaves out what was not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from sparsenet.environment import Environment


class Spread(msgspec.Struct, frozen=True):
    """Seconds of several repetitions."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


class Bounded(msgspec.Struct, frozen=True):
    """A relative error and the largest one that is allowed."""

    error: float
    allowed: float


class FirstStep(msgspec.Struct, frozen=True):
    """Seconds from the start of a process to the end of its first training step."""

    cold: float  # the compilers' caches are empty
    warm: float  # the compilers' caches are filled


class Epoch(msgspec.Struct, frozen=True):
    """Seconds of a training epoch and of a test pass, scaled to CIFAR-10's numbers of images."""

    batch_size: int
    images: int
    train_seconds: Spread
    test_seconds: Spread
    estimated_from_steps: int | None  # None: the epoch had as many images as CIFAR-10


class Row(msgspec.Struct, omit_defaults=True):
    """The figures of one variant of one network."""

    model: str
    image_size: int
    batch_size: int
    variant: str
    implementation: str
    precision: str
    options: tuple[str, ...]
    errors: dict[str, Bounded] = {}
    train_seconds: Spread | None = None  # of one training step
    infer_seconds: Spread | None = None  # of one inference pass
    peak_memory_mb: float | None = None  # of a training step, above the base
    memory_parts: dict[str, float] | None = None  # MB
    first_step_seconds: FirstStep | None = None
    epoch: Epoch | None = None


class Point(msgspec.Struct, omit_defaults=True):
    """A network of the depth sweep; *left_out* says why it has no figures."""

    variant: str
    fetch: str
    depth: int
    layers: int
    train_seconds: Spread | None = None
    peak_memory_mb: float | None = None
    seconds_per_layer: float | None = None
    mb_per_layer: float | None = None
    left_out: str | None = None


class Sweep(msgspec.Struct):
    """Time and memory over the depth."""

    batch_size: int
    growth_rate: int
    points: list[Point]


class Record(msgspec.Struct, omit_defaults=True):
    """Everything that one call measured."""

    model: tuple[str, ...]
    batch_size: int
    image_size: int  # 0: what each network is made for
    precision: tuple[str, ...]
    steps: int
    environment: Environment
    absent: dict[str, str]  # variants that could not run, and why
    rows: list[Row]
    depth: Sweep | None = None
    record: str = ""  # its name in the bench.jsonl of gpu.sh
