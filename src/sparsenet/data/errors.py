"""Errors about data: each is one line."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from sparsenet.memory import shortage
from sparsenet.texts import cut

# What decoders of images, pickles, archives and tables raise on damaged bytes, seen while fuzzing.
DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class DataError(ValueError):
    """Data that cannot be used: one line with what was expected, what was found, what to do."""

    def __init__(self, message: str) -> None:
        # Names in the data may have line breaks, and any length.
        super().__init__(cut(" ".join(message.splitlines())))


class BadImage(DataError):
    """A file that is not a readable image; the message names it."""


def shortened(names: Iterable[str], most: int = 5) -> str:
    """The first of *names* in one line, and a sign where there are more than *most*."""
    listed = list(names)
    return ", ".join(listed[:most]) + ", …" * (len(listed) > most)


def count_images(count: int, kind: str = "") -> str:
    """So many images in words: ``20 test images``, ``1 image``."""
    return f"{count} {kind}{' ' * bool(kind)}image{'s' * (count != 1)}"


def unreadable(skipped: Sequence[str]) -> tuple[str, ...]:
    """A line about images that were left out, of which *skipped* say what is wrong; or none."""
    if not skipped:
        return ()
    return (f"left out: {count_images(len(skipped), 'unreadable')}, the first: {skipped[0]}",)


def reason(error: BaseException) -> str:
    """The message of *error*, of one of the system without the path; or its type without any."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def decoding(
    where: str, expected: str, *damage: type[Exception], error: type[DataError] = DataError
) -> Iterator[None]:
    """Turns what a decoder raises, ``DAMAGE`` and *damage*, into an *error* naming *where*.

    Where there was too little memory, it is a plain ``DataError``.
    """
    try:
        yield
    except DataError:
        raise
    except (*DAMAGE, *damage) as cause:
        if shortage(cause):  # not for those who leave out what is damaged
            found = f"it damaged, or there is too little memory: {reason(cause)}"
            raise DataError(f"{where}: expected {expected}, found {found}") from cause
        raise error(f"{where}: expected {expected}, found it damaged: {reason(cause)}") from cause
