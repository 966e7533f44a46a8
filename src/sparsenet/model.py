"""The network, read leaf to root: statistics, affine, unit, stage, transition, stem, SparseNet."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet import architecture as arch
from sparsenet.architecture import Architecture
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import MEMORY
from sparsenet.ops.plan import Plan, Reader
from sparsenet.ops.plan import Statistics as RunningStatistics


class Statistics(nn.Module):
    """Running mean and variance of one feature of *width* channels."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))


class Affine(nn.Module):
    """A reader's own scale and shift for the *width* channels that it gathers."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class Unit(nn.Module):
    """The parameters of one BN-ReLU-Conv; the batch statistics belong to the features that it reads."""

    def __init__(self, width: int, kernel: int, out: int):
        super().__init__()
        self.norm = Affine(width)
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False)


class Stage(nn.Module):
    """A stage's layers and its output norm; ``forward`` gives the activated stage output."""

    def __init__(self, stage: arch.Stage, dropout: float, implementation: str, memory: str):
        super().__init__()
        self.plan = Plan(stage.reads, stage.aggregation, dropout, memory)
        self.implementation = implementation
        numbers = range(1, stage.topology.depth + 1)
        self.layers = nn.ModuleList(
            nn.Sequential(*(Unit(*unit) for unit in stage.units(i))) for i in numbers
        )
        self.norm = Affine(stage.out_width)
        self.statistics = nn.ModuleList(Statistics(width) for width in stage.unit_widths)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_width, H, W) -> (N, out_width, H, W)
        units = [unit for layer in self.layers for unit in layer]  # type: ignore[attr-defined]
        readers = [Reader(unit.norm.weight, unit.norm.bias, unit.conv.weight) for unit in units]
        readers.append(Reader(self.norm.weight, self.norm.bias, None))
        statistics = [RunningStatistics(s.running_mean, s.running_var) for s in self.statistics]  # type: ignore[arg-type]
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
            x = F.dropout(
                x.contiguous(), self.dropout
            )  # in one order whatever the layout: a seed drops the same
        return F.avg_pool2d(x, 2)


def _stem(kind: str, in_chans: int, width: int) -> nn.Sequential:
    if kind == "cifar":
        return nn.Sequential(nn.Conv2d(in_chans, width, arch.STEMS[kind], padding=1, bias=False))
    return nn.Sequential(
        nn.Conv2d(in_chans, width, arch.STEMS[kind], stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


class SparseNet(nn.Module):
    """An aggregated network: images ``(N, in_chans, H, W)``, normalised, to logits ``(N, num_classes)``.

    *implementation* is ``auto`` or one of :data:`sparsenet.IMPLEMENTATIONS`; parameters and state dict are the
    same for all. *memory* ``lean`` computes bottlenecks again in backward instead of keeping them. Raises
    ``ValueError`` for an implementation that cannot run the architecture or is not installed.
    """

    def __init__(
        self, architecture: Architecture, implementation: str = "auto", memory: str = "normal"
    ):
        super().__init__()
        self.architecture = architecture
        self.asked = dispatch.choose(implementation)
        if memory not in MEMORY or (memory != "normal" and self.asked == "reference"):
            raise ValueError(
                f"memory: expected one of {', '.join(MEMORY)} ('normal' with the reference, which keeps "
                f"everything), found {memory!r}"
            )
        self.memory = memory
        stages, dropout = architecture.stages, architecture.dropout
        self.stem = _stem(architecture.stem, architecture.in_chans, stages[0].in_width)
        self.stages = nn.ModuleList(Stage(stage, dropout, self.asked, memory) for stage in stages)
        pairs = itertools.pairwise(stages)
        self.transitions = nn.ModuleList(
            Transition(a.out_width, b.in_width, dropout) for a, b in pairs
        )
        self.classifier = _classifier(self.num_features, architecture.num_classes)
        self.apply(_initialise)

    @property
    def implementation(self) -> str:
        """What a call made now would run, where the parameters are, in their precision or that of autocast.

        Raises ``ValueError`` for one that cannot run there.
        """
        like = next(self.stem.parameters())
        kind, dtype = like.device.type, like.dtype
        if (
            dtype == torch.float32
            and torch.amp.is_autocast_available(kind)
            and torch.is_autocast_enabled(kind)
        ):
            dtype = torch.get_autocast_dtype(kind)
        training = self.training or torch.is_grad_enabled()
        return dispatch.choose(self.asked, like.device, dtype, training, self.memory)

    @property
    def num_features(self) -> int:
        """Channels of :meth:`forward_features`."""
        return self.architecture.stages[-1].out_width

    @property
    def num_classes(self) -> int:
        return self.architecture.num_classes

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one; 0 classes: none, the model gives pooled features."""
        like = next(self.stem.parameters())
        self.architecture = dataclasses.replace(self.architecture, num_classes=num_classes)
        self.classifier = _classifier(self.num_features, num_classes).to(like.device, like.dtype)
        self.classifier.apply(_initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(N, in_chans, H, W)`` to the last stage's activated output ``(N, num_features, h, w)``."""
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``(N, num_features, h, w)`` to logits, or to pooled features with *pre_logits*."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _classifier(width: int, classes: int) -> nn.Module:
    return nn.Linear(width, classes) if classes else nn.Identity()


def _initialise(module: nn.Module) -> None:
    # He et al.'s normal initialisation by fan-out, as the papers' codes do.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
