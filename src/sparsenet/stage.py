"""A stage: modules that can be called one by one, and the engine that computes the same faster.

What readers of a feature normalise by belongs to the feature, not to the reader. So each feature
has a batch norm without scale and shift, and each reader scales and shifts what it gathers of
normalised features: that is the papers' BN-ReLU-Conv, with statistics computed once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import changes
from sparsenet.architecture import Stage as StageLayout
from sparsenet.ops import dispatch
from sparsenet.ops.plan import EPS, MOMENTUM, Plan, Reader, Statistics
from sparsenet.ops.tracing import is_watched

SLOWLY = (
    "so the modules of its stage are called one by one, which takes the time and memory of the "
    "implementation 'reference' or more"
)
_told: set[str] = set()  # changes that were told already


class Affine(nn.Module):
    """Scale and shift of the *width* channels that one reader gathers, normalised ones."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

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

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W) -> (N, out, H, W)
        x = self.conv(self.relu(self.norm(x)))
        if self.dropout and self.training:
            # In one order whatever the layout, so that a seed drops the same everywhere.
            x = torch.native_dropout(x.contiguous(), self.dropout, True)[0]
        return x


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
        if _is_traced(x):  # where modules can be looked into, and none can be looked at
            return self.call_modules(x)
        if change := self.change():
            if not is_watched(x):  # who counts or traces operations knows
                module, what = change
                name = next((name for name, each in self.named_modules() if each is module), "")
                _tell(f"{name or 'stage'} {what}, {SLOWLY}")
            return self.call_modules(x)
        units = [unit for layer in self.layers for unit in layer]  # type: ignore[attr-defined]
        readers = [Reader(unit.norm.weight, unit.norm.bias, unit.conv.weight) for unit in units]
        readers.append(Reader(self.norm.weight, self.norm.bias, None))  # the stage output
        norms: list[Any] = list(self.statistics)
        running = [Statistics(norm.running_mean, norm.running_var) for norm in norms]
        training = norms[0].training
        output = dispatch.aggregate(self.implementation, self.plan, x, readers, running, training)
        if training:
            last_reader = self.plan.for_engine.topology.last_reader
            read = [norm for norm, last in zip(norms, last_reader, strict=True) if last]
            torch._foreach_add_([norm.num_batches_tracked for norm in read], 1)
        return output

    def call_modules(self, x: Tensor) -> Tensor:
        """As ``forward``, by calling the modules one by one."""
        features = {0: x}  # by number; with concatenation normalised when first read
        units: list[nn.Module] = [unit for layer in self.layers for unit in layer]  # type: ignore[attr-defined]
        for reader, unit in enumerate(units):
            features[reader + 1] = unit(self._gather(reader, features))
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

    def change(self) -> tuple[nn.Module, str] | None:
        """The first module that may do other than an engine takes it to do, and why.

        Raises ``ValueError`` where layers or units were added or removed.
        """
        looked_at = self._look_at_modules()
        return next(((module, what) for module, what in looked_at if what), None)

    def _look_at_modules(self) -> Iterator[tuple[nn.Module, str | None]]:
        """Modules, each with what was changed about it; what follows relies on that it is none."""
        yield self, changes.of_all_modules()
        self._check_list("layers", self.layers, len(self.shapes))
        self._check_list("statistics", self.statistics, len(self.widths) - 1)
        drops = self.plan.dropout > 0
        layers: list[Any] = list(self.layers)
        for number, (layer, shapes) in enumerate(zip(layers, self.shapes, strict=True)):
            self._check_list(f"layers.{number}", layer, len(shapes))
            for unit, shape in zip(layer._modules.values(), shapes, strict=True):
                yield unit, changes.of_module(unit, Unit)
                if drops:
                    yield unit, changes.of_training(unit, self.training)
                parts = unit._modules
                yield parts["norm"], changes.of_affine(parts["norm"], Affine, shape[1])
                yield parts["relu"], changes.of_module(parts["relu"], nn.ReLU)
                yield parts["conv"], changes.of_convolution(parts["conv"], shape)
        yield self.norm, changes.of_affine(self.norm, Affine, self.widths[-1])
        yield self.relu, changes.of_module(self.relu, nn.ReLU)
        norms: list[Any] = list(self.statistics)
        training = self.training if drops else norms[0].training
        for norm, width in zip(norms, self.widths, strict=False):  # the output has none
            yield norm, changes.of_norm(norm, width, training)

    def _check_list(self, name: str, modules: nn.Module, number: int) -> None:
        if type(modules) is not nn.ModuleList or len(modules) != number:
            raise ValueError(
                f"stage: expected {name} to be the ModuleList of {number} that was made with it, "
                f"found another {type(modules).__name__}; change the modules in it instead, or "
                "create a network of another architecture"
            )
        if what := changes.of_module(modules, nn.ModuleList):
            _tell(f"{name} {what}, but lists are not called; the units in them are")


def _tell(text: str) -> None:
    """Warns, once of each kind of *text* after its first word, the name of a module."""
    _, _, kind = text.partition(" ")
    if kind not in _told:
        _told.add(kind)
        warnings.warn(f"sparsenet: {text}", stacklevel=3)


def _is_traced(x: Tensor | torch.fx.Proxy) -> bool:
    if torch.compiler.is_dynamo_compiling() or isinstance(x, torch.fx.Proxy):
        return True
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
