"""Names to networks, and other libraries' weights into them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops.plan import EPS

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
            settings = {"depth": depth, "growth_rate": tuple(growth), "bottleneck": family.endswith("_bc")}
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


def list_models(pattern: str = "*") -> list[str]:
    """Names of networks that match a shell pattern: ``list_models("densenet*")``."""
    return fnmatch.filter(NETWORKS, pattern)


def known(name: str) -> str:
    """*name*, if a network has it; ``ValueError`` with the nearest names otherwise."""
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 3, 0.5) or list(NETWORKS)[:3]
        raise ValueError(f"model: expected a name such as {', '.join(near)}, found {name!r} (see list_models())")
    return name


def architecture(name: str, **changes: Any) -> Architecture:
    """The architecture of a named network with some fields changed."""
    return Architecture(**{**NETWORKS[known(name)], **changes})


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    implementation: str = "auto",
    **changes: Any,
) -> SparseNet:
    """A new network by name, with any field of :class:`Architecture` changed by keyword.

    *num_classes* defaults to 10 for CIFAR networks and 1000 for ImageNet ones. Raises ``ValueError``.
    """
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return SparseNet(architecture(name, in_chans=in_chans, **changes), implementation)


def load_torchvision(model: SparseNet, state_dict: Mapping[str, Tensor]) -> None:
    """Loads the state dict of torchvision's DenseNet of the same shape; evaluation gives the same logits.

    torchvision keeps running statistics per reader. Here they belong to the feature: the first reader's are
    kept, and where another reader's differ its scale and shift absorb the difference, exactly. Raises
    ``ValueError`` naming a weight that is missing, left over, or of another shape.
    """
    theirs = {re.sub(r"(norm|conv)\.(\d)\.", r"\1\2.", name): value for name, value in state_dict.items()}
    theirs = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    take = _Taker(theirs)
    ours: dict[str, Tensor] = {"stem.0.weight": take("features.conv0.weight")}
    for part in ("weight", "bias", "running_mean", "running_var"):
        ours[f"stem.1.{part}"] = take(f"features.norm0.{part}")
    ours["stem.1.num_batches_tracked"] = torch.tensor(0)
    stages = model.architecture.stages
    for s, stage in enumerate(stages):
        names = [f"features.denseblock{s + 1}.denselayer{i}." for i in range(1, stage.topology.depth + 1)]
        norms = [f"{name}norm{unit}" for name in names for unit in (1, 2)]
        last = s + 1 == len(stages)
        norms.append("features.norm5" if last else f"features.transition{s + 1}.norm")
        ours |= _stage_statistics(take, f"stages.{s}.", stage.reads, stage.unit_widths, norms)
        for i, name in enumerate(names):
            for unit in (0, 1):
                ours[f"stages.{s}.layers.{i}.{unit}.conv.weight"] = take(f"{name}conv{unit + 1}.weight")
        if not last:
            ours[f"transitions.{s}.conv.weight"] = take(f"features.transition{s + 1}.conv.weight")
    ours |= {f"classifier.{part}": take(f"classifier.{part}") for part in ("weight", "bias")}
    if take.left:
        raise ValueError(f"torchvision weights: this network has no place for {sorted(take.left)[0]!r}")
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(f"torchvision weights: {' '.join(str(error).split())}") from None


class _Taker:
    """Hands out tensors by name and remembers which are left."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.left = tensors, set(tensors)

    def __call__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"torchvision weights: expected {name!r}, found no such tensor")
        self.left.discard(name)
        return self.tensors[name]


def _stage_statistics(
    take: _Taker,
    prefix: str,
    reads: tuple[tuple[int, ...], ...],
    widths: tuple[int, ...],
    norms: list[str],
) -> dict[str, Tensor]:
    """Statistics per feature and affines per reader from batch norms per reader; readers in order."""
    ours: dict[str, Tensor] = {}
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for r, (read, norm) in enumerate(zip(reads, norms, strict=True)):
        scale, shift, mean, var = (take(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var"))
        split = [widths[j] for j in read]
        if len(mean) != sum(split):
            raise ValueError(f"torchvision weights: expected {sum(split)} channels in {norm!r}, found {len(mean)}")
        for j, own_mean, own_var in zip(read, mean.split(split), var.split(split), strict=True):
            known.setdefault(j, (own_mean, own_var))
        shared_mean = torch.cat([known[j][0] for j in read])
        shared_var = torch.cat([known[j][1] for j in read])
        unit = 2 if r < len(reads) - 1 else 0
        place = f"{prefix}layers.{r // unit}.{r % unit}.norm" if unit else f"{prefix}norm"
        ours[f"{place}.weight"] = scale * ((shared_var + EPS) / (var + EPS)).sqrt()
        ours[f"{place}.bias"] = shift + scale * (shared_mean - mean) * (var + EPS).rsqrt()
    for j, (mean, var) in known.items():
        ours[f"{prefix}statistics.{j}.running_mean"], ours[f"{prefix}statistics.{j}.running_var"] = mean, var
    return ours
