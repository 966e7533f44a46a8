"""Fields of settings: their help on the command line, and the check of their values."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sparsenet.texts import shown

# What the fields of files hold. Numbers are bounded, so that none is too large to compute with.
Count = Annotated[int, Meta(ge=0, le=2**53)]  # what a float holds exactly
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Percent = Annotated[float, Meta(ge=0, le=100)]
LONGEST_NAME = 1000  # characters
Name = Annotated[str, Meta(max_length=LONGEST_NAME)]
# What a setting is in a file: a fetch may be a table.
Value = (
    bool
    | int
    | float
    | Annotated[str, Meta(max_length=10_000)]
    | list[int | float | list[int]]
    | None
)

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    int | tuple[int, ...]: "whole numbers",
    tuple[int, ...]: "whole numbers",
    tuple[float, ...]: "numbers",
}


def setting(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field whose flag shows *help* and accepts only *choices*, where there are any."""
    metadata = {"help": help, "choices": choices} if choices else {"help": help}
    return dataclasses.field(default=default, metadata=metadata)


def expect(
    holds: bool, name: str, expected: str, found: object, error: type[ValueError] = ValueError
) -> None:
    """Raises *error*, "name: expected ..., found ...", unless the condition *holds*."""
    if not holds:
        raise error(f"{name}: expected {expected}, found {shown(found)}")


def check_settings(
    owner: Any,
    *rules: tuple[str, bool, str],
    prefix: str = "",
    error: type[ValueError] = ValueError,
) -> None:
    """Raises *error* for the first field of the dataclass *owner* that is not as expected.

    A field with choices must have one of them. Each of *rules* names a field, says whether its
    value is valid, and what is expected of it. Messages begin with *prefix* and the field's name.
    """
    for field in dataclasses.fields(owner):
        if choices := field.metadata.get("choices"):
            expected = "one of " + ", ".join(map(str, choices))
            value = getattr(owner, field.name)
            expect(value in choices, prefix + field.name, expected, value, error)
    for name, holds, expected in rules:
        expect(holds, prefix + name, expected, getattr(owner, name), error)


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises ``ValueError`` where *value*, as a JSON file has it, is not of a *kind*."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        expected = WORDS.get(kind, "a name or a list of lists of whole numbers")
        message = f"{name}: expected {expected}, found {shown(value)}"
        raise ValueError(message) from None


def plain(value: Any) -> Any:
    """*value* in Python's own types where it is, or holds, numbers or an array of NumPy's."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value
