"""Sparsely aggregated convolutional networks: topologies, an engine, training and what comes after it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsenet.adoption import adopt, load_torchvision
    from sparsenet.architecture import Architecture
    from sparsenet.model import SparseNet
    from sparsenet.topology import Topology
    from sparsenet.zoo import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "Architecture",
    "SparseNet",
    "Topology",
    "adopt",
    "create_model",
    "list_models",
    "load_torchvision",
]

_MODULES = {
    "Architecture": "architecture", "SparseNet": "model", "Topology": "topology", "adopt": "adoption",
    "create_model": "zoo", "list_models": "zoo", "load_torchvision": "adoption",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads a public name, and PyTorch with it, when it is first used: the command line needs it for some commands."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
