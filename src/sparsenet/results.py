"""What training measures: a row for each epoch, and the result of the run."""

from __future__ import annotations

from dataclasses import dataclass

from sparsenet.validation import Amount, Count, Percent


@dataclass(frozen=True)
class EpochMetrics:
    """A row of metrics.csv, whose columns are these fields; ``None`` is what was not measured.

    Losses are mean cross-entropies in nats, errors are percentages of wrong images.
    """

    epoch: Count  # from 1
    step: Count | None = None  # optimizer steps since the start of the run
    lr: Amount | None = None  # of the epoch's last step
    train_loss: Amount | None = None
    train_error: Percent | None = None
    val_loss: Amount | None = None
    val_error: Percent | None = None
    test_loss: Amount | None = None
    test_error: Percent | None = None
    seconds: Amount | None = None  # of training
    images_per_second: Amount | None = None  # of training
    eval_seconds: Amount | None = None  # of the pass over the test images
    peak_memory_mb: Amount | None = None


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
