"""What training measures: a row for each epoch, and the result of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

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


def best_row(rows: Iterable[EpochMetrics]) -> EpochMetrics | None:
    """That of the first epoch with the lowest validation error, where it was measured."""
    measured = [row for row in rows if row.val_error is not None]
    return min(measured, key=attrgetter("val_error"), default=None)


FEW_IMAGES = 1000  # of which an error is known to within a few points at best
FAR_TIMES, FAR_POINTS = 2, 10  # the others' error, and percentage points above it
CHANCE = 0.01  # with which some class is called far worse where all classes are equally hard


@dataclass(frozen=True)
class ClassScores:
    """How a class is told from the others. Ratios are percentages, ``None`` where there are none.

    *f1* is the harmonic mean of the other two.
    """

    images: int  # of the class
    predicted: int  # images that are taken for it
    correct: int  # images that are both
    precision: float | None  # of those that are taken for it
    recall: float | None  # of the class
    f1: float | None

    @property
    def wrong(self) -> int:
        return self.images - self.correct


@dataclass(frozen=True)
class Scores:
    """What the error of a pass does not say. Ratios are percentages.

    Means over classes are over those that have images. The mean recall is the balanced accuracy;
    the precision of a class that nothing is taken for counts as 0.
    """

    balanced_accuracy: float
    macro_precision: float
    macro_f1: float
    confidence: float  # mean probability of the predicted classes
    calibration_error: float  # expected: mean distance of confidence and accuracy over 15 bins
    classes: dict[str, ClassScores]
    confusion: dict[str, dict[str, int]]  # images by true and predicted class, without zeros

    @property
    def class_errors(self) -> dict[str, float | None]:
        """Error of each class in percent; ``None`` where the data has no image of it."""
        return {
            name: round(100 * each.wrong / each.images, 4) if each.images else None
            for name, each in self.classes.items()
        }

    @property
    def worst(self) -> str | None:
        """The worst class whose error is far above that of all other images.

        It is far at twice that error and 10 points above it, and where chance would not do this to
        any class in 99 of 100 cases: Fisher's exact test of it against the others, for as many
        classes as have images.
        """
        there = {name: each for name, each in self.classes.items() if each.images}
        images = sum(each.images for each in there.values())
        wrong = sum(each.wrong for each in there.values())
        for name in sorted(there, key=lambda name: there[name].wrong / -there[name].images):
            one = there[name]
            if one.images == images:
                return None
            error = 100 * one.wrong / one.images
            others = 100 * (wrong - one.wrong) / (images - one.images)
            far = error >= max(FAR_TIMES * others, FAR_POINTS + others)
            if far and len(there) * _tail(images, wrong, one.images, one.wrong) <= CHANCE:
                return name
        return None

    @property
    def remark(self) -> str:
        """What to say of the ``worst`` class, if there is one."""
        if (name := self.worst) is None:
            return ""
        one = self.classes[name]
        return f"far worse than the others: {name}, {one.wrong} of {one.images} images wrong"


def likely(share: float, count: int) -> tuple[float, float]:
    """The shares that fit one of *share* among *count* in 95 of 100 cases: Wilson's interval."""
    z = 1.96  # standard deviations
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    whole = 1 + z * z / count
    return max((middle - reach) / whole, 0.0), min((middle + reach) / whole, 1.0)


def likely_range(error: float, images: int) -> str:
    """What an *error* in percent, of few *images*, would be of very many: ``, likely … to … %``.

    It is empty from ``FEW_IMAGES`` on.
    """
    if images >= FEW_IMAGES:
        return ""
    low, high = likely(error / 100, images)
    return f", likely {100 * low:.1f} to {100 * high:.1f} %"


def _tail(images: int, wrong: int, drawn: int, least: int) -> float:
    """The probability of *least* or more wrong ones among as many *images* as are *drawn*."""

    def ways(count: int, chosen: int) -> float:
        return math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)

    counts = range(max(least, drawn - images + wrong), min(drawn, wrong) + 1)
    right = images - wrong
    return sum(
        math.exp(ways(wrong, each) + ways(right, drawn - each) - ways(images, drawn))
        for each in counts
    )


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
    checkpoint: str  # why these weights: "lowest validation error", "last epoch" or "step 12"
    classes: tuple[str, ...]
    class_errors: dict[str, float | None]  # ``None``: no test image of the class
    tested_on: str = "test"  # what the images are: also "validation" or "held-out"
    scores: Scores | None = None  # which older versions did not write
