"""Names to networks."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import reprlib
from pathlib import Path
from typing import Any

import torch

from sparsenet import weights
from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.weights import Weights

IMAGENET_BLOCKS = {
    "121": (6, 12, 24, 16), "161": (6, 12, 36, 24), "169": (6, 12, 32, 32),
    "201": (6, 12, 48, 32), "264": (6, 12, 64, 48),
}  # fmt: skip
CIFAR_NETWORKS = {
    # published in arXiv:1801.05895 (sparse) and arXiv:1608.06993 (dense): depth and growth rate of each stage
    "sparsenet": ((40, 12), (40, 24), (100, 24), (100, 36), (100, 16, 32, 64)),
    "sparsenet_bc": ((100, 24), (100, 16, 32, 64), (100, 32, 64, 128)),
    "densenet": ((40, 12), (100, 12), (100, 24)),
    "densenet_bc": ((100, 12),),
}


def _networks() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for family, rows in CIFAR_NETWORKS.items():
        fetch = "dense" if family.startswith("densenet") else "sparse"
        for depth, *growth in rows:
            name = "_".join(map(str, (family, depth, *growth)))
            settings = {
                "depth": depth,
                "growth_rate": tuple(growth),
                "bottleneck": family.endswith("_bc"),
            }
            found[name] = {"fetch": fetch, **settings}
    for fetch in ("sparse", "dense"):
        for number, blocks in IMAGENET_BLOCKS.items():
            found[f"{fetch}net{number}"] = {
                "fetch": fetch, "blocks": blocks, "growth_rate": 48 if number == "161" else 32,
                "bottleneck": True, "stem": "imagenet", "num_classes": 1000,
            }  # fmt: skip
    return found


NETWORKS = _networks()


def image_size(name: str) -> int:
    """Side in pixels of the images that a named network was designed for, and its MACs are counted at."""
    return 224 if NETWORKS[name].get("stem") == "imagenet" else 32


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names of networks that match a shell pattern: ``list_models("densenet*")``; *pretrained*: that have weights."""
    found = fnmatch.filter(NETWORKS, pattern)
    able = weights.shipped() if pretrained else found
    return [name for name in found if name in able]


def known(name: str) -> str:
    """*name*, if a network has it; ``ValueError`` with the nearest names otherwise."""
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 3, 0.5) or list(NETWORKS)[:3]
        raise ValueError(
            f"model: expected a name such as {', '.join(near)}, found {name!r} (see list_models())"
        )
    return name


def architecture(name: str, **changes: Any) -> Architecture:
    """The architecture of a named network with some fields changed."""
    return Architecture(**{**NETWORKS[known(name)], **changes})


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    implementation: str = "auto",
    memory: str = "normal",
    pretrained: bool | str | Path = False,
    **changes: Any,
) -> SparseNet:
    """A network by name, with any field of :class:`Architecture` changed by keyword; new, or with weights in it.

    *num_classes* defaults to that of the weights, else to 10 for CIFAR networks and 1000 for ImageNet ones.
    *pretrained*: ``True`` for the weights that come with this package, which works offline; or a weights file from
    ``sparsenet export RUN --format safetensors``, by its path or its ``https://`` address, with ``#sha256=HEX`` at the
    end if it is to be checked. With another *num_classes* than theirs the classifier is a new one. Parameters are
    fp32. How images are normalised, and the names of the classes, are in ``sparsenet.weights.load(name).about``.

    Raises ``ValueError``, also where there are no weights or they are of another network.
    """
    if pretrained is False:
        if num_classes is not None:
            changes["num_classes"] = num_classes
        return SparseNet(architecture(name, in_chans=in_chans, **changes), implementation, memory)
    found = weights.load_shipped(known(name)) if pretrained is True else weights.load(pretrained)
    wanted = _fitting(architecture(name, in_chans=in_chans, **changes), found)
    model = filled(wanted, found, implementation, memory)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def stored_architecture(found: Weights) -> Architecture:
    """The architecture that a weights file is of; ``ValueError`` for one that this version does not know."""
    try:
        stored = Architecture(**found.about["architecture"])
        if sum(stored.stage_depths) > len(
            found.tensors
        ):  # no network is built for a file that cannot fill it
            raise ValueError(f"{sum(stored.stage_depths)} layers for {len(found.tensors)} tensors")
        return stored
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unknown(found, error) from None


def filled(
    wanted: Architecture, found: Weights, implementation: str = "auto", memory: str = "normal"
) -> SparseNet:
    """A network with the tensors of a weights file; ``ValueError`` naming one that does not fit."""
    try:
        with torch.device("meta"):  # shapes alone: a file that does not fit takes no memory
            model = SparseNet(wanted, implementation, memory)
    except (RuntimeError, TypeError) as error:  # widths that no tensor has
        raise _unknown(found, error) from None
    expected, kinds = (
        {n: (*t.shape, t.dtype) for n, t in d.items()} for d in (model.state_dict(), found.tensors)
    )
    for name in sorted(expected.keys() | kinds.keys()):
        if expected.get(name) != kinds.get(name):
            raise ValueError(
                f"{found.source}: expected the tensors of its network, found {name} of {kinds.get(name)} "
                f"instead of {expected.get(name)}"
            )
    model.load_state_dict(found.tensors, assign=True)
    return model


def _unknown(found: Weights, error: Exception) -> ValueError:
    first = str(error).partition("\n")[0]
    return ValueError(
        f"{found.source}: expected an architecture that this version knows, found: {first}"
    )


def _fitting(wanted: Architecture, found: Weights) -> Architecture:
    """*wanted* with the classes of the weights; ``ValueError`` where they are of another network."""
    theirs = stored_architecture(found)
    if (wanted.stages, wanted.stem, wanted.in_chans) != (
        theirs.stages,
        theirs.stem,
        theirs.in_chans,
    ):
        names = [
            f.name
            for f in dataclasses.fields(Architecture)
            if f.name not in ("dropout", "num_classes")
        ]
        pairs = ((name, getattr(theirs, name), getattr(wanted, name)) for name in names)
        other = ", ".join(
            f"{name} {reprlib.repr(a)} instead of {reprlib.repr(b)}"
            for name, a, b in pairs
            if a != b
        )
        raise ValueError(
            f"{found.source}: expected weights of this network, found those of one with {other}"
        )
    return dataclasses.replace(wanted, num_classes=theirs.num_classes)
