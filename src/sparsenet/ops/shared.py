"""The engine's passes in PyTorch's own operations, for every device that has them; fp64 too.

The features are kept normalised, so that a reader's scale and shift are a batch norm with mean 0
and variance 1, the one pass of PyTorch that applies them at the parameters' precision.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sparsenet.device import TRAITS
from sparsenet.ops import engine, reference
from sparsenet.ops.plan import EPS, MOMENTUM, Operands, Plan

RECIPROCAL_DEVIATION, VARIANCE = 0.5, 4.0  # of 0 and 4


def unavailable(device: torch.device) -> str | None:
    if _saved_statistic(device) in (RECIPROCAL_DEVIATION, VARIANCE):
        return None
    return f"expected a batch norm on {device} that saves its statistics, found one that does not"


@cache
def _saved_statistic(device: torch.device) -> float:
    """What a batch norm of 0 and 4 saves beside the mean: not on each device what PyTorch says.

    Ascend's saves the variance, which its own backward pass expects.
    """
    if device.type in TRAITS:
        return RECIPROCAL_DEVIATION
    x = torch.tensor([0.0, 4.0], device=device).view(2, 1, 1, 1)
    saved = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 0.0)[2]
    return round(saved.item(), 3)


def aggregate(plan: Plan, x: Tensor, operands: Operands) -> Tensor:
    """The stage output; without a gradient in evaluation the reference is as lean, so it runs."""
    if operands.training or torch.is_grad_enabled():
        return engine.aggregate(Shared, plan, x, operands)
    return reference.aggregate(plan, x, operands)


class Shared(engine.Engine):
    reader_in_buffers: int | None = None  # whose input and activation the buffers hold

    @property
    def statistics_dtype(self) -> torch.dtype:
        return self.scales[0].dtype

    def store_feature(self, j: int, feature: Tensor) -> None:
        feature = feature.contiguous(memory_format=self.call.layout)
        out = self.features[j]
        mean, rstd = self.mean_and_rstd(j)
        if self.takes_statistics and self.call.group:
            wide = feature.to(self.call.sum_dtype)
            var, of_all = torch.var_mean(wide, (0, 2, 3), correction=0)
            of_all, var = self.synchronise(j, of_all, var)
            self.move_running_statistics(j, of_all, var)
            mean.copy_(of_all)
            rstd.copy_((var + EPS).rsqrt())
            _batch_norm(feature, None, None, of_all, var, EPS, out)
        elif self.takes_statistics:
            running = self.running_statistics[j]
            to = out, mean, rstd
            torch.native_batch_norm(feature, None, None, *running, True, MOMENTUM, EPS, out=to)
            if _saved_statistic(self.call.device) == VARIANCE:
                rstd.add_(EPS).rsqrt_()
        elif self.running_statistics:
            _batch_norm(feature, None, None, *self.running_statistics[j], EPS, out)
        else:
            _batch_norm(feature, None, None, mean, rstd**-2, 0.0, out)

    def write_activation(self, r: int, out: Tensor) -> None:
        gathered = self.gather_buffer(r)
        torch.cat([self.features[j] for j in self.plan.reads[r]], 1, out=gathered)
        statistics = _standard(self.scales[r])
        _batch_norm(gathered, self.scales[r], self.shifts[r], *statistics, 0.0, out)
        out.relu_()
        self.reader_in_buffers = r

    def gather_buffer(self, r: int) -> Tensor:
        """The features that reader *r* gathers, once ``write_activation`` has been called."""
        return self.buffer("gathered", len(self.scales[r]))

    def stage_input(self) -> Tensor:
        mean, rstd = self.mean_and_rstd(0)
        z = self.features[0]
        return (z / rstd.view(-1, 1, 1) + mean.view(-1, 1, 1)).to(z.dtype)

    def backward_activation(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        activated = self.buffer("activations", len(self.scales[r]))
        if self.reader_in_buffers != r:
            self.write_activation(r, activated)
        is_output = r == len(self.scales) - 1  # whose gradient belongs to the caller
        g = torch.empty_like(activated) if is_output else d_activated
        torch.ops.aten.threshold_backward.grad_input(d_activated, activated, 0, grad_input=g)
        scale, gathered = self.scales[r], self.gather_buffer(r)
        _, d_scale, d_shift = _batch_norm_backward(g, gathered, scale, False, [False, True, True])
        g.mul_(scale.to(g.dtype).view(-1, 1, 1))
        read = self.plan.reads[r]
        for j, part in zip(read, g.split([self.widths[j] for j in read], 1), strict=True):
            if self.plan.first_gradient_from[j] == r:
                self.gradient_sums[j].copy_(part)
            else:
                self.gradient_sums[j].add_(part)
        return d_scale, d_shift

    def synchronise_totals(self, j: int) -> None:
        if self.is_synchronised(j):  # else PyTorch's batch norm finds them
            h, z = self.gradient_sums[j], self.features[j]
            ones = torch.ones(self.widths[j], dtype=self.call.sum_dtype, device=self.call.device)
            _, hz, h = _batch_norm_backward(h, z, ones, False, [False, True, True])
            self.gradient_totals[:, self.channels(j)] = torch.stack([h, hz])
        super().synchronise_totals(j)

    def feature_gradient(self, j: int) -> Tensor:
        # The gradient of a batch norm whose input has mean 0 and deviation 1, scaled by rstd.
        _, rstd = self.mean_and_rstd(j)
        h, z, training = self.gradient_sums[j], self.features[j], self.call.training
        if training and self.call.group:
            means = self.gradient_totals[:, self.channels(j)] / self.call.pixels
            of_h, of_hz = means.view(2, -1, 1, 1)
            d_feature: Tensor = (h - of_h - z * of_hz) * rstd.view(-1, 1, 1)
            return d_feature.to(h.dtype)
        return _batch_norm_backward(h, z, rstd, training, [True, False, False])[0]


def _batch_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """Writes *x*, normalised by the given mean and variance, scaled and shifted, to *out*."""
    no_statistics = mean.new_empty(0), mean.new_empty(0)
    torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps, out=(out, *no_statistics))


def _batch_norm_backward(
    d_out: Tensor, x: Tensor, scale: Tensor, training: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The *wanted* ones of the gradients of x, scale and shift, for an *x* that is normalised."""
    statistics = _standard(scale)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        d_out, x, scale, *statistics, *statistics, training, 0.0, wanted
    )
    return gradients


def _standard(like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance (and reciprocal deviation) of data that is normalised."""
    return torch.zeros_like(like), torch.ones_like(like)
