"""The same arithmetic with statistics once per feature and nothing stored but the normalised features.

A feature ``x`` is normalised once, ``z = (x - mean) * rstd``, whoever reads it. Reader *i* uses
``relu(scale_i * z + shift_i)`` of what it gathers, which is recomputed in backward instead of stored. In
backward the readers' gradients with respect to ``z`` are summed into ``h``, and one correction per feature gives

    dx = rstd * (h - mean(h) - z * mean(h * z)),

where the textbook corrects once per link. Means run over batch and pixels. Exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsenet.ops import reference
from sparsenet.ops.plan import EPS, MOMENTUM, Plan, Reader, Statistics


def aggregate(
    plan: Plan, x: Tensor, readers: Sequence[Reader], statistics: Sequence[Statistics], training: bool
) -> Tensor:
    """The activated stage output ``(N, C_out, H, W)``, equal to the reference's in exact arithmetic.

    Raises ``ValueError`` for one value per channel in training, which has no variance.
    """
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"batch norm: expected more than 1 value per channel in training, found {list(x.shape)}")
    if not training and not torch.is_grad_enabled():
        return reference.aggregate(plan, x, readers, statistics, False)
    weights = [reader.weight for reader in readers[:-1]]
    scales, shifts = [reader.scale for reader in readers], [reader.shift for reader in readers]
    return _Aggregate.apply(plan, statistics, training, x, *scales, *shifts, *weights)  # type: ignore[no-any-return,no-untyped-call]


class _Aggregate(torch.autograd.Function):
    """Inputs: the stage input ``(N, C, H, W)``, then all scales, all shifts, all convolution weights."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        statistics: Sequence[Statistics],
        training: bool,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        scales, shifts, weights = _by_kind(plan, parameters)
        normed = _block(x, [x.shape[1], *(len(weight) for weight in weights)])
        rstds: list[Tensor] = []
        masks: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            x = x.contiguous(memory_format=_layout(x))
            inputs, outputs = _Buffer(x, scales), _Buffer(x, scales)
            for r, read in enumerate(plan.reads):
                unread = plan.topology.last_reader[r] == 0
                rstds.append(x.new_empty(0) if unread else _normalise(x, statistics[r], training, normed[r]))
                gathered = inputs.gathered([normed[j] for j in read])
                made = r < len(weights)
                target = outputs.of_width(gathered.shape[1]) if made else torch.empty_like(gathered)
                activated = _activate(gathered, scales[r], shifts[r], target)
                if made:
                    weight = weights[r].to(x.dtype)
                    x = torch.conv2d(activated, weight, padding=weight.shape[-1] // 2)
                    if training and plan.dropout:
                        x, mask = torch.native_dropout(x, plan.dropout, True)
                        masks.append(mask)
        ctx.save_for_backward(*parameters, *normed, *rstds, *masks)
        ctx.plan, ctx.training = plan, training
        return activated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_activated: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        n, saved = len(plan.reads), ctx.saved_tensors
        scales, shifts, weights = _by_kind(plan, saved[: 3 * n - 1])
        normed, rstds, masks = saved[3 * n - 1 : 4 * n - 1], saved[4 * n - 1 : 5 * n - 1], saved[5 * n - 1 :]
        d_scales: list[Tensor | None] = [None] * n
        d_shifts: list[Tensor | None] = [None] * n
        d_weights: list[Tensor | None] = [None] * (n - 1)
        sums = _block(normed[0], [feature.shape[1] for feature in normed])  # h of each feature
        begun = [False] * n  # whether a reader has put its gradient there
        with torch.autocast(normed[0].device.type, enabled=False):
            inputs, outputs = _Buffer(normed[0], scales), _Buffer(normed[0], scales)
            for r in reversed(range(n)):
                if r < n - 1 and not begun[r + 1]:
                    continue  # nobody reads what this reader makes
                gathered = inputs.gathered([normed[j] for j in plan.reads[r]])
                activated = _activate(gathered, scales[r], shifts[r], outputs.of_width(gathered.shape[1]))
                if r < n - 1:
                    d_made = _normalise_backward(sums[r + 1], normed[r + 1], rstds[r + 1], ctx.training)
                    if masks:
                        d_made = torch.ops.aten.native_dropout_backward(d_made, masks[r], 1 / (1 - plan.dropout))
                    d_activated, d_weights[r] = _convolve_backward(d_made, activated, weights[r])
                d_gathered, d_scales[r], d_shifts[r] = _activate_backward(
                    d_activated, activated, gathered, scales[r], in_place=r < n - 1
                )
                _share_out(d_gathered, plan.reads[r], sums, begun)
            d_x = _normalise_backward(sums[0], normed[0], rstds[0], ctx.training) if begun[0] else None
        return (None, None, None, d_x, *d_scales, *d_shifts, *d_weights)


def _by_kind(plan: Plan, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    n = len(plan.reads)
    return parameters[:n], parameters[n : 2 * n], parameters[2 * n :]


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of the stage input is kept throughout: which one is faster depends on the device."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _block(like: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Uninitialised features of these widths in one allocation, which leaves no holes behind."""
    n, _, height, columns = like.shape
    pixels = n * height * columns
    parts = like.new_empty(pixels * sum(widths)).split([pixels * width for width in widths])
    return [_view(part, like, width) for part, width in zip(parts, widths, strict=True)]


def _view(flat: Tensor, like: Tensor, width: int) -> Tensor:
    n, _, height, columns = like.shape
    if _layout(like) == torch.channels_last:
        return flat.view(n, height, columns, width).permute(0, 3, 1, 2)
    return flat.view(n, width, height, columns)


class _Buffer:
    """Memory for the widest reader, used again by every reader: fresh pages cost more than the arithmetic."""

    def __init__(self, like: Tensor, scales: Sequence[Tensor]):
        self.like = like
        self.pixels = like.numel() // like.shape[1]
        self.flat = like.new_empty(self.pixels * max(len(scale) for scale in scales))

    def of_width(self, width: int) -> Tensor:
        return _view(self.flat[: self.pixels * width], self.like, width)

    def gathered(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(features), 1, out=self.of_width(sum(feature.shape[1] for feature in features)))


def _normalise(x: Tensor, statistics: Statistics, training: bool, out: Tensor) -> Tensor:
    mean, var = statistics
    saved = [mean.new_empty(len(mean) if training else 0) for _ in range(2)]
    torch.native_batch_norm(x, None, None, mean, var, training, MOMENTUM, EPS, out=(out, *saved))
    return saved[1] if training else (var + EPS).rsqrt()


def _standard(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (or reciprocal deviation) of data that is already normalised."""
    return torch.zeros_like(like), torch.ones_like(like)


def _normalise_backward(h: Tensor, normed: Tensor, rstd: Tensor, training: bool) -> Tensor:
    # The gradient of a batch norm whose input already has mean 0 and deviation 1, scaled by rstd.
    zero, one = _standard(rstd)
    grads = torch.ops.aten.native_batch_norm_backward(
        h, normed, rstd, zero, one, zero, one, training, 0.0, [True, False, False]
    )
    return grads[0]  # type: ignore[no-any-return]


def _activate(gathered: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    # A batch norm with mean 0 and variance 1 is the affine map, in one pass and at the parameters' precision.
    zero, one = _standard(scale)
    saved = scale.new_empty(0), scale.new_empty(0)
    torch.native_batch_norm(gathered, scale, shift, zero, one, False, 0.0, 0.0, out=(out, *saved))
    return out.relu_()


def _activate_backward(
    d_activated: Tensor, activated: Tensor, gathered: Tensor, scale: Tensor, in_place: bool
) -> tuple[Tensor, Tensor, Tensor]:
    target = d_activated if in_place else torch.empty_like(activated)
    d_affine = torch.ops.aten.threshold_backward.grad_input(d_activated, activated, 0, grad_input=target)
    zero, one = _standard(scale)
    _, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
        d_affine, gathered, scale, zero, one, zero, one, False, 0.0, [False, True, True]
    )
    return d_affine.mul_(scale.to(d_affine.dtype).view(-1, 1, 1)), d_scale, d_shift


def _convolve_backward(d_made: Tensor, activated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    padding = weight.shape[-1] // 2
    d_activated, d_weight, _ = torch.ops.aten.convolution_backward(
        d_made, activated, weight.to(activated.dtype), None,
        [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, True, False],
    )  # fmt: skip
    return d_activated, d_weight.to(weight.dtype)


def _share_out(d_gathered: Tensor, read: Sequence[int], sums: list[Tensor], begun: list[bool]) -> None:
    parts = d_gathered.split([sums[j].shape[1] for j in read], 1)
    for j, part in zip(read, parts, strict=True):
        if begun[j]:
            sums[j].add_(part)
        else:
            sums[j].copy_(part)
        begun[j] = True
