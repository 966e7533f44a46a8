"""One training step as a function of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.config import RunConfig
from sparsenet.data.augment import Moves, augment, mix
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.optim import update_average


@dataclass(frozen=True)
class TrainingStep:
    """Augmentation, forward, backward, update and average: all that one batch asks of the device.

    Changes the model, the optimizer's state and the average in place, and never waits for the device, so that it can
    be recorded (:mod:`sparsenet.capture`). What changes from step to step is an argument, and so
    a tensor; what draws random numbers (dropout) is to be seeded before each call.
    """

    model: nn.Module
    optimizer: torch.optim.SGD
    average: nn.Module | None
    config: RunConfig
    preprocessing: Preprocessing
    precision: str

    @cached_property
    def fill(self) -> Tensor:
        """What lies beyond an image and where it is cut out: the mean colour, uint8 ``(C,)``."""
        mean = (torch.tensor(self.preprocessing.mean) * 255).round().to(torch.uint8)
        return mean.to(next(self.model.parameters()).device)

    def __call__(
        self, pixels: Tensor, labels: Tensor, rate: Tensor, share: Tensor, *moves: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch's mean loss, float32 ``()``, and its wrong images, int64 ``()``, both from before the update.

        Takes pixels uint8 ``(N, C, S, S)`` and labels int64 ``(N,)`` as they are in the data, at full size or smaller;
        the learning rate and the average's share of :func:`sparsenet.optim.schedule`, ``()``; and a :class:`Moves`.
        """
        settings, data = (
            self.config.optim,
            self.config.data.scaled(pixels.shape[-1], self.preprocessing.size),
        )
        changes, shares = Moves(*moves), None
        images = self.preprocessing.normalise(augment(pixels, changes, data, self.fill))
        if data.mixup or data.cutmix:
            images, shares = mix(images, changes)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images).float()
            loss, wrong = judge(logits, labels, shares, settings.label_smoothing)
        self.optimizer.zero_grad(
            set_to_none=True
        )  # within: a graph's gradients have addresses of their own
        loss.backward()
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.model, share)
        return loss.detach(), wrong


def judge(
    logits: Tensor, labels: Tensor, shares: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``()`` of logits ``(N, classes)`` and how many classes are wrong, int64 ``()``.

    Of images that :func:`mix` has mixed, each label counts by its share, float32 ``(N,)`` being the image's own; a
    class is wrong if it is not that with the larger share.
    """
    predicted = logits.detach().argmax(1)
    if shares is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), (
            predicted != labels
        ).sum()
    others = labels.flip(0)
    own, other = (
        F.cross_entropy(logits, each, reduction="none", label_smoothing=smoothing)
        for each in (labels, others)
    )
    larger = torch.where(shares < 0.5, others, labels)
    return torch.lerp(other, own, shares).mean(), (predicted != larger).sum()
