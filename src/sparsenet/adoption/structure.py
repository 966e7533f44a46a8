"""What a module is made of, read as a DenseNet.

The leaves of the module, in the order of registration, have to follow the grammar of a DenseNet
(arXiv:1608.06993)::

    network = stem  layer+ (transition layer+)*  BN [ReLU] [AvgPool [Flatten]] [Linear]
    stem = Conv7x7/2 BN ReLU MaxPool3x3/2 | Conv3x3
    layer = [BN ReLU Conv1x1] BN ReLU Conv3x3    with the bottleneck everywhere or nowhere
    transition = BN ReLU Conv1x1 AvgPool2x2/2
"""

from __future__ import annotations

from collections import deque
from math import floor, inf, nextafter
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsenet.adoption.state_dict import UnitNames
from sparsenet.architecture import STEMS, Architecture
from sparsenet.ops.plan import EPS, MOMENTUM

Leaf = tuple[str, Any]  # name and module

NORM = {"eps": EPS, "momentum": MOMENTUM, "affine": True, "bias": True, "track_running_stats": True}
CONV = {"dilation": 1, "groups": 1, "bias": False, "padding_mode": "zeros"}
MAX_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False}
AVERAGE_POOL = {"padding": 0, "ceil_mode": False, "divisor_override": None}
LARGEST_IMAGE = 640  # pixels a side, of those that a fixed pooling needs to be compared
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def refusal(expected: str, found: object, name: str | None = None) -> ValueError:
    """The error for a module, or its submodule *name*, that this library cannot represent."""
    place = "" if name is None else f"{name or 'model'}: "
    return ValueError(f"adopt: {place}expected {expected}, found {found}")


class Structure(NamedTuple):
    """What a module is made of."""

    architecture: Architecture
    units: list[UnitNames]  # the module's names of them, in the order of execution
    window: int  # side of the features that its last pooling makes one position of; 0: all sides

    def sides(self, features: int) -> tuple[int, int]:
        """The least and largest side of images whose last features have the side *features*."""
        stride = self.architecture.stem_layers.stride**2  # of the convolution and the pooling
        halved = 2 ** (len(self.architecture.blocks) - 1)
        return stride * (features * halved - 1) + 1, stride * ((features + 1) * halved - 1)


def read_structure(model: nn.Module) -> Structure:
    """What *model* is made of.

    Raises ``ValueError`` naming the first submodule that does not follow the grammar.
    """
    leaves = _Leaves(model)
    kind = "cifar" if leaves.next_kernel() == STEMS["cifar"].kernel else "imagenet"
    stem_name, stem = leaves.read_conv(STEMS[kind].kernel, STEMS[kind].stride)
    stem_norm = ""
    if STEMS[kind].stride > 1:
        stem_norm = leaves.read_norm()
        leaves.read(nn.ReLU)
        leaves.read(nn.MaxPool2d, **MAX_POOL, return_indices=False)
    units = [UnitNames(stem_name, stem_norm)]
    bottleneck = leaves.next_kernel() == 1
    stages: list[list[list[int]]] = [[]]  # output widths of the units of each layer
    transitions: list[nn.Conv2d] = []
    widths: list[int] = []  # of the layer that is being read
    while leaves.any_is(nn.Conv2d):
        kernel = 1 if not widths and (bottleneck or leaves.next_kernel() == 1) else 3
        unit, conv = leaves.read_unit(kernel)
        units.append(unit)
        widths.append(conv.out_channels)
        if kernel == 3:
            stages[-1].append(widths)
            widths = []
        elif not (bottleneck and leaves.next_is(nn.BatchNorm2d)):
            leaves.read(nn.AvgPool2d, kernel_size=2, stride=2, **AVERAGE_POOL)
            transitions.append(conv)
            stages.append([])
            widths = []
    norm = leaves.read_norm()
    leaves.read_optional(nn.ReLU)  # what is no module has to be in ``forward``
    leaves.read_optional(nn.AdaptiveAvgPool2d, output_size=1)
    pool_name, pool = leaves.read_optional(nn.AvgPool2d, **AVERAGE_POOL)
    window = _setting(pool, "kernel_size") if pool else 0
    if pool and not (isinstance(window, int) and window >= 1):
        raise refusal("AvgPool2d with one positive kernel_size", window, pool_name)
    leaves.read_optional(nn.Flatten, start_dim=1, end_dim=-1)
    classifier_name, classifier = leaves.read_optional(nn.Linear, bias=True)
    leaves.check_end()
    units.append(UnitNames(classifier_name, norm))
    blocks = [len(layers) for layers in stages]
    if not all(blocks):
        raise refusal("layers before and after each transition", blocks)
    rates = tuple(layers[0][-1] for layers in stages)
    factor = stages[0][0][0] // rates[0] if bottleneck else Architecture.bottleneck_factor
    architecture = Architecture(
        fetch="dense",
        blocks=tuple(blocks),
        growth_rate=rates[:1] if len(set(rates)) == 1 else rates,
        bottleneck=bottleneck,
        bottleneck_factor=factor,
        reduction=_reduction(transitions, 0.5 if bottleneck else 1.0),
        stem=kind,
        stem_width=stem.out_channels,
        in_chans=stem.in_channels,
        num_classes=classifier.out_features if classifier else 0,
    )
    structure = Structure(architecture, units, window)
    _, side = structure.sides(window)
    if window and side > LARGEST_IMAGE:
        expected = f"AvgPool2d for images of at most {LARGEST_IMAGE} pixels a side"
        raise refusal(expected, f"kernel_size={window}, for {side}", pool_name)
    return structure


def _reduction(transitions: list[nn.Conv2d], default: float) -> float:
    """The factor of the widths of *transitions*; 0, the architecture's default, where that fits."""
    widths = [(conv.in_channels, conv.out_channels) for conv in transitions]
    least = max((after / before for before, after in widths), default=default)
    for factor in (default, round(least, 2), nextafter(least, inf)):
        if factor <= 1 and all(floor(before * factor) == after for before, after in widths):
            return 0.0 if factor == default else factor
    raise refusal("transitions that narrow by one factor", widths)


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

    def next_kernel(self) -> Any:
        """The kernel size of the next convolution, if there is one."""
        convs = (module for _, module in self.remaining if isinstance(module, nn.Conv2d))
        return next((_setting(conv, "kernel_size") for conv in convs), None)

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
        settings = {"kernel_size": kernel, "stride": stride, "padding": padding, **CONV}
        name, conv = self.read(nn.Conv2d, **settings)
        if not conv.weight.numel():
            raise refusal("Conv2d with weights", list(conv.weight.shape), name)
        return name, conv

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


def unwrapped(model: nn.Module) -> nn.Module:
    """*model* without what spreads it over devices."""
    while type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        _check_hooks(model, "")
        model = model.get_submodule("module")
    return model


def _check_hooks(module: nn.Module, name: str) -> None:
    if any(getattr(module, kind) for kind in HOOKS):
        raise refusal("no hooks", "some; remove them first", name)


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
        _check_hooks(module, name)
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
