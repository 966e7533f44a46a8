"""What training yields to whoever iterates over it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsenet.results import EpochMetrics, TrainingResult

T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class Reading:
    """Images are being read, before training begins."""

    split: str  # or "files" that are fetched, "sizes", or in the end "statistics"
    done: int  # images
    total: int


@dataclass(frozen=True)
class Step:
    """A training step was made; ``loss`` and ``error`` are means over the epoch so far."""

    epoch: int  # from 1
    step: int  # within the epoch, from 1
    steps: int
    epochs: int
    loss: float
    error: float  # percent
    images_per_second: float


@dataclass(frozen=True)
class EpochDone:
    """An epoch was finished; ``metrics`` is its row in metrics.csv.

    *chosen_on* and *tested_on* are what the images are called that its ``val_error`` and
    ``test_error`` are of.
    """

    metrics: EpochMetrics
    epochs: int
    chosen_on: str = "validation"
    tested_on: str = "test"


@dataclass(frozen=True)
class Stopped:
    """The run ended before its last epoch; everything that was made is *saved*."""

    reason: str
    saved: bool = True  # not where it was stopped before its first step


@dataclass(frozen=True)
class Concluded:
    """The best weights were evaluated; ``result`` is what result.json holds."""

    result: TrainingResult


Event = Message | Reading | Step | EpochDone | Stopped | Concluded


def drained(work: Generator[Any, None, T]) -> T:
    """What a generator returns once all that it yields was taken."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
