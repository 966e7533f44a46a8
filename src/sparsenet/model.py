"""The network: a stem, stages with transitions between them, and a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from sparsenet.architecture import Architecture, StemLayers
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import CHANNELS_LAST, MEMORY
from sparsenet.ops.plan import EPS, MOMENTUM
from sparsenet.ops.tracing import is_watched
from sparsenet.stage import Stage


class Transition(nn.Module):
    """Conv1x1 and 2x2 average pooling; the BN-ReLU before them is the stage's output norm."""

    def __init__(self, width: int, out: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 1, bias=False)
        self.dropout = dropout

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W) -> (N, out, H // 2, W // 2)
        x = self.conv(x)
        if self.dropout and self.training:
            # A seed drops the same values in every memory format.
            x = F.dropout(x.contiguous(), self.dropout)
        return F.avg_pool2d(x, 2)


class Stem(nn.Sequential):
    """The first layers: a convolution; if strided, BN-ReLU and max pooling follow it."""

    def __init__(self, layers: StemLayers, in_chans: int, width: int):
        kernel, stride = layers.kernel, layers.stride
        conv = nn.Conv2d(in_chans, width, kernel, stride, padding=kernel // 2, bias=False)
        pool = nn.MaxPool2d(3, stride, padding=1)
        strided = (nn.BatchNorm2d(width, EPS, MOMENTUM), nn.ReLU(), pool) if stride > 1 else ()
        super().__init__(conv, *strided)
        self.in_chans, self.width = in_chans, width
        self.feature = 2 if strided else 0  # the last module before the pooling
        self.reduction_of_feature, self.reduction = stride, stride**2  # of sides

    def forward(self, x: Tensor) -> Tensor:  # (N, in_chans, H, W) -> (N, width, h, w)
        return self.forward_both(x)[0]

    def forward_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first stage reads, and as a feature of its own what is not pooled yet."""
        self._check(x)
        feature = x
        for number, module in enumerate(self):
            x = module(x)
            if number == self.feature:
                feature = x
        return x, feature

    def _check(self, x: Tensor) -> None:
        channels = self.in_chans
        device = next((parameter.device for parameter in self.parameters()), torch.device("meta"))
        expected = f"images: expected normalised ones, a floating-point (N, {channels}, H, W)"
        if isinstance(x, torch.fx.Proxy):
            return
        if not isinstance(x, Tensor):
            raise TypeError(f"{expected} tensor, found {type(x).__name__}")
        # A tracer's sizes are tensors, which must not decide.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if x.dim() != 4 or (not traced and x.shape[1] != channels):
            advice = "; image[None] is a batch of one" if x.dim() == 3 else ""
            raise ValueError(f"{expected} tensor, found {tuple(x.shape)}{advice}")
        if not x.is_floating_point():
            raise ValueError(f"{expected} tensor, found {x.dtype}; Preprocessing.normalise first")
        # What is offloaded lies on the meta device until it is used.
        if x.device.type != device.type and device.type != "meta":
            raise ValueError(f"{expected} tensor on {device}, found one on {x.device}")


def _check_pooling(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool: expected 'avg', or '' for none, found {global_pool!r}")
    if num_classes and not global_pool:
        raise ValueError(
            "global_pool: expected 'avg' where there is a classifier, found none; with "
            "num_classes=0 there is no classifier"
        )


def _checked_memory(memory: str, implementation: str) -> str:
    if memory not in MEMORY or (memory != "normal" and implementation == "reference"):
        raise ValueError(
            f"memory: expected one of {', '.join(MEMORY)} ('normal' with the reference, "
            f"which keeps everything), found {memory!r}"
        )
    return memory


def _track(modules: Iterable[nn.Module], tracked: bool) -> None:
    for module in modules:
        for norm in module.modules():
            if isinstance(norm, BatchNorm) and norm.running_mean is not None:
                norm.track_running_stats = tracked


def _classifier(width: int, classes: int) -> nn.Module:
    return nn.Linear(width, classes) if classes else nn.Identity()


def _initialise(module: nn.Module) -> None:
    # He et al.'s normal initialisation by fan-out, as the papers' codes do.
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # where it imports the compiler
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class SparseNet(nn.Module):
    """A network of aggregated stages: normalised images to logits.

    Images are ``(N, in_chans, H, W)``, logits ``(N, num_classes)``. *implementation* is ``auto`` or
    one of ``sparsenet.ops.implementations.IMPLEMENTATIONS``; parameters and state dict are the
    same for all. With *memory* ``lean`` the backward pass computes bottlenecks again instead of
    reading them from memory. *global_pool* is ``avg``, or empty for features that are not pooled,
    and *drop_rate* the share of pooled features that is dropped in training. Methods that timm's
    models have do what they do there.

    Raises ``ValueError`` for an implementation that is not installed and for one without *memory*.
    """

    frozen: Sequence[nn.Module] = ()  # what stays in evaluation mode

    def __init__(
        self,
        architecture: Architecture,
        implementation: str = "auto",
        memory: str = "normal",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        _check_pooling(global_pool, architecture.num_classes)
        self.architecture, self.global_pool, self.drop_rate = architecture, global_pool, drop_rate
        self.requested_implementation = dispatch.choose(implementation)
        self.memory = _checked_memory(memory, implementation)
        layouts, dropout = architecture.stages, architecture.dropout
        self.stem = Stem(architecture.stem_layers, architecture.in_chans, layouts[0].in_width)
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

        Autocast changes the precision. ``modules`` where modules of a stage were changed, and are
        called therefore. Raises ``ValueError`` for one that cannot run there.
        """
        stages: Iterable[Any] = self.stages
        if any(stage.change() for stage in stages):
            return "modules"
        return self._engine()

    def _engine(self) -> str:
        """The implementation that runs where no module was changed."""
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
        stages: Iterable[Any] = self.stages  # not those of the architecture: they may be pruned
        widths: list[int] = [self.stem.width, *(stage.widths[-1] for stage in stages)]
        return widths[-1]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: the model gives pooled features."""
        return self.architecture.num_classes

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, reduction of the sides and module of what ``forward_intermediates`` gives."""
        stem, layouts = self.stem, self.architecture.stages[: len(self.stages)]
        rows = [(stem.width, stem.reduction_of_feature, f"stem.{stem.feature}")]
        rows += [
            (layout.out_width, stem.reduction << number, f"stages.{number}")
            for number, layout in enumerate(layouts)
        ]
        return [{"num_chs": c, "reduction": r, "module": module} for c, r, module in rows]

    def freeze(self, part: str) -> None:
        """Keeps the network up to and including *part* as it is while the rest is trained.

        *part* is ``stem``, ``stage1`` and so on, ``all`` for all but the classifier, or empty for
        nothing. What is frozen has no gradients, and in training normalises by its running
        statistics, which stay; nor does ``update_bn`` reset them, as they are not tracked.

        Raises ``ValueError`` for a part that this network has not.
        """
        parts = ["", "stem", *(f"stage{number}" for number in range(1, 1 + len(self.stages)))]
        if part not in (*parts, "all"):
            expected = f"one of {', '.join(parts[1:])}, all"
            raise ValueError(f"freeze: expected {expected}, found {part!r}")
        self.requires_grad_()
        _track(self.frozen, True)
        stages = len(self.stages) if part == "all" else max(parts.index(part) - 1, 0)
        stem = [self.stem] if part else []
        self.frozen = [*stem, *self.stages[:stages], *self.transitions[: max(stages - 1, 0)]]
        for module in self.frozen:
            module.requires_grad_(False)
        _track(self.frozen, False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of every module, but what ``freeze`` keeps stays in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one of *num_classes* outputs, or by none with 0.

        *global_pool* is that of the constructor; by default it stays.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        _check_pooling(global_pool, num_classes)
        self.global_pool = global_pool
        self.architecture = dataclasses.replace(self.architecture, num_classes=num_classes)
        parameter = next(self.stem.parameters())
        classifier = _classifier(self.num_features, num_classes)
        self.classifier = classifier.to(parameter.device, parameter.dtype)
        self.classifier.apply(_initialise)
        self.classifier.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the activated output of the last stage, ``(N, num_features, h, w)``.

        Raises ``ValueError`` for what are no normalised images of this network's channels and
        device, and ``TypeError`` for what is no tensor.
        """
        x = self.stem(self.laid_out(x))
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        return x

    def laid_out(self, x: Tensor) -> Tensor:
        """*x* in the memory layout in which the engine keeps features, so that the stem's are too.

        PyTorch's max pooling in bf16 takes several times as long on a CPU otherwise. What the stem
        does not take stays as it is.
        """
        if not isinstance(x, Tensor) or is_watched(x) or x.is_meta or x.dim() != 4:
            return x
        if x.device != next(self.stem.parameters()).device or self._engine() not in CHANNELS_LAST:
            return x
        if x.shape[1] > 1:
            return x.contiguous(memory_format=torch.channels_last)
        # One channel lies both ways at once, and contiguous() leaves it to count as the other one.
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``(N, num_features, h, w)`` to logits; with *pre_logits* to pooled features."""
        pooled = x.mean((2, 3)) if self.global_pool else x
        if self.drop_rate:
            pooled = F.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else self.classifier(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of ``feature_info`` at *indices*, and the final ones.

        *indices* are numbers, from the end if negative, a number of last ones, or ``None`` for all.
        With *intermediates_only* the final ones are not returned, and with *stop_early* as well
        nothing is computed after the last index. All features of stages are normalised, so *norm*
        changes nothing. Raises ``ValueError`` for other indices and another *output_fmt*.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', found {output_fmt!r}")
        wanted = self._indices(indices)
        intermediates: dict[int, Tensor] = {}
        x, intermediates[0] = self.stem.forward_both(self.laid_out(x))
        for number, stage in enumerate(self.stages):
            if stop_early and intermediates_only and number >= max(wanted):
                break
            x = intermediates[number + 1] = stage(x)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        found = [intermediates[index] for index in wanted]
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what features at *indices* do not need, and with *prune_head* the classifier.

        Returns the indices, counted from 0. All norms belong to stages, so *prune_norm* changes
        nothing.
        """
        wanted = self._indices(indices)
        self.stages = self.stages[: max(wanted)]
        self.transitions = self.transitions[: max(0, max(wanted) - 1)]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        number = len(self.stages) + 1
        if indices is None:
            return list(range(number))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        if not indices or not all(-number <= index < number for index in indices):
            raise ValueError(f"indices: expected some below {number}, found {indices}")
        return [index % number for index in indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets *memory* of the constructor: ``lean`` where *enable*, else ``normal``."""
        self.memory = _checked_memory("lean" if enable else "normal", self.requested_implementation)
        stages: Iterable[Any] = self.stages
        for stage in stages:
            stage.plan = dataclasses.replace(stage.plan, memory=self.memory)

    def no_weight_decay(self) -> set[str]:
        """Parameters of several dimensions that should not decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the names of parameters by their depth, for rates that differ by layer."""
        stage, with_one_before = r"^(?:stages|transitions)\.(\d+)", (99999,)
        layers = [(r"^stages\.(\d+)\.layers\.(\d+)", None), (stage, with_one_before)]
        return {"stem": "^stem", "blocks": stage if coarse else layers}

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "torch.jit.script: expected a network without choices in Python, which this one has; "
            "torch.export, torch.jit.trace and torch.compile take it"
        )

    def forward(self, x: Tensor) -> Tensor:  # (N, in_chans, H, W) -> (N, num_classes)
        return self.forward_head(self.forward_features(x))
