"""Weights under another library's names, and running statistics that belong to readers.

Other libraries keep running statistics for each reader of a feature. Here they belong to the
feature: those of its first reader are loaded, and where another reader's differ its scale and shift
absorb the difference, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops.plan import EPS
from sparsenet.texts import shown

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # that are computed with
BATCHES = "num_batches_tracked"  # of a batch norm; its momentum does not depend on it

Spelling = tuple[str, str]  # a pattern in names, and what stands here in its place
# Of wrapped networks, and of old files, which say norm.1 and conv.2 for norm1 and conv2.
SPELLINGS: tuple[Spelling, ...] = ((r"^module\.", ""), (r"(norm|conv)\.(\d)\.", r"\1\2."))


class UnitNames(NamedTuple):
    """Names of two modules that belong together, in this library or another."""

    weight: str  # a convolution or the classifier; "": there is no classifier
    norm: str  # the batch norm beside it; "": a stem without one


def unit_names(architecture: Architecture) -> list[UnitNames]:
    """This library's names, in the order of execution."""
    units = [UnitNames("stem.0", "stem.1" if architecture.stem_layers.stride > 1 else "")]
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


def load_renamed(
    model: SparseNet,
    source_units: list[UnitNames],
    tensors: Mapping[str, Tensor],
    prefix: str,
    hint: str = "",
) -> dict[str, str]:
    """Loads the *tensors* of a source whose modules have the names *source_units*.

    Returns the source's name of every tensor. Raises ``ValueError`` for a tensor that is
    missing, left over or of another shape, before anything is changed. *prefix* begins the message,
    and *hint* explains the expected shape in it.
    """
    state: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, source, shape in _renamed(model, source_units):
        if source not in tensors:
            raise ValueError(f"{prefix}: expected {source!r}, found no such tensor")
        tensor = tensors[source]
        if not _has_numbers(tensor):
            found = getattr(tensor, "dtype", type(tensor).__name__)
            expected = f"{source!r} to be an ordinary tensor of floats"
            raise ValueError(f"{prefix}: expected {expected}, found another, of {found}")
        if tensor.shape != shape:
            expected = f"{source!r} of shape {list(shape)}{hint}"
            raise ValueError(f"{prefix}: expected {expected}, found {list(tensor.shape)}")
        wide = torch.promote_types(tensor.dtype, torch.float32)  # statistics are combined below
        state[name], names[name] = tensor.to(wide), source
    unused = [name for name in tensors.keys() - names.values() if not name.endswith(BATCHES)]
    if unused:
        raise ValueError(f"{prefix}: this network has no place for {min(unused)!r}")
    # Not those of the source, whose readers of a feature may disagree, nor what the model began as.
    state |= {name: torch.tensor(0) for name in model.state_dict() if name.endswith(BATCHES)}
    _, *others = unit_names(model.architecture)  # the stem reads no feature
    units = iter(others)
    for number, stage in enumerate(model.architecture.stages):
        unit_widths = stage.unit_widths
        for read in stage.reads:
            features = [f"stages.{number}.statistics.{feature}" for feature in read]
            widths = [unit_widths[feature] for feature in read]
            _share_statistics(state, next(units).norm, features, widths)
    model.load_state_dict(state)
    return names


def _has_numbers(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and value.dtype in FLOATS
    )


def _renamed(
    model: SparseNet, source_units: list[UnitNames]
) -> Iterator[tuple[str, str, torch.Size]]:
    """Name, name in the source and shape of all parameters, then of each reader's statistics."""
    pairs = list(zip(unit_names(model.architecture), source_units, strict=True))
    weights = [(unit.weight, source.weight) for unit, source in pairs]
    norms = [(unit.norm, source.norm) for unit, source in pairs if unit.norm]
    for module, source in weights + norms:
        for part, parameter in model.get_submodule(module).named_parameters():
            yield f"{module}.{part}", f"{source}.{part}", parameter.shape
    for norm, source in norms:
        shape = model.get_parameter(f"{norm}.weight").shape
        for part in ("running_mean", "running_var"):
            yield f"{norm}.{part}", f"{source}.{part}", shape


def _share_statistics(
    state: dict[str, Tensor], norm: str, features: list[str], widths: list[int]
) -> None:
    """Gives features without statistics those of a reader, which is made to use all of theirs."""
    mean, var = state.pop(f"{norm}.running_mean"), state.pop(f"{norm}.running_var")
    pieces = zip(features, mean.split(widths), var.split(widths), strict=True)
    for feature, feature_mean, feature_var in pieces:
        state.setdefault(f"{feature}.running_mean", feature_mean)
        state.setdefault(f"{feature}.running_var", feature_var)
    shared_mean = torch.cat([state[f"{feature}.running_mean"] for feature in features])
    shared_var = torch.cat([state[f"{feature}.running_var"] for feature in features])
    scale, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
    state[f"{norm}.weight"] = scale * ((shared_var + EPS) / (var + EPS)).sqrt()
    state[f"{norm}.bias"] = shift + scale * (shared_mean - mean) * (var + EPS).rsqrt()


def respelled(
    tensors: Mapping[str, Tensor], spellings: Iterable[Spelling], source: str
) -> dict[str, Tensor]:
    """*tensors* under the names that *spellings* make of theirs.

    Raises ``ValueError``, which begins with *source*, where two come to the same name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name
        for pattern, ours in spellings:
            own = re.sub(pattern, ours, own)
        if own in found:
            expected = "one name for each tensor"
            raise ValueError(f"{source}: expected {expected}, found two for {own}")
        found[own] = tensor
    return found


def load_torchvision(model: SparseNet, state_dict: Mapping[str, Tensor]) -> None:
    """Loads the state dict of torchvision's DenseNet of the same shape.

    Names may begin with ``module.``, as those of ``DataParallel`` do. Evaluation gives the same
    logits, also where running statistics differ between the readers of a feature. Raises
    ``ValueError`` naming a weight that is missing, left over, or of another shape.
    """
    network = model.architecture
    dense = all(stage.topology.is_dense for stage in network.stages)
    if not dense or network.aggregation != "concat" or network.stem != "imagenet":
        raise ValueError(
            "torchvision weights: expected a densely concatenating network with stem 'imagenet', "
            f"found fetch {network.fetch!r}, aggregation {network.aggregation!r}, "
            f"stem {network.stem!r}"
        )
    if others := [name for name in state_dict if not isinstance(name, str)]:
        expected = "the names of tensors"
        raise ValueError(f"torchvision weights: expected {expected}, found {shown(others[0])}")
    tensors = respelled(state_dict, SPELLINGS, "torchvision weights")
    load_renamed(model, torchvision_names(network), tensors, "torchvision weights")
