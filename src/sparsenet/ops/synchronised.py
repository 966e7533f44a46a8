"""Statistics over all processes of a group: one reduction a feature, in forward and in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup"  # not there in builds of PyTorch for one process


def group_of(module: torch.nn.SyncBatchNorm) -> Group | None:
    """The processes that *module* shares its statistics with; ``None`` for no other."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


_share: float | Tensor = 1.0  # that the images of this process count by


@contextmanager
def counted(share: float | Tensor) -> Iterator[None]:
    """Lets images count by *share*, ``()``, where several processes have the same ones."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


class UnreachableError(RuntimeError):
    """Another process of the group does not answer."""


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduced(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(d_sum, ctx.group), None  # type: ignore[no-untyped-call]


def _reduced(tensor: Tensor, group: Group) -> Tensor:
    try:
        dist.all_reduce(tensor, group=group)
    except RuntimeError as error:
        raise UnreachableError(str(error)) from None
    return tensor


def moments(
    mean: Tensor, var: Tensor, count: int, around: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of all processes, and the number of all values, ``()``.

    Given are those of this process, of *count* values a channel. *around* is a mean that all
    processes agree on, best one near theirs: the sums are of distances from it.
    """
    around = around.detach().to(mean.dtype)
    distance = mean - around
    number = mean.new_full((1,), count) * _share
    sums = torch.cat([number * distance, number * (var + distance.square()), number])
    total: Tensor = _Sum.apply(sums, group)  # type: ignore[no-untyped-call]
    offset, square = (total[:-1] / total[-1]).chunk(2)
    return around + offset, (square - offset.square()).clamp_min(0), total[-1]


def add_to_running(running: Tensor, batch: Tensor, momentum: float) -> None:
    running.lerp_(batch.detach().to(running.dtype), momentum)


def share_of_totals(totals: Tensor, count: int, group: Group) -> Tensor:
    """*totals* of all processes divided by their number of values, times that of this one."""
    sums = _reduced(torch.cat([totals.flatten(), totals.new_full((1,), count)]), group)
    return (sums[:-1] * (count / sums[-1])).view_as(totals)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    momentum: float,
    eps: float,
    group: Group,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm`` in training on the batches of all processes together.

    Raises ``ValueError`` where this process has no image.
    """
    if not x.numel():
        raise ValueError("synchronised statistics: expected an image in every process, found none")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    batch_var, batch_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    count = x.numel() // x.shape[1]
    batch_mean, batch_var, total = moments(batch_mean, batch_var, count, mean, group)
    add_to_running(mean, batch_mean, momentum)
    add_to_running(var, batch_var * (total / (total - 1)), momentum)
    factor = (batch_var + eps).rsqrt()
    z = (wide - batch_mean.view(-1, 1, 1)) * factor.view(-1, 1, 1)
    if scale is not None and shift is not None:
        z = z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    return z.to(x.dtype)
