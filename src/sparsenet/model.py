"""The network, leaf to root: statistics, affine, unit, stage, transition, stem, SparseNet."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.architecture import STEMS, Architecture
from sparsenet.architecture import Stage as StageLayout
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import MEMORY
from sparsenet.ops.plan import Plan, Reader, Statistics


class FeatureStatistics(nn.Module):
    """Running mean and variance of one feature of *width* channels."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))


class Affine(nn.Module):
    """Scale and shift of the *width* channels that one reader gathers."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class Unit(nn.Module):
    """The parameters of one BN-ReLU-Conv; running statistics belong to the features it reads."""

    def __init__(self, width: int, kernel: int, out: int):
        super().__init__()
        self.norm = Affine(width)
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False)


class Stage(nn.Module):
    """The layers of a stage and its output norm; gives the activated stage output."""

    def __init__(self, layout: StageLayout, dropout: float, implementation: str, memory: str):
        super().__init__()
        self.plan = Plan(layout.reads, layout.aggregation, dropout, memory)
        self.implementation = implementation
        self.layers = nn.ModuleList(
            nn.Sequential(*(Unit(*unit) for unit in layout.units(layer)))
            for layer in range(1, layout.topology.depth + 1)
        )
        self.norm = Affine(layout.out_width)
        self.statistics = nn.ModuleList(FeatureStatistics(width) for width in layout.unit_widths)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_width, H, W) -> (N, out_width, H, W)
        units = [unit for layer in self.layers for unit in layer]  # type: ignore[attr-defined]
        readers = [Reader(unit.norm.weight, unit.norm.bias, unit.conv.weight) for unit in units]
        readers.append(Reader(self.norm.weight, self.norm.bias, None))  # the stage output
        statistics = [
            Statistics(feature.running_mean, feature.running_var)  # type: ignore[arg-type]
            for feature in self.statistics
        ]
        return dispatch.aggregate(
            self.implementation, self.plan, x, readers, statistics, self.training
        )


class Transition(nn.Module):
    """Conv1x1 and 2x2 average pooling; the BN-ReLU before them is the stage's output norm."""

    def __init__(self, width: int, out: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 1, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W) -> (N, out, H // 2, W // 2)
        x = self.conv(x)
        if self.dropout and self.training:
            # A seed drops the same values in every memory format.
            x = F.dropout(x.contiguous(), self.dropout)
        return F.avg_pool2d(x, 2)


class Stem(nn.Sequential):
    """The first layers: a convolution; if strided, BN-ReLU and max pooling follow it."""

    def __init__(self, kind: str, in_chans: int, width: int):
        kernel, stride = STEMS[kind].kernel, STEMS[kind].stride
        conv = nn.Conv2d(in_chans, width, kernel, stride, padding=kernel // 2, bias=False)
        pool = nn.MaxPool2d(3, stride, padding=1)
        strided = (nn.BatchNorm2d(width), nn.ReLU(inplace=True), pool) if stride > 1 else ()
        super().__init__(conv, *strided)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_chans, H, W) -> (N, width, h, w)
        self._check(x)
        features: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return features

    def _check(self, x: Tensor) -> None:
        channels, device = self[0].in_channels, self[0].weight.device
        expected = f"images: expected normalised ones, a floating-point (N, {channels}, H, W)"
        if not isinstance(x, Tensor):
            raise TypeError(f"{expected} tensor, found {type(x).__name__}")
        # A tracer's sizes are tensors, which must not decide.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if x.dim() != 4 or (not traced and x.shape[1] != channels):
            advice = "; image[None] is a batch of one" if x.dim() == 3 else ""
            raise ValueError(f"{expected} tensor, found {tuple(x.shape)}{advice}")
        if not x.is_floating_point():
            raise ValueError(f"{expected} tensor, found {x.dtype}; Preprocessing.normalise first")
        if x.device.type != device.type:
            raise ValueError(f"{expected} tensor on {device}, found one on {x.device}")


def _classifier(width: int, classes: int) -> nn.Module:
    return nn.Linear(width, classes) if classes else nn.Identity()


def _initialise(module: nn.Module) -> None:
    # He et al.'s normal initialisation by fan-out, as the papers' codes do.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class SparseNet(nn.Module):
    """A network of aggregated stages: normalised images to logits.

    Images are ``(N, in_chans, H, W)``, logits ``(N, num_classes)``. *implementation* is ``auto`` or
    one of ``sparsenet.ops.implementations.IMPLEMENTATIONS``; parameters and state dict are the
    same for all. With *memory* ``lean`` the backward pass computes bottlenecks again instead of
    reading them from memory.

    Raises ``ValueError`` for an implementation that is not installed and for one without *memory*.
    """

    def __init__(
        self, architecture: Architecture, implementation: str = "auto", memory: str = "normal"
    ):
        super().__init__()
        self.architecture = architecture
        self.requested_implementation = dispatch.choose(implementation)
        if memory not in MEMORY or (memory != "normal" and implementation == "reference"):
            raise ValueError(
                f"memory: expected one of {', '.join(MEMORY)} ('normal' with the reference, "
                f"which keeps everything), found {memory!r}"
            )
        self.memory = memory
        layouts, dropout = architecture.stages, architecture.dropout
        self.stem = Stem(architecture.stem, architecture.in_chans, layouts[0].in_width)
        self.stages = nn.ModuleList(
            Stage(layout, dropout, self.requested_implementation, memory) for layout in layouts
        )
        self.transitions = nn.ModuleList(
            Transition(before.out_width, after.in_width, dropout)
            for before, after in pairwise(layouts)
        )
        self.classifier = _classifier(self.num_features, architecture.num_classes)
        self.apply(_initialise)

    @property
    def implementation(self) -> str:
        """What a call made now would run, on the device of the parameters and in their precision.

        Autocast changes the precision. Raises ``ValueError`` for one that cannot run there.
        """
        parameter = next(self.stem.parameters())
        device, dtype = parameter.device, parameter.dtype
        can_autocast = dtype == torch.float32 and torch.amp.is_autocast_available(device.type)
        if can_autocast and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        training = self.training or torch.is_grad_enabled()
        return dispatch.choose(self.requested_implementation, device, dtype, training, self.memory)

    @property
    def num_features(self) -> int:
        """Channels of the output of ``forward_features``."""
        return self.architecture.stages[-1].out_width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: the model gives pooled features."""
        return self.architecture.num_classes

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one of *num_classes* outputs, or by none with 0."""
        self.architecture = dataclasses.replace(self.architecture, num_classes=num_classes)
        parameter = next(self.stem.parameters())
        classifier = _classifier(self.num_features, num_classes)
        self.classifier = classifier.to(parameter.device, parameter.dtype)
        self.classifier.apply(_initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the activated output of the last stage, ``(N, num_features, h, w)``.

        Raises ``ValueError`` for what are no normalised images of this network's channels and
        device, and ``TypeError`` for what is no tensor.
        """
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``(N, num_features, h, w)`` to logits; with *pre_logits* to pooled features."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_chans, H, W) -> (N, num_classes)
        return self.forward_head(self.forward_features(x))
