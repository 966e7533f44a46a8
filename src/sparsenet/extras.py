"""Optional packages: imported when first used, and asked for by the name of their extra."""

from __future__ import annotations

import re
from importlib import import_module, metadata
from typing import Any


class MissingExtra(ImportError):
    """A package that only some commands need is not installed."""


def require(module: str, extra: str) -> Any:
    """Imports *module*. Where it is missing, ``MissingExtra`` says how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtra(
            f"expected the package {package}, found none: {install_hint(extra)}"
        ) from None


def install_hint(extra: str) -> str:
    """Returns the command that installs an extra. No package index has sparsenet, hence the dot."""
    return f"pip install '.[{extra}]' in the folder of sparsenet's source"


def missing_packages() -> dict[str, list[str]]:
    """Returns for each extra of this package, except that for developers, what is not installed."""
    missing: dict[str, list[str]] = {}
    for requirement in _requirements():
        parts = re.match(r"([\w.-]+).*\bextra == ['\"](\w+)['\"]", requirement)
        if not parts or parts[2] in ("all", "dev", "docs"):
            continue
        absent = missing.setdefault(parts[2], [])
        if parts[1] != "sparsenet" and not _is_installed(parts[1]):
            absent.append(parts[1])
    return missing


def _requirements() -> list[str]:
    try:
        return metadata.requires("sparsenet") or []
    except metadata.PackageNotFoundError:  # run from its source, without having been installed
        return []


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
