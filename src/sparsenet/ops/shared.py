"""The engine's passes in PyTorch's own operations, for every device that has them; fp64 too.

The features are kept normalised, so that a reader's scale and shift are a batch norm with mean 0 and variance 1,
the one pass of PyTorch that applies them at the parameters' precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsenet.ops import engine, reference
from sparsenet.ops.plan import EPS, MOMENTUM, Plan, Reader, Statistics


def unavailable(device: torch.device) -> str | None:
    return None


def aggregate(
    plan: Plan,
    x: Tensor,
    readers: Sequence[Reader],
    statistics: Sequence[Statistics],
    training: bool,
) -> Tensor:
    """The stage output; without a gradient to come there is nothing to share, and the reference is as lean."""
    if training or torch.is_grad_enabled():
        return engine.aggregate(Shared, plan, x, readers, statistics, training)
    return reference.aggregate(plan, x, readers, statistics, training)


class Shared(engine.Engine):
    held: int | None = None  # the reader whose input the buffers hold

    def put(self, j: int, made: Tensor, statistics: Statistics | None, training: bool) -> None:
        made = made.contiguous(memory_format=self.layout)
        mean, rstd = self.mean_and_rstd(j)
        if statistics is None:
            self._normalise(made, mean, rstd**-2, 0.0, self.features[j])
        elif training:
            torch.native_batch_norm(
                made,
                None,
                None,
                *statistics,
                True,
                MOMENTUM,
                EPS,
                out=(self.features[j], mean, rstd),
            )
        else:
            self._normalise(made, *statistics, EPS, self.features[j])

    @staticmethod
    def _normalise(made: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor) -> None:
        none = mean.new_empty(0), mean.new_empty(0)
        torch.native_batch_norm(made, None, None, mean, var, False, 0.0, eps, out=(out, *none))

    def activate(self, r: int, out: Tensor) -> None:
        gathered = self.gathered(r)
        torch.cat([self.features[j] for j in self.plan.reads[r]], 1, out=gathered)
        zero, one = _standard(self.scales[r])
        none = zero.new_empty(0), zero.new_empty(0)
        affine = self.scales[r], self.shifts[r]
        torch.native_batch_norm(gathered, *affine, zero, one, False, 0.0, 0.0, out=(out, *none))
        out.relu_()
        self.held = r

    def gathered(self, r: int) -> Tensor:
        """What reader *r* gathers, normalised: a buffer that the last :meth:`activate` has filled."""
        return self.buffer("gathers", len(self.scales[r]))

    def collect(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        activated = self.buffer("activations", len(self.scales[r]))
        if self.held != r:
            self.activate(r, activated)
        last = r == len(self.scales) - 1  # its gradient is the caller's
        target = torch.empty_like(activated) if last else d_activated
        d_affine = torch.ops.aten.threshold_backward.grad_input(
            d_activated, activated, 0, grad_input=target
        )
        scale = self.scales[r]
        zero, one = _standard(scale)
        _, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
            d_affine, self.gathered(r), scale, zero, one, zero, one, False, 0.0, [False, True, True]
        )
        d_affine.mul_(scale.to(d_affine.dtype).view(-1, 1, 1))
        read = self.plan.reads[r]
        for j, part in zip(read, d_affine.split([self.widths[j] for j in read], 1), strict=True):
            if self.plan.sent_first[j] == r:
                self.sums[j].copy_(part)
            else:
                self.sums[j].add_(part)
        return d_scale, d_shift

    def corrected(self, j: int, training: bool) -> Tensor:
        # The gradient of a batch norm whose input already has mean 0 and deviation 1, scaled by rstd.
        _, rstd = self.mean_and_rstd(j)
        zero, one = _standard(rstd)
        d_made: Tensor = torch.ops.aten.native_batch_norm_backward(
            self.sums[j],
            self.features[j],
            rstd,
            zero,
            one,
            zero,
            one,
            training,
            0.0,
            [True, False, False],
        )[0]
        return d_made


def _standard(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (or reciprocal deviation) of data that is already normalised."""
    return torch.zeros_like(like), torch.ones_like(like)
