"""A stage: modules that can be called one by one, and the engine that computes the same faster.

What readers of a feature normalise by belongs to the feature, not to the reader. So each feature
has a batch norm without scale and shift, and each reader scales and shifts what it gathers of
normalised features: that is the papers' BN-ReLU-Conv, with statistics computed once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import changes
from sparsenet.architecture import StageLayout
from sparsenet.changes import Changed
from sparsenet.ops import dispatch, synchronised
from sparsenet.ops.plan import EPS, MOMENTUM, Operands, Plan, Reader
from sparsenet.ops.synchronised import Group
from sparsenet.ops.tracing import is_watched

SLOWLY = (
    "so the modules of its stage are called one by one, which takes the time and memory of the "
    "implementation 'reference' or more"
)
_told: set[str] = set()  # changes that were told already
Seen = Callable[[int, Tensor], Tensor]


class Affine(nn.Module):
    """Scale and shift of the *width* channels that one reader gathers, normalised ones."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W), with numbers as precise as given
        return (x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class Unit(nn.Module):
    """Scale and shift, ReLU and convolution: a BN-ReLU-Conv whose input is normalised already."""

    def __init__(self, width: int, kernel: int, out: int, dropout: float):
        super().__init__()
        self.norm = Affine(width)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False)
        self.dropout = dropout

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W) -> (N, out, H, W)
        x = self.conv(self.relu(self.norm(x)))
        if self.dropout and self.training:
            # In one order whatever the layout, so that a seed drops the same everywhere.
            x = torch.native_dropout(x.contiguous(), self.dropout, True)[0]
        return x


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` that computes on CPUs too, alone as well as in a stage."""

    def forward(self, x: Tensor) -> Tensor:
        group = synchronised.group_of(self) if self.training else None
        if x.device.type != "cpu" or group is None:
            return super().forward(x)
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or counter is None:
            raise ValueError("SyncBatchNorm: expected running statistics on a CPU, found none")
        counter.add_(1)
        momentum = 1 / int(counter) if self.momentum is None else self.momentum
        given = x, mean, var, self.weight, self.bias
        return synchronised.batch_norm(*given, momentum, self.eps, group)


def synchronise_statistics(model: nn.Module, group: Group | None = None) -> None:
    """Lets all processes of *group*, by default of the default one, have statistics in common.

    In training, the batch norms of *model* normalise by the mean and variance of the batches of
    all processes together. They become ``SyncBatchNorm``, with the tensors that they had.
    """
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) is not nn.BatchNorm2d:
                continue
            settings = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
            made = SyncBatchNorm(norm.num_features, *settings, process_group=group)
            for place in ("_parameters", "_buffers", "training"):
                setattr(made, place, getattr(norm, place))
            setattr(module, name, made)


def _as_it_is(number: int, feature: Tensor) -> Tensor:
    return feature


PARTS = "norm", "relu", "conv"  # of a unit
NORMS = nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm
KINDS = Unit, Affine, nn.ReLU, nn.Conv2d, *NORMS  # of the modules of a stage
METHODS = changes.methods(*KINDS)


class Stage(nn.Module):
    """The layers of a stage and its output norm; gives the activated stage output.

    An engine computes it where that gives what the modules give one by one; where one of them was
    replaced, has hooks or the like, they are called.
    """

    def __init__(self, layout: StageLayout, dropout: float, implementation: str, memory: str):
        super().__init__()
        self.plan = Plan(layout.reads, layout.aggregation, dropout, memory)
        self.implementation = implementation
        units = [list(layout.units(layer)) for layer in range(1, layout.topology.depth + 1)]
        self.layers = nn.ModuleList(
            nn.ModuleList(Unit(*unit, dropout) for unit in each) for each in units
        )
        self.norm = Affine(layout.out_width)
        self.relu = nn.ReLU()
        # Of each feature, or with summation of what each reader reads: see ``Plan``.
        self.statistics = nn.ModuleList(
            nn.BatchNorm2d(width, EPS, MOMENTUM, affine=False) for width in layout.unit_widths
        )
        # Of the weights of all units, and of the features and the stage output.
        self.shapes = [[(out, width, k, k) for width, k, out in each] for each in units]
        self.widths = *layout.unit_widths, layout.out_width
        topology = self.plan.topology
        self.first_reader, self.last_reader = topology.first_reader, topology.last_reader

    def forward(self, x: Tensor) -> Tensor:  # (N, in_width, H, W) -> (N, out_width, H, W)
        self._check_lists()
        if _is_traced(x):  # where modules can be looked into, and none can be looked at
            return self.call_modules(x)
        try:
            operands = self._operands()
            changes.check_input(self, x)
        except Changed as change:
            if not is_watched(x):  # who counts or traces operations knows
                _tell(f"{self._name_of(change.module)} {change.what}, {SLOWLY}")
            return self.call_modules(x)
        if x.dim() != 4 or x.shape[1] != self.widths[0]:
            expected = f"stage: expected features (N, {self.widths[0]}, H, W)"
            raise ValueError(f"{expected}, found {tuple(x.shape)}")
        output = dispatch.aggregate(self.implementation, self.plan, x, operands)
        if operands.training:
            last_reader = self.plan.for_engine.topology.last_reader
            norms: Iterable[Any] = self.statistics
            _count_batch([n for n, last in zip(norms, last_reader, strict=True) if last], x)
        return output

    def call_modules(self, x: Tensor, seen: Seen = _as_it_is) -> Tensor:
        """As ``forward``, by calling the modules one by one.

        Each feature of the ``plan`` goes through *seen*, with its number, before it is read.
        """
        features = {0: seen(0, x)}  # by number; with concatenation normalised when first read
        units: list[nn.Module] = [unit for layer in self.layers for unit in layer]  # type: ignore[attr-defined]
        for reader, unit in enumerate(units):
            features[reader + 1] = seen(reader + 1, unit(self._gather(reader, features)))
        return self.relu(self.norm(self._gather(len(units), features)))  # type: ignore[no-any-return]

    def _gather(self, reader: int, features: dict[int, Tensor]) -> Tensor:
        """What *reader* reads, normalised; features that nobody reads later are dropped."""
        read = self.plan.reads[reader]
        if self.plan.aggregation == "sum":
            total = reduce(torch.add, [features[j] for j in read])
            gathered: Tensor = self.statistics[reader](total)
        else:
            for j in read:
                if self.first_reader[j] == reader + 1:
                    features[j] = self.statistics[j](features[j])
            gathered = torch.cat([features[j] for j in read], 1)
        for j in read:
            if self.last_reader[j] == reader + 1:
                del features[j]
        return gathered

    def change(self) -> Changed | None:
        """What an engine would not see of the modules, the first of all; ``None`` for nothing.

        Raises ``ValueError`` where layers or units were added or removed.
        """
        self._check_lists()
        try:
            self._operands()
        except Changed as change:
            return change
        return None

    def _operands(self) -> Operands:
        """The tensors of the modules; ``Changed`` where one may do other than these say."""
        changes.check_global_hooks(self)
        if changes.methods(*KINDS) != METHODS:
            raise Changed(self, "has modules with a method that was replaced")
        lists: list[Any] = [self.layers, self.statistics, *self.layers]
        for each in lists:
            self._tell_of_list(each)
        dropout = self.plan.dropout
        readers = []
        layers: Iterable[Any] = self.layers
        for layer, shapes in zip(layers, self.shapes, strict=True):
            for unit, shape in zip(layer._modules.values(), shapes, strict=True):
                own = changes.check_module(unit, Unit)
                if own["dropout"] != dropout:
                    raise Changed(unit, "has another dropout")
                if dropout:
                    changes.check_training(unit, self.training)
                norm, relu, conv = (changes.part(unit, own, name) for name in PARTS)
                affine = changes.read_affine(norm, Affine, shape[1])
                changes.check_module(relu, nn.ReLU)
                readers.append(Reader(*affine, changes.read_convolution(conv, shape)))
        affine = changes.read_affine(self.norm, Affine, self.widths[-1])
        changes.check_module(self.relu, nn.ReLU)
        readers.append(Reader(*affine, None))  # the stage output
        norms: list[Any] = list(self.statistics._modules.values())
        first = norms[0]
        training = self.training if dropout else first.training
        kind = type(first) if type(first) in NORMS else nn.BatchNorm2d
        group = None
        if kind is not nn.BatchNorm2d:
            group = synchronised.group_of(first)
            if any(
                getattr(norm, "process_group", None) is not first.process_group for norm in norms
            ):
                raise Changed(self, "has norms that are synchronised in several groups")
        # The last width is that of the stage output, which is no feature.
        pairs = zip(norms, self.widths, strict=False)
        statistics = [changes.read_norm(norm, kind, width, training) for norm, width in pairs]
        precisions = {each.dtype for reader in readers for each in reader[:2]}
        if len(precisions.union(each.dtype for pair in statistics for each in pair)) > 1:
            raise Changed(self, "has norms of more than one precision")
        return Operands(readers, statistics, training, group)

    def _check_lists(self) -> None:
        layers: Iterable[Any] = self.layers
        _check_list("layers", self.layers, len(self.shapes))
        _check_list("statistics", self.statistics, len(self.widths) - 1)
        for number, (layer, shapes) in enumerate(zip(layers, self.shapes, strict=True)):
            _check_list(f"layers.{number}", layer, len(shapes))

    def _tell_of_list(self, modules: nn.Module) -> None:
        try:
            changes.check_module(modules, nn.ModuleList)
        except Changed as change:
            name = self._name_of(modules)
            _tell(f"{name} {change.what}, but lists are not called; the units in them are")

    def _name_of(self, module: object) -> str:
        return next((name for name, each in self.named_modules() if each is module), "") or "stage"


def _check_list(name: str, modules: nn.Module, number: int) -> None:
    if type(modules) is not nn.ModuleList or len(modules) != number:
        number_found = f" of {len(modules)}" if isinstance(modules, nn.ModuleList) else ""
        raise ValueError(
            f"stage: expected {name} to be the ModuleList of {number} that was made with it, "
            f"found another {type(modules).__name__}{number_found}; change the modules in it "
            "instead, or create a network of another architecture"
        )


def _count_batch(norms: list[Any], x: Tensor) -> None:
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if is_watched(x):  # as by torch.func, which knows no operations on many tensors
        for counter in counters:
            counter.add_(1)
    elif counters:
        torch._foreach_add_(counters, 1)


def _tell(text: str) -> None:
    """Warns, once of each kind of *text* after its first word, the name of a module."""
    _, _, kind = text.partition(" ")
    if kind not in _told:
        warnings.warn(f"sparsenet: {text}", stacklevel=3)
        _told.add(kind)  # not where the warning is an error


def _is_traced(x: Tensor | torch.fx.Proxy) -> bool:
    if torch.compiler.is_dynamo_compiling() or isinstance(x, torch.fx.Proxy):
        return True
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
