"""Networks by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import reprlib
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from sparsenet import weights
from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.weights import Weights

# Published in arXiv:1801.05895 (sparse) and arXiv:1608.06993 (dense): depth, and the growth rate of
# all stages or of each.
CIFAR_NETWORKS = {
    "sparsenet": ((40, 12), (40, 24), (100, 24), (100, 36), (100, 16, 32, 64)),
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
        raise ValueError(f"model: expected {expected}, found {name!r} (see list_models())")
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
    address, with ``#sha256=HEX`` at the end if it is to be checked. *num_classes* defaults to that
    of the weights, else to 10 for CIFAR networks and 1000 for ImageNet ones; with another number
    than the weights have, the classifier is a new one. Parameters are fp32. How images are
    normalised, and the names of the classes, are in ``sparsenet.weights.load(name).about``.

    Raises ``ValueError``, also where there are no weights or they are of another network.
    """
    if pretrained is False:
        if num_classes is not None:
            changes["num_classes"] = num_classes
        return SparseNet(architecture(name, in_chans=in_chans, **changes), implementation, memory)
    wanted = architecture(name, in_chans=in_chans, **changes)
    file = weights.load_shipped(name) if pretrained is True else weights.load(pretrained)
    stored = stored_architecture(file)
    _check_same_network(wanted, stored, file.source)
    wanted = dataclasses.replace(wanted, num_classes=stored.num_classes)
    model = build(wanted, file, implementation, memory)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def stored_architecture(file: Weights) -> Architecture:
    """The architecture of a weights file; ``ValueError`` for one that this version has not."""
    try:
        stored = Architecture(**file.about.architecture)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unknown_architecture(file, error) from None
    layers, tensors = sum(stored.stage_depths), len(file.tensors)
    if layers > tensors:  # no network is built for a file that cannot fill it
        raise _unknown_architecture(file, f"{layers} layers for {tensors} tensors")
    return stored


def build(
    architecture: Architecture, file: Weights, implementation: str = "auto", memory: str = "normal"
) -> SparseNet:
    """A network with the tensors of a weights file; ``ValueError`` naming one that does not fit."""
    try:
        with torch.device("meta"):  # shapes alone: a file that does not fit takes no memory
            model = SparseNet(architecture, implementation, memory)
    except (RuntimeError, TypeError) as error:  # widths that no tensor has
        raise _unknown_architecture(file, error) from None
    expected, actual = _shapes_and_types(model.state_dict()), _shapes_and_types(file.tensors)
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            problem = f"{name} of {actual.get(name)} instead of {expected.get(name)}"
            raise ValueError(f"{file.source}: expected the tensors of its network, found {problem}")
    model.load_state_dict(file.tensors, assign=True)
    return model


def _shapes_and_types(state: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (*tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _unknown_architecture(file: Weights, problem: object) -> ValueError:
    first_line = str(problem).partition("\n")[0]
    expected = "an architecture that this version knows"
    return ValueError(f"{file.source}: expected {expected}, found: {first_line}")


def _check_same_network(wanted: Architecture, stored: Architecture, source: str) -> None:
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
