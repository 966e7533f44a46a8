"""Names to networks."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet

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
    memory: str = "normal",
    **changes: Any,
) -> SparseNet:
    """A new network by name, with any field of :class:`Architecture` changed by keyword.

    *num_classes* defaults to 10 for CIFAR networks and 1000 for ImageNet ones. Raises ``ValueError``.
    """
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return SparseNet(architecture(name, in_chans=in_chans, **changes), implementation, memory)
