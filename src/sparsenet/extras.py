"""Optional packages: imported when first used, and asked for by the name of the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingExtra(ImportError):
    """A package that only some commands need is not installed."""


def require(module: str, extra: str) -> Any:
    """The imported *module*; where it is missing, :class:`MissingExtra` says which extra to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtra(
            f"expected the package {package}, found none: pip install 'sparsenet[{extra}]'"
        ) from None
