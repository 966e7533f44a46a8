"""Settings in dataclasses: the help of their flags, and the refusal of a wrong value."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    """Return a dataclass field whose flag has this *help*, and takes one of *choices* if any."""
    metadata = {"help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def expect(
    holds: bool, name: str, expected: str, found: object, error: type[ValueError] = ValueError
) -> None:
    """Raise *error*, ``NAME: expected EXPECTED, found FOUND``, unless it *holds*."""
    if not holds:
        raise error(f"{name}: expected {expected}, found {found!r}")
