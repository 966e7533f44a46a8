"""What is printed of values, names and messages, such that no terminal obeys or breaks them."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

JOINERS = "\u200c\u200d"  # of letters, in Persian and Hindi words and in emoji
LONGEST = 1900  # characters of a line


def shown(value: object) -> str:
    """*value* as Python writes it, of a long text its beginning."""
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}…"


def printable(text: str, kept: str = "") -> str:
    """*text* with escapes for what cannot be printed and is not *kept*.

    That is a line break in the name of a file, what a terminal would obey, what turns the direction
    of writing, and half a surrogate pair, which stands for a byte of a name that is not UTF-8.
    """
    if text.isprintable():
        return text

    def is_shown(each: str) -> bool:
        return each.isprintable() or each in JOINERS + kept or unicodedata.category(each) == "Zs"

    return "".join(each if is_shown(each) else ascii(each)[1:-1] for each in text)


def cut(text: str) -> str:
    """*text*, but of one of more than ``LONGEST`` characters the beginning and the end."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def one_line(text: str) -> str:
    """What is printed of a message: ``printable``, and what ``cut`` leaves of a long one."""
    return cut(printable(cut(text)))  # escapes take more room


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """Returns ``; did you mean ...?`` where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), 1, likeness)
    return f"; did you mean {near[0]}?" if near else ""
