"""A stage as one autograd node, whichever implementation does the passes between convolutions.

Let x_j be feature j with M = N * H * W values a channel, and let i be a reader of it. The batch
statistics mean_j and rstd_j = 1 / sqrt(var_j + eps) are the same for all readers, so they are taken
once, and what reader i convolves is

    a_ij = relu(scale_ij * z_j + shift_ij),    z_j = (x_j - mean_j) * rstd_j.

Backward computes a_ij again from x_j instead of storing it. Let g_ij be the gradient of the loss
before the ReLU: what the convolution's backward gives where a_ij > 0, and 0 elsewhere. Then

    d_shift_ij = sum(g_ij),    d_scale_ij = sum(g_ij * z_j),    h_j = sum over i of scale_ij * g_ij

with sums over batch and pixels in the first two. Since all readers share z_j, one correction for
each feature gives its gradient, where the textbook corrects once for each reader:

    d_x_j = rstd_j * (h_j - mean(h_j) - z_j * mean(h_j * z_j)),

    mean(h_j)       = sum over i of scale_ij * d_shift_ij / M,
    mean(h_j * z_j) = sum over i of scale_ij * d_scale_ij / M.

With running statistics, in evaluation, mean_j and rstd_j are constants and d_x_j = rstd_j * h_j.
Both are identities, not approximations; docs/engine.md derives them.

Where features are summed instead of concatenated, a reader gathers one tensor, the sum, which has
statistics of its own. The engine stores the sums as its features, and
``sparsenet.ops.sums.SumAggregation`` shares their gradients among the terms.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsenet.device import autocast
from sparsenet.ops import reference, synchronised
from sparsenet.ops.plan import EPS, MOMENTUM, Columns, Operands, Plan, Reader, Statistics
from sparsenet.ops.sums import SumAggregation
from sparsenet.ops.synchronised import Group
from sparsenet.ops.tracing import is_watched


@dataclass(frozen=True)
class StageCall:
    """What the forward and the backward pass of one call have in common."""

    stage_plan: Plan
    plan: Plan  # of the stage as an engine sees it
    shape: torch.Size  # (N, C_0, H, W) of the stage input
    widths: tuple[int, ...]  # channels of each feature
    dtype: torch.dtype  # of features
    device: torch.device
    layout: torch.memory_format  # of features
    training: bool  # whether statistics are those of the batch
    group: Group | None = None  # of processes whose batches have statistics in common

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    @cached_property
    def first_channels(self) -> tuple[int, ...]:
        """The first channel of each feature among all channels of the stage, and their number."""
        return tuple(accumulate(self.widths, initial=0))

    @cached_property
    def columns(self) -> Columns:
        return self.plan.columns(self.widths)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The precision of sums over pixels."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Engine(ABC):
    """One pass, forward or backward, over a stage.

    ``features[j]`` is feature *j* and ``gradient_sums[j]`` its ``h``, ``(N, C, H, W)`` each. All
    features lie in one block of memory and all sums in another, because a few large allocations
    leave no holes behind. The convolutions are PyTorch's unless an engine has its own.

    *parameters* are the scales, the shifts and the weights of all readers. A forward pass is given
    the running *statistics*, a backward pass the tensors that the forward pass *saved*.
    """

    def __init__(
        self,
        call: StageCall,
        parameters: Sequence[Tensor],
        statistics: Sequence[Statistics] = (),
        saved: Sequence[Tensor] = (),
    ):
        readers = len(call.plan.reads)
        self.call, self.plan, self.widths = call, call.plan, call.widths
        self.scales = parameters[:readers]
        self.shifts = parameters[readers : 2 * readers]
        self.weights = parameters[2 * readers :]
        self.running_statistics = statistics
        self.takes_statistics = call.training and bool(statistics)
        self.sums = SumAggregation(call.plan) if call.plan.terms else None
        self.pixels: int | Tensor = call.pixels  # of all processes of a group
        self._buffers: dict[str, Tensor] = {}
        if not saved:
            channels = call.first_channels[-1]
            mean_rstd = torch.empty(2, channels, dtype=self.statistics_dtype, device=call.device)
            saved = self.new_block("features"), mean_rstd, *self.cast_weights()
        self.saved = tuple(saved)
        self.feature_block, self.mean_rstd, *self.casts = saved
        self.features = self._views(self.feature_block)

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        """The layout of features, here that of the stage input: the faster one varies by device."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.channels_last if last else torch.contiguous_format

    @property
    def statistics_dtype(self) -> torch.dtype:
        return self.call.sum_dtype

    # Memory

    def empty(self, width: int) -> Tensor:
        """Uninitialised memory for *width* channels, flat."""
        count = self.call.pixels * width
        return torch.empty(count, dtype=self.call.dtype, device=self.call.device)

    def view(self, flat: Tensor, width: int) -> Tensor:
        """*flat* as ``(N, width, H, W)`` in the layout of features."""
        images, _, height, columns = self.call.shape
        if self.call.layout == torch.channels_last:
            return flat.view(images, height, columns, width).permute(0, 3, 1, 2)
        return flat.view(images, width, height, columns)

    def _views(self, block: Tensor) -> list[Tensor]:
        views = []
        for column, width in zip(self.call.columns.first, self.widths, strict=True):
            start = self.call.pixels * column
            views.append(self.view(block[start : start + self.call.pixels * width], width))
        return views

    def buffer(self, name: str, width: int) -> Tensor:
        """``(N, width, H, W)`` in memory that all readers use in turn.

        Fresh pages of memory cost more than the arithmetic.
        """
        if name not in self._buffers:
            self._buffers[name] = self.empty(max(len(scale) for scale in self.scales))
        return self.view(self._buffers[name][: self.call.pixels * width], width)

    def new_block(self, kind: str) -> Tensor:
        """Uninitialised memory for all ``features`` or for all their ``gradients``, flat."""
        return self.empty(self.call.columns.total)

    @cached_property
    def gradient_block(self) -> Tensor:
        return self.new_block("gradients")

    @cached_property
    def gradient_sums(self) -> list[Tensor]:
        return self._views(self.gradient_block)

    @cached_property
    def gradient_totals(self) -> Tensor:
        """``M * mean(h)`` and ``M * mean(h * z)`` of all channels, ``(2, C)``."""
        shape = 2, self.call.first_channels[-1]
        return torch.zeros(shape, dtype=self.call.sum_dtype, device=self.call.device)

    def channels(self, j: int) -> slice:
        """Where those of feature *j* lie among all channels of the stage."""
        return slice(*self.call.first_channels[j : j + 2])

    def mean_and_rstd(self, j: int) -> tuple[Tensor, Tensor]:
        """Those of feature *j*, ``(C,)`` each."""
        mean, rstd = self.mean_rstd[:, self.channels(j)]
        return mean, rstd

    def cast_weights(self) -> list[Tensor]:
        """All weights in the precision and layout of features; empty where they are so already."""
        dtype, layout = self.call.dtype, self.call.layout
        if all(w.dtype == dtype and w.is_contiguous(memory_format=layout) for w in self.weights):
            return []
        casts = [torch.empty_like(w, dtype=dtype, memory_format=layout) for w in self.weights]
        torch._foreach_copy_(casts, list(self.weights))
        return casts

    def weight(self, r: int) -> Tensor:
        """What reader *r* convolves with, in the precision of features."""
        return self.casts[r] if self.casts else self.weights[r]

    # The passes that an engine has to offer

    @abstractmethod
    def store_feature(self, j: int, feature: Tensor) -> None:
        """Writes *feature* to ``features[j]``.

        Where the pass ``takes_statistics``, computes those of the batch and moves the running
        ones; else those that are there stay.
        """

    @abstractmethod
    def write_activation(self, r: int, out: Tensor) -> None:
        """Writes what reader *r* gathers, normalised, scaled, shifted and rectified, to *out*."""

    @abstractmethod
    def backward_activation(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        """Adds ``scale * g`` of reader *r* to the gradient sums; gradients of scale and shift.

        *d_activated* is the gradient with respect to the last activation that was written. It may
        be overwritten.
        """

    @abstractmethod
    def feature_gradient(self, j: int) -> Tensor:
        """The gradient with respect to feature *j*, by correcting its finished sum."""

    # Forward

    def use_running_statistics(self) -> None:
        """Normalises all features by the running statistics, for evaluation."""
        mean, rstd = self.mean_rstd
        torch.cat([each.mean for each in self.running_statistics], out=mean)
        torch.cat([each.var for each in self.running_statistics], out=rstd)
        rstd.add_(EPS).rsqrt_()

    def synchronise(self, j: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of feature *j* over all processes, given those of this one."""
        assert self.call.group is not None
        around = self.running_statistics[j].mean
        mean, var, self.pixels = synchronised.moments(
            mean, var, self.call.pixels, around, self.call.group
        )
        return mean, var

    def move_running_statistics(self, j: int, mean: Tensor, var: Tensor) -> None:
        """Towards those of feature *j* in this batch, whose biased variance is *var*."""
        running = self.running_statistics[j]
        synchronised.add_to_running(running.mean, mean, MOMENTUM)
        unbiased = var * (self.pixels / (self.pixels - 1))
        synchronised.add_to_running(running.var, unbiased, MOMENTUM)

    def store_term(self, j: int, term: Tensor) -> None:
        """Stores feature *j*, given what was made last: the feature itself or a term of sums."""
        if self.sums:
            term = self.sums.add_term(j, term.contiguous(memory_format=self.call.layout))
        self.store_feature(j, term)

    def activation(self, r: int) -> Tensor:
        out = self.buffer("activations", len(self.scales[r]))
        self.write_activation(r, out)
        return out

    def convolve(self, r: int) -> Tensor:
        """The output of reader *r*."""
        weight = self.weight(r)
        return torch.conv2d(self.activation(r), weight, padding=weight.shape[-1] // 2)

    def stage_output(self) -> Tensor:
        """The activation of the last reader, in memory of its own."""
        images, _, height, columns = self.call.shape
        shape = images, len(self.scales[-1]), height, columns
        settings: dict[str, Any] = {"dtype": self.call.dtype, "device": self.call.device}
        # No view, because what an autograd node gives may only then be changed in place.
        out = torch.empty(shape, memory_format=self.call.layout, **settings)
        self.write_activation(len(self.scales) - 1, out)
        return out

    # Backward

    def stage_input(self) -> Tensor:
        """What the first feature was made from."""
        return self.features[0]

    def synchronise_totals(self, j: int) -> None:
        """Makes the finished gradient totals of feature *j* those of all processes.

        They are scaled to the pixels of this one, by which an engine divides them.
        """
        group = self.call.group
        if group and self.is_synchronised(j):
            totals = self.gradient_totals[:, self.channels(j)]
            totals.copy_(synchronised.share_of_totals(totals, self.call.pixels, group))

    def is_synchronised(self, j: int) -> bool:
        """Whether feature *j* has a gradient that depends on other processes."""
        return bool(self.call.group) and self.plan.first_gradient_from[j] is not None

    def term_gradient(self, j: int) -> Tensor | None:
        """The gradient of what was made as *j*, for ever smaller *j*.

        ``None`` where the stage output does not depend on it.
        """
        is_read = self.plan.first_gradient_from[j] is not None
        d_feature = self.feature_gradient(j) if is_read else None
        return self.sums.term_gradient(j, d_feature) if self.sums else d_feature

    def backward_convolution(self, r: int, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of reader *r* to the gradient sums; gradients of scale, shift, weight.

        That of the weight may be in another precision and layout than the weight.
        """
        activation, weight = self.activation(r), self.weight(r)
        padding = weight.shape[-1] // 2
        # Stride, padding, dilation, not transposed, no padding of the output, one group.
        settings = [1, 1], [padding, padding], [1, 1], False, [0, 0], 1
        d_activated, d_weight, _ = torch.ops.aten.convolution_backward(
            d_output, activation, weight, None, *settings, output_mask=[True, True, False]
        )
        return *self.backward_activation(r, d_activated), d_weight


def aggregate(engine_type: type[Engine], plan: Plan, x: Tensor, operands: Operands) -> Tensor:
    """The activated stage output ``(N, C_out, H, W)``, in exact arithmetic that of the reference.

    Raises ``ValueError`` for one value per channel in training, which has no variance.
    """
    readers, statistics, training, group = operands
    group = group if training else None
    if training and x.numel() == x.shape[1] and not group:
        raise ValueError(
            f"batch norm: expected more than 1 value per channel in training, found {list(x.shape)}"
        )
    weights = [reader.weight for reader in readers if reader.weight is not None]
    scales, shifts = [reader.scale for reader in readers], [reader.shift for reader in readers]
    parameters = [*scales, *shifts, *weights]
    gradient = torch.is_grad_enabled()
    engine_plan = plan.for_engine if gradient else plan.without_gradient.for_engine
    widths = x.shape[1], *(len(weight) for weight in weights)
    layout = engine_type.choose_layout(x)
    call = StageCall(plan, engine_plan, x.shape, widths, x.dtype, x.device, layout, training, group)
    if gradient:
        input_in_graph = _InGraph.apply(x)  # type: ignore[no-untyped-call]
        return _Stage.apply(engine_type, call, statistics, x.detach(), input_in_graph, *parameters)  # type: ignore[no-any-return,no-untyped-call]
    output, _ = _forward(engine_type(call, parameters, statistics), x)
    return output


class _InGraph(torch.autograd.Function):
    """The place of a tensor in the graph without its memory: zeros, whose gradient is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> Tensor:
        return d_output


class _Stage(torch.autograd.Function):
    """The inputs with a gradient are the stage input's place, all scales, shifts and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        engine_type: type[Engine],
        call: StageCall,
        statistics: Sequence[Statistics],
        x: Tensor,
        input_in_graph: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        engine = engine_type(call, parameters, statistics)
        output, dropout_masks = _forward(engine, x)
        ctx.engine_type, ctx.call = engine_type, call
        ctx.counts = 1, len(parameters), len(engine.saved), len(dropout_masks)
        ctx.save_for_backward(input_in_graph, *parameters, *engine.saved, *dropout_masks)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        (input_in_graph,), parameters, saved, dropout_masks = (
            [next(tensors) for _ in range(n)] for n in ctx.counts
        )
        # ``data`` is the same memory under another version: with lean memory backward writes to it,
        # and a second backward may follow.
        saved = [tensor.data for tensor in saved]
        engine = ctx.engine_type(ctx.call, parameters, saved=saved)
        if torch.is_grad_enabled() or is_watched(d_output):
            x = input_in_graph + engine.stage_input()
            wanted = ctx.needs_input_grad[-len(parameters) - 1 :]
            gradients = _reference_gradients(engine, x, d_output, dropout_masks, wanted)
        else:
            gradients = _backward(engine, d_output, dropout_masks)
        return None, None, None, None, *gradients


def _reference_gradients(
    engine: Engine,
    x: Tensor,
    d_output: Tensor,
    dropout_masks: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """As ``_backward``, by operations that can be differentiated and traced themselves."""
    call = engine.call
    mean, rstd = engine.mean_rstd
    parts = zip(mean.split(call.widths), (rstd**-2 - EPS).split(call.widths), strict=True)
    parameters = *engine.scales, *engine.shifts, *engine.weights
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), autocast(call.device):
        # Views, so that what else these are used for, and their hooks, stay out of it.
        inputs = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (x, *parameters)
        ]
        dtype = functools.reduce(torch.promote_types, {t.dtype for t in inputs})
        x, *wide = (tensor.to(dtype) for tensor in inputs)
        readers = len(engine.scales)
        scales, shifts, weights = wide[:readers], wide[readers : 2 * readers], wide[2 * readers :]
        # Where those of the batch are taken, these are changed and of no use.
        statistics = [Statistics(*(each.to(dtype, copy=True) for each in part)) for part in parts]
        again = [Reader(*each) for each in zip(scales, shifts, [*weights, None], strict=True)]
        operands = Operands(again, statistics, call.training, call.group)
        output = reference.aggregate(call.stage_plan, x, operands, dropout_masks)
    needed = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(
        torch.autograd.grad(
            output, needed, d_output.to(dtype), create_graph=differentiable, allow_unused=True
        )
    )
    return [next(found) if want else None for want in wanted]


def _forward(engine: Engine, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The stage output and the masks of dropout."""
    plan, training = engine.plan, engine.call.training
    dropout_masks = []
    with autocast(engine.call.device):
        if not training:
            engine.use_running_statistics()
        engine.store_term(0, x)
        for r in range(len(engine.weights)):
            output = engine.convolve(r)
            if training and plan.dropout:
                # In one order whatever the layout, so that a seed drops the same everywhere.
                output, mask = torch.native_dropout(output.contiguous(), plan.dropout, True)
                dropout_masks.append(mask)
            if plan.topology.last_reader[r + 1]:
                engine.store_term(r + 1, output)
        return engine.stage_output(), dropout_masks


def _backward(
    engine: Engine, d_output: Tensor, dropout_masks: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the stage input and of all parameters; ``None`` where the output needs none."""
    plan, last = engine.plan, len(engine.weights)
    dropout_scale = 1 / (1 - plan.dropout)
    d_scales: list[Tensor | None] = [None] * (last + 1)
    d_shifts: list[Tensor | None] = [None] * (last + 1)
    d_weights: list[Tensor | None] = [None] * last
    with autocast(engine.call.device):
        d_scales[last], d_shifts[last] = engine.backward_activation(last, d_output)
        for r in reversed(range(last)):
            engine.synchronise_totals(r + 1)
            d_term = engine.term_gradient(r + 1)
            if d_term is None:
                continue
            if dropout_masks:
                d_term = torch.ops.aten.native_dropout_backward(
                    d_term, dropout_masks[r], dropout_scale
                )
            for j in plan.recomputed.intersection(plan.reads[r]):
                feature = engine.convolve(j - 1)
                if dropout_masks:
                    feature = feature * dropout_masks[j - 1] * dropout_scale
                engine.store_feature(j, feature)
            d_scales[r], d_shifts[r], d_weights[r] = engine.backward_convolution(r, d_term)
        engine.synchronise_totals(0)
        _match_weights(d_weights, engine.weights)
        return [engine.term_gradient(0), *d_scales, *d_shifts, *d_weights]


def _match_weights(gradients: list[Tensor | None], weights: Sequence[Tensor]) -> None:
    """Casts gradients in another precision or layout than the weights, in place and at once."""
    others: dict[int, Tensor] = {}
    for r, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        if gradient is None:
            continue
        if (gradient.dtype, gradient.stride()) != (weight.dtype, weight.stride()):
            others[r] = gradient
    if others:
        casts = [torch.empty_like(weights[r]) for r in others]
        torch._foreach_copy_(casts, list(others.values()))
        for r, cast in zip(others, casts, strict=True):
            gradients[r] = cast
