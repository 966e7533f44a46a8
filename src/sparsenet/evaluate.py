"""One pass over labelled images: error, top-5 error, loss, the error of each class."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.capture import Captured
from sparsenet.data.dataset import Images
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.data.sampling import Batches, batch_ends
from sparsenet.device import autocast
from sparsenet.ops.plan import MOMENTUM
from sparsenet.ranks import ALONE, Ranks

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

    def class_errors(self, names: Sequence[str]) -> dict[str, float | None]:
        """Error of each class in percent; ``None`` where the data has no image of it."""
        totals, wrong = (
            torch.bincount(labels, minlength=len(names)).double()
            for labels in (self.labels, self.labels[self.predicted != self.labels])
        )
        errors = (100 * wrong / totals).tolist()
        return {
            name: round(error, 4) if total else None
            for name, error, total in zip(names, errors, totals.tolist(), strict=True)
        }


@dataclass(frozen=True)
class EvaluationStep:
    """The work that ``evaluate`` has with a batch."""

    model: nn.Module
    preprocessing: Preprocessing
    precision: str

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Losses, predicted classes, confidences and top-5 hits, ``(N,)`` each.

        The loss of an image with a logit that is not finite is NaN, whatever its class is.
        *pixels* are uint8 ``(N, C, S, S)`` and *labels* int64 ``(N,)``.
        """
        with autocast(pixels.device, self.precision):
            logits = self.model(self.preprocessing.normalise(pixels))
        logits = logits.float()
        confidence, predicted = logits.softmax(1).max(1)
        top5 = logits.topk(min(5, logits.shape[1]), 1).indices
        losses = F.cross_entropy(logits, labels, reduction="none")
        losses = losses.where(logits.isfinite().all(1), torch.nan)
        return losses, predicted, confidence, (top5 == labels[:, None]).any(1)


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
    sums = [torch.zeros_like(buffer) for buffer in running]
    sizes = [end - first for first, end in pairwise([0, *batch_ends(len(images), batch_size)])]
    batches = Batches(images, batch_size, device=device, ranks=ranks)
    for (pixels, _), size in zip(batches, sizes, strict=True):
        for buffer in running:
            buffer.zero_()  # so that it becomes MOMENTUM times that of the batch
        with autocast(device, precision):
            model(preprocessing.normalise(pixels))
        share = ranks.shares(size)[0] * size / (MOMENTUM * len(images))
        for total, buffer in zip(sums, running, strict=True):
            total.add_(buffer, alpha=share)
    ranks.add(sums)
    for total, buffer in zip(sums, running, strict=True):
        buffer.copy_(total)
    model.train(was_training)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 256,
    precision: str = "fp32",
    score: Scorer | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Runs *model* in evaluation mode over *images*, in order, and restores its mode afterwards.

    Several *ranks* take a piece of the images each, and all return the result of the whole.

    *score* is the model's ``EvaluationStep``, for whoever wants it captured once for many
    passes; by default this pass makes one and captures it where it can.

    Raises ``NotFiniteError`` naming the first image for which a logit or the loss is not finite.
    """
    score = score or Captured(EvaluationStep(model, preprocessing, precision))
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
