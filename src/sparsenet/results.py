"""What training measures: a row for each epoch, and the result of the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochMetrics:
    """A row of metrics.csv, whose columns are these fields; ``None`` is what was not measured.

    Losses are mean cross-entropies in nats, errors are percentages of wrong images.
    """

    epoch: int  # from 1
    step: int | None = None  # optimizer steps since the start of the run
    lr: float | None = None  # of the epoch's last step
    train_loss: float | None = None
    train_error: float | None = None
    val_loss: float | None = None
    val_error: float | None = None
    test_loss: float | None = None
    test_error: float | None = None
    seconds: float | None = None  # of training
    images_per_second: float | None = None  # of training
    eval_seconds: float | None = None  # of the pass over the test images
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The final evaluation on the test images: what result.json holds. Errors are percentages."""

    dataset: str
    error: float
    top5_error: float
    loss: float  # mean cross-entropy, nats
    images: int
    seconds: float
    epochs: int  # that the evaluated weights were trained for
    checkpoint: str  # why these weights: "last epoch" or "lowest validation error"
    classes: tuple[str, ...]
    class_errors: dict[str, float | None]  # ``None``: no test image of the class
    tested_on: str = "test"  # what the images are: also "validation" or "held-out"
