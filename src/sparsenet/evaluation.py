"""One pass over labelled images: errors, loss, scores of each class, calibration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.capture import Captured
from sparsenet.data.dataset import Images
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.data.sampling import Batches, batch_ends
from sparsenet.device import autocast
from sparsenet.ops.plan import MOMENTUM
from sparsenet.ops.synchronised import counted
from sparsenet.ranks import ALONE, Ranks
from sparsenet.results import ClassScores, Scores

CALIBRATION_BINS = 15  # as usual since arXiv:1706.04599
Scorer = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # an EvaluationStep, captured or not


class NotFiniteError(ValueError):
    """What a network computes for an image is no number, so it names no class."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a pass; entry *i* of each tensor, on the CPU, belongs to image *i*."""

    loss: float  # mean cross-entropy, nats
    seconds: float  # wall time of the pass, the copy to the device included
    labels: Tensor  # (N,) int64
    predicted: Tensor  # (N,) int64
    confidence: Tensor  # (N,) float32: probability of the predicted class
    in_top5: Tensor  # (N,) bool
    probabilities: Tensor | None = None  # (N, classes) float32, where they were asked for

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def error(self) -> float:
        """Wrong images in percent."""
        return 100 * (self.predicted != self.labels).double().mean().item()

    @property
    def top5_error(self) -> float:
        """Images whose class is not among the five most probable, in percent."""
        return 100 * (~self.in_top5).double().mean().item()

    def scores(self, names: Sequence[str]) -> Scores:
        """What *names*, those of the classes, come to."""
        right = self.labels[self.predicted == self.labels]
        counts = [
            torch.bincount(each, minlength=len(names)).tolist()
            for each in (self.labels, self.predicted, right)
        ]
        classes = dict(zip(names, map(_class_scores, *counts), strict=True))
        there = [each for each in classes.values() if each.images]
        pairs, numbers = torch.stack([self.labels, self.predicted], 1).unique(
            dim=0, return_counts=True
        )
        confusion: dict[str, dict[str, int]] = {}
        for (label, predicted), number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            confusion.setdefault(names[label], {})[names[predicted]] = number
        bins = calibration(self.confidence, self.predicted == self.labels)
        return Scores(
            balanced_accuracy=fmean(each.recall or 0.0 for each in there),
            macro_precision=fmean(each.precision or 0.0 for each in there),
            macro_f1=fmean(each.f1 or 0.0 for each in there),
            confidence=100 * self.confidence.double().mean().item(),
            calibration_error=100 * (bins[1] - bins[2]).abs().sum().item() / self.images,
            classes=classes,
            confusion=confusion,
        )


def _class_scores(images: int, predicted: int, correct: int) -> ClassScores:
    def percent(count: int) -> float | None:
        return 100 * correct / count if count else None

    f1 = percent(images + predicted)
    precision, recall = percent(predicted), percent(images)
    return ClassScores(images, predicted, correct, precision, recall, f1 and 2 * f1)


def calibration(confidence: Tensor, right: Tensor) -> Tensor:
    """Sums over bins of confidence, float64 ``(3, bins)``: images, their confidence, right ones.

    Bin *i* of the ``CALIBRATION_BINS`` of equal width holds a *confidence* ``(N,)`` above
    *i*/bins and up to (*i* + 1)/bins; *right* ``(N,)`` is whether the prediction is true.
    """
    inner = torch.arange(1, CALIBRATION_BINS, dtype=torch.float64) / CALIBRATION_BINS
    exact = confidence.double()
    places = torch.bucketize(exact, inner)
    values = torch.stack([torch.ones_like(exact), exact, right.double()])
    return torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64).index_add_(1, places, values)


@dataclass(frozen=True)
class EvaluationStep:
    """The work that ``evaluate`` has with a batch."""

    model: nn.Module
    preprocessing: Preprocessing
    precision: str
    tell_all: bool = False
    mirrored: bool = False

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Losses, predicted classes, confidences and top-5 hits, ``(N,)`` each.

        With *tell_all* the probabilities of all classes, ``(N, classes)``, come last. *mirrored*
        probabilities are the means of those of an image and its mirror image. The loss of
        an image with a logit that is not finite is NaN, whatever its class is. *pixels* are uint8
        ``(N, C, S, S)`` and *labels* int64 ``(N,)``.
        """
        logits = self._logits(pixels)
        finite = logits.isfinite().all(1)
        if self.mirrored:
            both = torch.stack([logits, self._logits(pixels.flip(3))])
            finite = both.isfinite().all(2).all(0)
            logits = both.log_softmax(2).logsumexp(0) - math.log(2)
        probabilities = logits.softmax(1)
        confidence, predicted = probabilities.max(1)
        top5 = logits.topk(min(5, logits.shape[1]), 1).indices
        # Of equal logits ``topk`` may leave out the one that is predicted.
        in_top5 = (top5 == labels[:, None]).any(1) | (predicted == labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        losses = losses.where(finite, torch.nan)
        found = losses, predicted, confidence, in_top5
        return (*found, probabilities) if self.tell_all else found

    def _logits(self, pixels: Tensor) -> Tensor:
        with autocast(pixels.device, self.precision):
            logits: Tensor = self.model(self.preprocessing.normalise(pixels))
        return logits.float()


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 64,
    precision: str = "fp32",
    ranks: Ranks = ALONE,
) -> None:
    """Sets the running statistics of *model* to the means of those of batches of *images*.

    The *images* come in their order, in which classes must be mixed. Several *ranks* share out each
    batch.

    After few steps, running ones still are mostly what they began with, and averaged weights have
    statistics of other weights.
    """
    was_training = model.training
    model.train()
    running = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.startswith("running_") and module.training  # and not frozen
    ]
    if not running:
        model.train(was_training)
        return
    sums = [torch.zeros_like(buffer) for buffer in running]
    sizes = [end - first for first, end in pairwise([0, *batch_ends(len(images), batch_size)])]
    batches = Batches(images, batch_size, device=device, ranks=ranks)
    for (pixels, _), size in zip(batches, sizes, strict=True):
        for buffer in running:
            buffer.zero_()  # so that it becomes MOMENTUM times that of the batch
        share, count = ranks.shares(size)
        with autocast(device, precision), counted(count):
            model(preprocessing.normalise(pixels))
        share *= size / (MOMENTUM * len(images))
        for total, buffer in zip(sums, running, strict=True):
            total.add_(buffer, alpha=share)
    ranks.add(sums)
    for total, buffer in zip(sums, running, strict=True):
        buffer.copy_(total)
    model.train(was_training)


@torch.no_grad()
def evaluate(
    step: EvaluationStep,
    images: Images,
    device: torch.device,
    batch_size: int = 256,
    score: Scorer | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluates *images*, in order, by *step*, whose model is in evaluation mode meanwhile.

    Several *ranks* take a piece of the images each, and all return the result of the whole.

    *score* is the *step* as it was captured once for many passes; by default this pass captures it
    where it can.

    Raises ``NotFiniteError`` naming the first image for which a logit or the loss is not finite.
    """
    model, score = step.model, score or Captured(step)
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    results = [
        (labels, *score(pixels, labels))
        for pixels, labels in Batches(images[ranks.piece(len(images))], batch_size, device=device)
    ]
    model.train(was_training)
    columns = [torch.cat(column).cpu() for column in zip(*results, strict=True)]
    pieces = filter(None, ranks.gather(columns))  # of few images some ranks have none
    labels, losses, *others = (torch.cat(column) for column in zip(*pieces, strict=True))
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    if wrong:
        found = f"NaN or infinity (as for {len(wrong)} of {len(labels)} images)"
        raise NotFiniteError(f"image {wrong[0]}: expected finite logits and loss, found {found}")
    seconds = max(time.perf_counter() - start, 0.0)  # a clock may go back
    return Evaluation(losses.double().mean().item(), seconds, labels, *others)
