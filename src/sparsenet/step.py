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
from sparsenet.device import autocast
from sparsenet.ops.synchronised import counted
from sparsenet.optim import update_average
from sparsenet.ranks import ALONE, Ranks


@dataclass(frozen=True)
class TrainingStep:
    """Augmentation, forward, backward, update and average: all that a batch asks of the device.

    A call changes the model, the optimizer's state and the average in place, and never waits for
    the device, so that it can be recorded (``sparsenet.capture``). What changes from step to
    step is an argument, and so a tensor; dropout has to be seeded before each call.
    """

    model: nn.Module
    optimizer: torch.optim.SGD
    average: nn.Module | None
    config: RunConfig
    preprocessing: Preprocessing
    precision: str
    ranks: Ranks = ALONE
    class_weights: Tensor | None = None  # of ``balancing_weights``, on the model's device

    @cached_property
    def statistics(self) -> list[Tensor]:
        """Running statistics that differ from process to process: not common or frozen ones."""
        norms = [m for m in self.model.modules() if type(m) is nn.BatchNorm2d and m.training]
        buffers: list[Tensor | None] = []
        for norm in norms:
            buffers += [norm.running_mean, norm.running_var]
        return [buffer for buffer in buffers if buffer is not None]

    @cached_property
    def fill(self) -> Tensor:
        """The mean colour, uint8 ``(C,)``, for what lies beyond an image or is cut out."""
        mean = (torch.tensor(self.preprocessing.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return mean.to(next(self.model.parameters()).device)

    def __call__(
        self,
        pixels: Tensor,
        labels: Tensor,
        rate: Tensor,
        ema_rate: Tensor,
        weights: Tensor,
        *moves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Makes a step; returns ``loss_and_mistakes`` of the batch before the update.

        Of several processes each is given its part of the batch and what its means and sums count,
        *weights*, float32 ``(2,)``; all make the same update and return the same.
        *pixels*, uint8 ``(N, C, S, S)``, may be smaller than the data's; *labels* int64 ``(N,)``;
        the rates, ``()``, are of ``sparsenet.optim.epoch_rates``; *moves* are a ``Moves``.
        """
        optim = self.config.optim
        data = self.config.data.scaled(pixels.shape[-1], self.preprocessing.size)
        changes, shares = Moves(*moves), None
        images = self.preprocessing.normalise(augment(pixels, changes, data, self.fill))
        if data.mixup or data.cutmix:
            images, shares = mix(images, changes)
        with autocast(pixels.device, self.precision), counted(weights[1]):
            logits = self.model(images).float()
            settings = optim.label_smoothing, self.class_weights
            loss, mistakes = loss_and_mistakes(logits, labels, shares, *settings)
        # Here, so that gradients of a captured step have addresses of their own.
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks.size > 1:
            loss = loss * weights[0]
        loss.backward()
        if self.ranks.size > 1:
            loss, mistakes = self._add_up(loss.detach(), mistakes, weights)
        if optim.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if group["share"] == 1 else rate * group["share"]
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.model, ema_rate)
        return loss.detach(), mistakes

    def _add_up(self, loss: Tensor, mistakes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Adds gradients, statistics, loss and mistakes over all processes, in one reduction."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.statistics:
            torch._foreach_mul_(self.statistics, weights[0])
        counted = mistakes * weights[1]
        self.ranks.add([*gradients, *self.statistics, loss, counted])
        return loss, counted.round().to(mistakes.dtype)


def loss_and_mistakes(
    logits: Tensor,
    labels: Tensor,
    shares: Tensor | None,
    smoothing: float,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``()`` of logits ``(N, classes)``; the number of mistakes, int64 ``()``.

    Images that ``mix`` has mixed have two labels, each of which counts by its share, and the
    larger one is the right one; *shares*, float32 ``(N,)``, are those of the image's own label.

    With *class_weights*, float32 ``(classes,)``, a label counts by that of its class. The sum is
    divided by *N* and not by the weights of the batch, so that parts of a batch add up, and a
    batch of one class counts by its weight.
    """

    def losses(targets: Tensor, reduction: str) -> Tensor:
        if class_weights is None:
            return F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        each = each * class_weights[targets]
        return each.mean() if reduction == "mean" else each

    predicted = logits.detach().argmax(1)
    if shares is None:
        return losses(labels, "mean"), (predicted != labels).sum()
    partners = labels.flip(0)
    own_loss, partner_loss = (losses(each, "none") for each in (labels, partners))
    right = torch.where(shares < 0.5, partners, labels)
    return torch.lerp(partner_loss, own_loss, shares).mean(), (predicted != right).sum()


def balancing_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights, float32 ``(classes,)``, by which the images of each class come to the same sum.

    Their mean over the images is 1. A class without images has weight 0, which nothing counts by.
    """
    counts = torch.bincount(labels, minlength=classes).double()
    shares = len(labels) / (counts * (counts > 0).sum())
    return shares.where(counts > 0, 0).float()
