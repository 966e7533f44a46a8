"""Networks by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import reprlib
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet import weights
from sparsenet.architecture import Architecture, from_dict
from sparsenet.model import SparseNet
from sparsenet.weights import Description

# Published in arXiv:1801.05895 (sparse) and arXiv:1608.06993 (dense): depth, and the growth rate of
# all stages or of each. The one of 22 layers is of this library, for short trainings.
CIFAR_NETWORKS = {
    "sparsenet": ((22, 16, 32, 64), (40, 12), (40, 24), (100, 24), (100, 36), (100, 16, 32, 64)),
    "sparsenet_bc": ((100, 24), (100, 16, 32, 64), (100, 32, 64, 128)),
    "densenet": ((40, 12), (100, 12), (100, 24)),
    "densenet_bc": ((100, 12),),
}
IMAGENET_BLOCKS = {
    "121": (6, 12, 24, 16),
    "161": (6, 12, 36, 24),
    "169": (6, 12, 32, 32),
    "201": (6, 12, 48, 32),
    "264": (6, 12, 64, 48),
}


def _networks() -> dict[str, dict[str, Any]]:
    networks: dict[str, dict[str, Any]] = {}
    for family, rows in CIFAR_NETWORKS.items():
        for depth, *growth_rates in rows:
            name = "_".join(map(str, (family, depth, *growth_rates)))
            networks[name] = {
                "fetch": "dense" if family.startswith("densenet") else "sparse",
                "depth": depth,
                "growth_rate": tuple(growth_rates),
                "bottleneck": family.endswith("_bc"),
            }
    for fetch in ("sparse", "dense"):
        for number, blocks in IMAGENET_BLOCKS.items():
            networks[f"{fetch}net{number}"] = {
                "fetch": fetch,
                "blocks": blocks,
                "growth_rate": 48 if number == "161" else 32,
                "bottleneck": True,
                "stem": "imagenet",
                "num_classes": 1000,
            }
    return networks


NETWORKS = _networks()  # fields of Architecture that are not its defaults


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names of networks that match a shell pattern, such as ``list_models("densenet*")``.

    With *pretrained*, only those whose weights come with the package.
    """
    names = fnmatch.filter(NETWORKS, pattern)
    return [name for name in names if name in weights.shipped()] if pretrained else names


def image_size(name: str) -> int:
    """Side in pixels of the images that a network is designed for and its MACs are counted at."""
    return 224 if NETWORKS[name].get("stem") == "imagenet" else 32


def architecture(name: str, **changes: Any) -> Architecture:
    """The architecture of a named network with some fields changed.

    Raises ``ValueError`` with the nearest names for one that no network has.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 3, 0.5) or list(NETWORKS)[:3]
        expected = f"a name such as {', '.join(near)}"
        raise ValueError(f"model: expected {expected}, found {name!r}; sparsenet models lists them")
    return Architecture(**{**NETWORKS[name], **changes})


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    implementation: str = "auto",
    memory: str = "normal",
    pretrained: bool | str | Path = False,
    **changes: Any,
) -> SparseNet:
    """Creates a network by name, with any field of ``Architecture`` changed by keyword.

    *pretrained* is ``True`` for the weights that come with this package, which works offline; or a
    weights file from ``sparsenet export RUN --format safetensors``, by its path or its ``https://``
    or ``hf://`` address, with ``#sha256=HEX`` at the end if it is to be checked. *num_classes*
    defaults to that of the weights, else to 10 for CIFAR networks and 1000 for ImageNet ones; with
    another number than the weights have, the classifier is a new one. Weights for colours or greys
    become those for another *in_chans* as timm's do: the first convolution's are summed for 1
    channel, else repeated. Parameters are fp32. How images of the weights' channels are normalised,
    and the names of the classes, are in ``sparsenet.weights.load(name).about``.

    Raises ``ValueError``, also where there are no weights or they are of another network.
    """
    if pretrained is False:
        if num_classes is not None:
            changes["num_classes"] = num_classes
        return SparseNet(architecture(name, in_chans=in_chans, **changes), implementation, memory)
    wanted = architecture(name, in_chans=in_chans, **changes)
    file = weights.load_shipped(name) if pretrained is True else weights.load(pretrained)
    stored = stored_architecture(file.about, file.tensors, file.source)
    tensors, stem = file.tensors, file.tensors.get("stem.0.weight")
    greys_or_colours = stored.in_chans in (1, 3) and in_chans != stored.in_chans
    if greys_or_colours and stem is not None and stem.dim() == 4:
        stored = dataclasses.replace(stored, in_chans=in_chans)
        tensors = tensors | {"stem.0.weight": for_channels(stem, in_chans)}
    check_same_network(wanted, stored, file.source)
    wanted = dataclasses.replace(wanted, num_classes=stored.num_classes)
    model = build(wanted, tensors, file.source, implementation, memory)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """The *weight* of a convolution for images of other *channels*: a sum for one, else repeated.

    It gives as much, in sum, as before for channels that are alike.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    before = weight.shape[1]
    repeated = weight.repeat(1, math.ceil(channels / before), 1, 1)[:, :channels]
    return repeated * before / channels


def stored_architecture(
    about: Description, tensors: Mapping[str, Tensor], source: str
) -> Architecture:
    """The architecture that *source* says its *tensors* are of.

    Raises ``ValueError`` for one that this version has not.
    """
    try:
        stored = from_dict(about.architecture)
        _ = stored.stem_layers
    except ValueError as error:
        raise _unknown_architecture(source, error) from None
    layers = sum(stored.stage_depths)
    if layers > len(tensors):  # no network is built for a file that cannot fill it
        raise _unknown_architecture(source, f"{layers} layers for {len(tensors)} tensors")
    return stored


def build(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    source: str,
    implementation: str = "auto",
    memory: str = "normal",
) -> SparseNet:
    """A network with the *tensors* of *source*; ``ValueError`` naming one that does not fit."""
    try:
        with torch.device("meta"):  # shapes alone: a file that does not fit takes no memory
            model = SparseNet(architecture, implementation, memory)
    except (RuntimeError, TypeError) as error:  # widths that no tensor has
        raise _unknown_architecture(source, error) from None
    if problem := weights.misfit(tensors, model.state_dict()):
        raise ValueError(f"{source}: expected the tensors of its network, found {problem}")
    model.load_state_dict(tensors, assign=True)
    return model


def _unknown_architecture(source: str, problem: object) -> ValueError:
    first_line = str(problem).partition("\n")[0]
    expected = "an architecture that this version knows"
    return ValueError(f"{source}: expected {expected}, found: {first_line}")


def check_same_network(wanted: Architecture, stored: Architecture, source: str) -> None:
    """Raises ``ValueError`` where the weights of *source* are of another network than *wanted*."""
    network = attrgetter("stages", "stem", "in_chans")
    if network(wanted) == network(stored):
        return
    differences = []
    for name in [field.name for field in dataclasses.fields(Architecture)]:
        here, there = getattr(wanted, name), getattr(stored, name)
        if here != there and name not in ("dropout", "num_classes"):
            differences.append(f"{name} {reprlib.repr(there)} instead of {reprlib.repr(here)}")
    problem = f"those of one with {', '.join(differences)}"
    raise ValueError(f"{source}: expected weights of this network, found {problem}")
