"""A stage as one autograd node, whichever implementation does the passes between its convolutions.

Batch statistics are the same for every reader of a feature, so they are taken once, and a reader's input is

    relu(scale * (x - mean) * rstd + shift)

of what it gathers, which backward computes again instead of storing. With ``g`` the gradient before the ReLU of a
reader, its ``scale * g`` are summed over the readers of a feature into ``h``, and one correction per feature gives

    dx = rstd * (h - mean(h) - z * mean(h * z)),    z = (x - mean) * rstd,

where the textbook corrects once per link. Means run over batch and pixels. Exact, not an approximation.

Where features are summed instead of concatenated, a reader gathers one tensor, the sum, with statistics of its own: the
engine stores the sums as its features, and their gradients are shared out to the terms.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsenet.ops.plan import EPS, Columns, Plan, Reader, Statistics


class Engine(ABC):
    """The passes of a stage and the memory they work on; ``features[j]`` and ``sums[j]`` are feature *j* and its ``h``.

    All features lie in one block and all sums in another: a few large allocations leave no holes behind. *scales*,
    *shifts* and *weights* are the readers'. The convolutions are PyTorch's unless an engine has its own.
    """

    training = False  # whether the features being made are measured

    def __init__(self, plan: Plan, x: Tensor, parameters: Sequence[Tensor]):
        self.plan, self.shape, self.dtype, self.device = plan.stored, x.shape, x.dtype, x.device
        self.layout = self.choose_layout(x)
        self.pixels = x.numel() // x.shape[1]  # N * H * W
        self.take(parameters)
        self.widths = (x.shape[1], *(len(weight) for weight in self.weights))

    def take(self, parameters: Sequence[Tensor]) -> None:
        n = len(self.plan.reads)
        self.scales, self.shifts, self.weights = (
            parameters[:n],
            parameters[n : 2 * n],
            parameters[2 * n :],
        )

    def empty(self, width: int) -> Tensor:
        """Uninitialised memory for *width* channels, flat."""
        return torch.empty(self.pixels * width, dtype=self.dtype, device=self.device)

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        """How features are laid out; by default as the stage input is: which is faster depends on the device."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.channels_last if last else torch.contiguous_format

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Where each feature's begin among all channels of the stage."""
        return tuple(accumulate(self.widths, initial=0))

    @cached_property
    def columns(self) -> Columns:
        return self.plan.columns(self.widths)

    @cached_property
    def wide(self) -> torch.dtype:
        """The precision of sums over pixels."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def kept(self) -> tuple[Tensor, ...]:
        """What backward needs besides the parameters: the features' block, ``mean, rstd`` of all channels, casts."""
        return (
            self.empty(self.columns.total),
            self.scales[0].new_empty(2, sum(self.widths)),
            *self.cast_weights(),
        )

    def cast_weights(self) -> list[Tensor]:
        """The weights in the features' precision and layout, once a step; none where they are so already."""
        if all(
            w.dtype == self.dtype and w.is_contiguous(memory_format=self.layout)
            for w in self.weights
        ):
            return []
        casts = [
            torch.empty_like(w, dtype=self.dtype, memory_format=self.layout) for w in self.weights
        ]
        torch._foreach_copy_(casts, list(self.weights))
        return casts

    @cached_property
    def features(self) -> list[Tensor]:
        return self._views(self.kept[0])

    @cached_property
    def block_of_sums(self) -> Tensor:
        return self.empty(self.columns.total)

    @cached_property
    def sums(self) -> list[Tensor]:
        return self._views(self.block_of_sums)

    @cached_property
    def totals(self) -> Tensor:
        """Of every channel, sums over readers of scale times the gradients of shift and of scale, ``(2, C)``."""
        return torch.zeros(2, sum(self.widths), dtype=self.wide, device=self.device)

    def mean_and_rstd(self, j: int) -> tuple[Tensor, Tensor]:
        """Of feature *j*, ``(C,)`` each."""
        start = self.channels[j]
        mean, rstd = self.kept[1][:, start : start + self.widths[j]]
        return mean, rstd

    def _views(self, block: Tensor) -> list[Tensor]:
        starts = [self.pixels * first for first in self.columns.first]
        pairs = zip(starts, self.widths, strict=True)
        return [
            self.view(block[start : start + self.pixels * width], width) for start, width in pairs
        ]

    def view(self, flat: Tensor, width: int) -> Tensor:
        """``(N, width, H, W)`` in the engine's layout."""
        n, _, height, columns = self.shape
        if self.layout == torch.channels_last:
            return flat.view(n, height, columns, width).permute(0, 3, 1, 2)
        return flat.view(n, width, height, columns)

    def buffer(self, name: str, width: int) -> Tensor:
        """``(N, width, H, W)`` in memory that all readers use in turn: fresh pages cost more than the arithmetic."""
        if name not in self.__dict__:
            self.__dict__[name] = self.empty(max(len(scale) for scale in self.scales))
        return self.view(self.__dict__[name][: self.pixels * width], width)

    def recall(self, statistics: Sequence[Statistics]) -> None:
        """Takes the running statistics of all features, for evaluation."""
        mean, rstd = self.kept[1]
        torch.cat([each.mean for each in statistics], out=mean)
        torch.cat([each.var for each in statistics], out=rstd)
        rstd.add_(EPS).rsqrt_()

    @abstractmethod
    def put(self, j: int, made: Tensor, statistics: Statistics | None, training: bool) -> None:
        """Stores *made* as feature *j*; in *training*, takes the statistics of the batch and moves the running ones.

        In evaluation :meth:`recall` has taken them; with *statistics* ``None`` those of an earlier call stay.
        """

    @abstractmethod
    def activate(self, r: int, out: Tensor) -> None:
        """Writes what reader *r* gathers, normalised, scaled, shifted and rectified, to *out*."""

    @abstractmethod
    def collect(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradient with respect to what :meth:`activate` wrote to the sums; gradients of scale and shift.

        *d_activated* may be overwritten; it is that of the last :meth:`activate`.
        """

    @abstractmethod
    def corrected(self, j: int, training: bool) -> Tensor:
        """The gradient with respect to what :meth:`put` was given as feature *j*, from its finished sum."""

    @cached_property
    def joined(self) -> Joined:
        """Of this pass, where features are sums."""
        return Joined(self.plan)

    def feature_of(self, j: int, made: Tensor) -> Tensor:
        """Feature *j*, given what was made last."""
        if not self.plan.terms:
            return made
        if made.data_ptr() == self.features[j].data_ptr() and self.plan.last_added.get(j, j) > j:
            made = made.clone()  # the sum comes to lie there
        return self.joined.add(j, made.contiguous(memory_format=self.layout))

    def gradient(self, j: int, training: bool) -> Tensor | None:
        """With respect to what was made as *j*, once all readers of it have sent theirs; ``None``: they have none."""
        if self.plan.terms:
            return self.joined.share_out(j, lambda: self.corrected(j, training))
        return None if self.plan.sent_first[j] is None else self.corrected(j, training)

    def activated(self, r: int) -> Tensor:
        out = self.buffer("activations", len(self.scales[r]))
        self.activate(r, out)
        return out

    def weight(self, r: int) -> Tensor:
        """What reader *r* convolves with, in the features' precision."""
        casts = self.kept[2:]
        return casts[r] if casts else self.weights[r]

    def make(self, r: int) -> Tensor:
        """The convolution of reader *r*."""
        weight = self.weight(r)
        return torch.conv2d(self.activated(r), weight, padding=weight.shape[-1] // 2)

    def back(self, r: int, d_made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sends the gradient with respect to ``make(r)`` on to the sums; gradients of scale, shift and weight.

        The weight's may be in another precision and layout than the weight: all are cast together.
        """
        weight = self.weight(r)
        padding = weight.shape[-1] // 2
        d_activated, d_weight, _ = torch.ops.aten.convolution_backward(
            d_made, self.activated(r), weight, None,
            [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        return *self.collect(r, d_activated), d_weight

    def output(self) -> Tensor:
        """What the last reader, the stage output, gives."""
        width = len(self.scales[-1])
        out = self.view(self.empty(width), width)
        self.activate(len(self.scales) - 1, out)
        return out


class Joined:
    """One pass over features that are sums: in forward of what was made before, in backward shared out to it again.

    Terms are added in the reference's order. A sum that begins as the last one of several terms did goes on from it, so
    that dense ones, a residual network's stream, take one addition each.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.made: dict[int, Tensor] = {}  # in backward, gradients
        self.total: Tensor | None = None
        self.read = True  # whether a gradient has come from the reader of the sum at hand

    def add(self, j: int, made: Tensor) -> Tensor:
        """Sum *j*, once *made* is there as *j*; a new tensor, unless it is *made* itself."""
        goes_on, terms = self.plan.additions[j]
        self.made[j] = made
        before = [self.total] if goes_on and self.total is not None else []
        found = reduce(torch.add, before + [self.made[k] for k in terms])
        if len(self.plan.terms[j]) > 1:
            self.total = found
        self.made = {
            k: tensor for k, tensor in self.made.items() if self.plan.last_added.get(k, 0) > j
        }
        return found

    def share_out(self, j: int, gradient: Callable[[], Tensor]) -> Tensor | None:
        """Adds that of sum *j* to its terms', and gives what has come together for *j*; from the last *j* to 0."""
        goes_on, terms = self.plan.additions[j]
        parts = [gradient()] if self.read else []
        if (
            len(self.plan.terms[j]) > 1 and self.total is not None
        ):  # of the sum that went on from this one
            parts.append(self.total)
            self.total = None
        if parts:
            d_sum = reduce(torch.add, parts)
            self.total = d_sum if goes_on else self.total
            for k in terms:
                self.made[k] = self.made[k] + d_sum if k in self.made else d_sum
        found = self.made.pop(j, None)
        self.read = found is not None
        return found


def aggregate(
    engine: type[Engine],
    plan: Plan,
    x: Tensor,
    readers: Sequence[Reader],
    statistics: Sequence[Statistics],
    training: bool,
) -> Tensor:
    """The activated stage output ``(N, C_out, H, W)``, equal to the reference's in exact arithmetic.

    Raises ``ValueError`` for one value per channel in training, which has no variance.
    """
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"batch norm: expected more than 1 value per channel in training, found {list(x.shape)}"
        )
    weights = [reader.weight for reader in readers if reader.weight is not None]
    parameters = [
        *(reader.scale for reader in readers),
        *(reader.shift for reader in readers),
        *weights,
    ]
    if torch.is_grad_enabled():
        return _Aggregate.apply(engine, plan, statistics, training, x, *parameters)  # type: ignore[no-any-return,no-untyped-call]
    work = engine(plan.without_gradient, x, parameters)
    return _forward(work, x, statistics, training)[0]


class _Aggregate(torch.autograd.Function):
    """Inputs: the stage input ``(N, C, H, W)``, then all scales, all shifts, all convolution weights."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: type[Engine],
        plan: Plan,
        statistics: Sequence[Statistics],
        training: bool,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.bare = engine(plan, x, parameters)
        work = copy.copy(ctx.bare)
        activated, masks = _forward(work, x, statistics, training)
        ctx.bare.take(())  # saved the way autograd watches over
        ctx.save_for_backward(*parameters, *work.kept, *masks)
        ctx.training, ctx.counts = training, (len(parameters), len(work.kept))
        return activated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_activated: Tensor) -> tuple[Tensor | None, ...]:
        work, saved, (parameters, kept) = copy.copy(ctx.bare), ctx.saved_tensors, ctx.counts
        work.take(saved[:parameters])
        # The same memory under another version: lean backward writes to it, and a second one may follow.
        work.kept = tuple(tensor.data for tensor in saved[parameters : parameters + kept])
        with torch.autocast(work.device.type, enabled=False):
            return (
                None,
                None,
                None,
                None,
                *_backward(work, d_activated, saved[parameters + kept :], ctx.training),
            )


def _forward(
    work: Engine, x: Tensor, statistics: Sequence[Statistics], training: bool
) -> tuple[Tensor, list[Tensor]]:
    """The stage output and the masks of dropout."""
    masks = []
    work.training = training
    with torch.autocast(work.device.type, enabled=False):
        if not training:
            work.recall(statistics)
        work.put(0, work.feature_of(0, x), statistics[0], training)
        for r in range(len(work.weights)):
            made = work.make(r)
            if training and work.plan.dropout:
                # in one order whatever the layout, so that a seed drops the same everywhere
                made, mask = torch.native_dropout(made.contiguous(), work.plan.dropout, True)
                masks.append(mask)
            if work.plan.topology.last_reader[r + 1]:
                work.put(r + 1, work.feature_of(r + 1, made), statistics[r + 1], training)
        return work.output(), masks


def _backward(
    work: Engine, d_activated: Tensor, masks: Sequence[Tensor], training: bool
) -> list[Tensor | None]:
    """Gradients of the stage input and all parameters; ``None`` where nobody reads what they make."""
    n, share = len(work.scales), 1 / (1 - work.plan.dropout)
    d_scales, d_shifts, d_weights = [None] * n, [None] * n, [None] * (n - 1)  # type: list[Any], list[Any], list[Any]
    d_scales[-1], d_shifts[-1] = work.collect(n - 1, d_activated)
    for r in reversed(range(n - 1)):
        d_made = work.gradient(r + 1, training)
        if d_made is None:
            continue
        if masks:
            d_made = torch.ops.aten.native_dropout_backward(d_made, masks[r], share)
        for j in work.plan.recomputed.intersection(work.plan.reads[r]):
            made = work.make(j - 1)
            work.put(j, made * masks[j - 1] * share if masks else made, None, training)
        d_scales[r], d_shifts[r], d_weights[r] = work.back(r, d_made)
    _match(d_weights, work.weights)
    return [work.gradient(0, training), *d_scales, *d_shifts, *d_weights]


def _match(gradients: list[Any], like: Sequence[Tensor]) -> None:
    """Casts, in place and in one call, the gradients whose precision or strides are not those of the weights."""
    pairs = enumerate(zip(gradients, like, strict=True))
    other = [
        i for i, (d, w) in pairs if d is not None and (d.dtype, d.stride()) != (w.dtype, w.stride())
    ]
    if other:
        casts = [torch.empty_like(like[i]) for i in other]
        torch._foreach_copy_(casts, [gradients[i] for i in other])
        for i, cast in zip(other, casts, strict=True):
            gradients[i] = cast
