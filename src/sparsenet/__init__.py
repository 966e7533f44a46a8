"""Sparsely aggregated convolutional networks: topologies, an engine, training, and what follows.

The public names are loaded, and PyTorch with them, when they are first used: the command line
answers ``--help`` and refuses wrong flags without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsenet.adoption import adopt, load_torchvision
    from sparsenet.architecture import Architecture
    from sparsenet.library import evaluate, fit, load
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
    "evaluate",
    "fit",
    "list_models",
    "load",
    "load_torchvision",
]

_MODULES = {
    "Architecture": "sparsenet.architecture",
    "SparseNet": "sparsenet.model",
    "Topology": "sparsenet.topology",
    "adopt": "sparsenet.adoption",
    "create_model": "sparsenet.zoo",
    "evaluate": "sparsenet.library",
    "fit": "sparsenet.library",
    "load": "sparsenet.library",
    "list_models": "sparsenet.zoo",
    "load_torchvision": "sparsenet.adoption",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    module = f"{__name__}.{name}"
    try:
        return import_module(module)  # sparsenet.weights, after import sparsenet alone
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
