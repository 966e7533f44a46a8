"""Images in classes: reading them, splitting them, and the order in which they are trained on."""

from __future__ import annotations

from typing import Any

__all__ = ["DataConfig", "load_dataset"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    modules = {"DataConfig": "sparsenet.data.config", "load_dataset": "sparsenet.data.load"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)
