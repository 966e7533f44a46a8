"""Weights under another library's names, and running statistics that belong to readers.

Other libraries keep running statistics for each reader of a feature. Here they belong to the
feature: those of its first reader are loaded, and where another reader's differ its scale and shift
absorb the difference, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops.plan import EPS

RUNNING = ("running_mean", "running_var")


class UnitNames(NamedTuple):
    """Names of two modules that belong together, in this library or another."""

    weight: str  # a convolution or the classifier; "": there is no classifier
    norm: str  # the batch norm beside it


def unit_names(architecture: Architecture) -> list[UnitNames]:
    """This library's names, in the order of execution."""
    units = [UnitNames("stem.0", "stem.1")]
    for number, stage in enumerate(architecture.stages):
        for layer in range(stage.topology.depth):
            for unit in range(len(stage.branch)):
                name = f"stages.{number}.layers.{layer}.{unit}"
                units.append(UnitNames(f"{name}.conv", f"{name}.norm"))
        units.append(UnitNames(f"transitions.{number}.conv", f"stages.{number}.norm"))
    units[-1] = UnitNames("classifier", units[-1].norm)
    return units


def torchvision_names(architecture: Architecture) -> list[UnitNames]:
    """torchvision's names of the same modules."""
    units = [UnitNames("features.conv0", "features.norm0")]
    for number, stage in enumerate(architecture.stages, start=1):
        for layer in range(1, stage.topology.depth + 1):
            name = f"features.denseblock{number}.denselayer{layer}"
            for unit in range(1, len(stage.branch) + 1):
                units.append(UnitNames(f"{name}.conv{unit}", f"{name}.norm{unit}"))
        name = f"features.transition{number}"
        units.append(UnitNames(f"{name}.conv", f"{name}.norm"))
    units[-1] = UnitNames("classifier", "features.norm5")
    return units


def parameter_names(model: SparseNet, source_units: list[UnitNames]) -> dict[str, str]:
    """The name of every parameter of *model*, and its name in the source."""
    names = {}
    for unit, source_unit in zip(unit_names(model.architecture), source_units, strict=True):
        for module, source_module in zip(unit, source_unit, strict=True):
            for parameter, _ in model.get_submodule(module).named_parameters():
                names[f"{module}.{parameter}"] = f"{source_module}.{parameter}"
    return names


def load_renamed(
    model: SparseNet,
    source_units: list[UnitNames],
    tensors: Mapping[str, Tensor],
    prefix: str,
    hint: str = "",
) -> None:
    """Loads the *tensors* of a source whose modules have the names *source_units*.

    Raises ``ValueError`` for a tensor that is missing, left over or of another shape, before
    anything is changed. *prefix* begins the message and *hint* explains the expected shape in it.
    """
    unused = {
        name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")
    }

    def pop(name: str, shape: torch.Size) -> Tensor:
        if name not in unused:
            raise ValueError(f"{prefix}: expected {name!r}, found no such tensor")
        tensor = unused.pop(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{prefix}: expected {name!r} of shape {list(shape)}{hint}, "
                f"found {list(tensor.shape)}"
            )
        return tensor

    state = {
        name: pop(source_name, model.get_parameter(name).shape)
        for name, source_name in parameter_names(model, source_units).items()
    }
    statistics = {}
    for unit, source in zip(unit_names(model.architecture), source_units, strict=True):
        shape = state[f"{unit.norm}.weight"].shape
        statistics[unit.norm] = {part: pop(f"{source.norm}.{part}", shape) for part in RUNNING}
    if unused:
        raise ValueError(f"{prefix}: this network has no place for {min(unused)!r}")

    stem, *readers = statistics
    state |= {f"{stem}.{part}": tensor for part, tensor in statistics[stem].items()}
    state[f"{stem}.num_batches_tracked"] = torch.tensor(0)
    remaining = iter(readers)
    for number, stage in enumerate(model.architecture.stages):
        widths = stage.unit_widths
        for read, norm in zip(stage.reads, islice(remaining, len(stage.reads)), strict=True):
            features = {f"stages.{number}.statistics.{j}": widths[j] for j in read}
            _share_statistics(state, norm, statistics[norm], features)
    model.load_state_dict(state)


def _share_statistics(
    state: dict[str, Tensor], norm: str, statistics: dict[str, Tensor], features: dict[str, int]
) -> None:
    """Makes a reader use the statistics of the features that it reads.

    *features* are names and widths; those without statistics in *state* get the reader's.
    """
    shared = {}
    for part, tensor in statistics.items():
        for feature, piece in zip(features, tensor.split([*features.values()]), strict=True):
            state.setdefault(f"{feature}.{part}", piece)
        shared[part] = torch.cat([state[f"{feature}.{part}"] for feature in features])
    mean, var = (statistics[part] for part in RUNNING)
    shared_mean, shared_var = (shared[part] for part in RUNNING)
    scale, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
    state[f"{norm}.weight"] = scale * ((shared_var + EPS) / (var + EPS)).sqrt()
    state[f"{norm}.bias"] = shift + scale * (shared_mean - mean) * (var + EPS).rsqrt()


def load_torchvision(model: SparseNet, state_dict: Mapping[str, Tensor]) -> None:
    """Loads the state dict of torchvision's DenseNet of the same shape.

    Evaluation gives the same logits, also where running statistics differ between the readers of a
    feature. Raises ``ValueError`` naming a weight that is missing, left over, or of another shape.
    """
    network = model.architecture
    dense = all(stage.topology.is_dense for stage in network.stages)
    if not dense or network.aggregation != "concat" or network.stem != "imagenet":
        raise ValueError(
            "torchvision weights: expected a densely concatenating network with stem 'imagenet', "
            f"found fetch {network.fetch!r}, aggregation {network.aggregation!r}, "
            f"stem {network.stem!r}"
        )
    # Old files say norm.1 and conv.2 where newer ones say norm1 and conv2.
    tensors = {
        re.sub(r"(norm|conv)\.(\d)\.", r"\1\2.", name): tensor
        for name, tensor in state_dict.items()
    }
    load_renamed(model, torchvision_names(network), tensors, "torchvision weights")
