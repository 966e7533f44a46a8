"""What a module is made of, read as a DenseNet.

The leaves of the module, in the order of registration, have to follow the grammar of a DenseNet-BC
(arXiv:1608.06993) for large images::

    network = Conv7x7/2 BN ReLU MaxPool3x3/2  layer+ (transition layer+)*
              BN [ReLU] [AvgPool [Flatten]] [Linear]
    layer = BN ReLU Conv1x1 BN ReLU Conv3x3
    transition = BN ReLU Conv1x1 AvgPool2x2/2
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn

from sparsenet.adoption.state_dict import UnitNames
from sparsenet.architecture import Architecture
from sparsenet.ops.plan import EPS, MOMENTUM

Leaf = tuple[str, Any]  # name and module

NORM = {"eps": EPS, "momentum": MOMENTUM, "affine": True, "bias": True, "track_running_stats": True}
CONV = {"dilation": 1, "groups": 1, "bias": False, "padding_mode": "zeros"}
MAX_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False}
AVERAGE_POOL = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def refusal(expected: str, found: object, name: str | None = None) -> ValueError:
    """The error for a module, or its submodule *name*, that this library cannot represent."""
    place = "" if name is None else f"{name or 'model'}: "
    return ValueError(f"adopt: {place}expected {expected}, found {found}")


def read_structure(model: nn.Module) -> tuple[Architecture, list[UnitNames]]:
    """The architecture that *model* is made of, and its names of the units in order of execution.

    Raises ``ValueError`` naming the first submodule that does not follow the grammar.
    """
    leaves = _Leaves(model)
    stem_name, stem = leaves.read_conv(7, stride=2)
    units = [UnitNames(stem_name, leaves.read_norm())]
    leaves.read(nn.ReLU)
    leaves.read(nn.MaxPool2d, **MAX_POOL, return_indices=False)
    stages: list[list[tuple[int, int]]] = [[]]  # output widths of the two units of each layer
    while leaves.any_is(nn.Conv2d):
        unit, narrow = leaves.read_unit(1)
        units.append(unit)
        if leaves.next_is(nn.BatchNorm2d):
            unit, wide = leaves.read_unit(3)
            units.append(unit)
            stages[-1].append((narrow.out_channels, wide.out_channels))
        else:
            leaves.read(nn.AvgPool2d, **AVERAGE_POOL, divisor_override=None)
            stages.append([])
    norm = leaves.read_norm()
    leaves.read_optional(nn.ReLU)  # what is no module has to be in ``forward``
    leaves.read_optional(nn.AdaptiveAvgPool2d, output_size=1)
    leaves.read_optional(nn.Flatten, start_dim=1, end_dim=-1)
    classifier_name, classifier = leaves.read_optional(nn.Linear, bias=True)
    leaves.check_end()
    units.append(UnitNames(classifier_name, norm))
    blocks = [len(layers) for layers in stages]
    if not all(blocks):
        raise refusal("layers before and after each transition", blocks)
    rates = tuple(layers[0][1] for layers in stages)
    architecture = Architecture(
        fetch="dense",
        blocks=tuple(blocks),
        growth_rate=rates[:1] if len(set(rates)) == 1 else rates,
        bottleneck=True,
        bottleneck_factor=stages[0][0][0] // rates[0],
        stem="imagenet",
        stem_width=stem.out_channels,
        in_chans=stem.in_channels,
        num_classes=classifier.out_features if classifier else 0,
    )
    return architecture, units


class _Leaves:
    """The leaves of a module in the order of registration, but for those that do nothing."""

    def __init__(self, model: nn.Module):
        # A batch norm may hold its activation, as timm's do: it comes first, then what it holds.
        self.remaining = deque(
            (name, module)
            for name, module in model.named_modules(remove_duplicate=False)
            if _is_leaf(module) and not _does_nothing(module)
        )

    def any_is(self, kind: type[nn.Module]) -> bool:
        return any(isinstance(module, kind) for _, module in self.remaining)

    def next_is(self, kind: type[nn.Module]) -> bool:
        return bool(self.remaining) and isinstance(self.remaining[0][1], kind)

    def read(self, kind: type[nn.Module], **settings: Any) -> Leaf:
        """The next leaf, which has to be of this kind with these settings."""
        if not self.remaining:
            raise refusal(kind.__name__, "no more submodules")
        name, module = self.remaining.popleft()
        # A subclass may compute something else. It may be a batch norm that holds its activation,
        # as the behaviour of the whole is compared.
        if type(module) is not kind and not (kind is nn.BatchNorm2d and isinstance(module, kind)):
            raise refusal(kind.__name__, _described(module), name)
        for setting, expected in settings.items():
            value = _setting(module, setting)
            if value != expected:
                raise refusal(f"{kind.__name__} with {setting}={expected}", value, name)
        return name, module

    def read_optional(self, kind: type[nn.Module], **settings: Any) -> Leaf:
        return self.read(kind, **settings) if self.next_is(kind) else ("", None)

    def read_norm(self) -> str:
        return self.read(nn.BatchNorm2d, **NORM)[0]

    def read_conv(self, kernel: int, stride: int = 1) -> tuple[str, nn.Conv2d]:
        padding = kernel // 2
        return self.read(nn.Conv2d, kernel_size=kernel, stride=stride, padding=padding, **CONV)

    def read_unit(self, kernel: int) -> tuple[UnitNames, nn.Conv2d]:
        norm = self.read_norm()
        self.read(nn.ReLU)
        name, conv = self.read_conv(kernel)
        return UnitNames(name, norm), conv

    def check_end(self) -> None:
        if self.remaining:
            name, module = self.remaining[0]
            expected = "average pooling and one Linear at the end"
            raise refusal(expected, _described(module), name)


def _is_leaf(module: nn.Module) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(tensors) or next(module.children(), None) is None


def _does_nothing(module: nn.Module) -> bool:
    return type(module) in (nn.Identity, nn.Sequential) or (_is_dropout(module) and not module.p)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def _described(module: nn.Module) -> str:
    if next(module.children(), None) is not None:
        return f"{type(module).__name__} with parameters or buffers of its own"
    advice = " (p=0 would do)" if _is_dropout(module) else ""
    return " ".join(repr(module).split()) + advice


def _setting(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if name == "bias":
        return value is not None
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def check_uniform(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The one device and floating type of *model*.

    Raises ``ValueError`` for several of them, and for what a copy of the tensors would lose:
    dropout rates, hooks, submodules in different modes, and shared parameters.
    """
    for name, module in model.named_modules():
        rate = getattr(module, "drop_rate", 0)
        if isinstance(rate, int | float) and rate:
            expected = "drop_rate=0 (dropout here follows every convolution or none)"
            raise refusal(expected, rate, name)
        if any(getattr(module, kind) for kind in HOOKS):
            raise refusal("no hooks", "some; remove them first", name)
        if module.training != model.training:
            advice = "both; call train() or eval() first"
            raise refusal("one mode for all submodules", advice, name)
    if len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
        raise refusal("parameters of their own for each submodule", "shared ones")
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    kinds = {f"{tensor.dtype} on {tensor.device}" for tensor in tensors}
    if len(kinds) > 1 or tensors[0].is_meta:
        raise refusal("values of one type on one device", " and ".join(sorted(kinds)))
    return tensors[0].device, tensors[0].dtype
