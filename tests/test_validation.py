"""Settings carry their help and choices, and the first wrong one is named in one line."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from sparsenet.texts import printable
from sparsenet.validation import check_settings, expect, setting


@dataclass(frozen=True)
class Oven:
    heat: int = setting(180, "degrees")
    mode: str = setting("top", "where from", ("top", "bottom"))

    def __post_init__(self) -> None:
        check_settings(self, ("heat", self.heat > 0, "a positive number"), prefix="--")


def test_a_setting_has_its_help_and_choices_where_there_are_any() -> None:
    assert [dict(field.metadata) for field in fields(Oven)] == [
        {"help": "degrees"},
        {"help": "where from", "choices": ("top", "bottom")},
    ]
    assert Oven() == Oven(180, "top")


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--heat: expected a positive number, found -1$"):
        Oven(heat=-1)
    with pytest.raises(ValueError, match=r"^--mode: expected one of top, bottom, found 'side'$"):
        Oven(heat=-1, mode="side")  # choices are checked first


def test_errors_are_of_the_asked_type() -> None:
    expect(True, "top", "at least 1", 1)
    with pytest.raises(UnicodeError, match=r"^top: expected at least 1, found 0$"):
        expect(False, "top", "at least 1", 0, UnicodeError)


def test_what_cannot_be_printed_is_escaped() -> None:
    assert (
        printable("two\nlines, half \udce9, 小狗 é\x1b") == r"two\nlines, half \udce9, 小狗 é\x1b"
    )
    names = "پیشی\u200cها", "👩\u200d🌾", "b\u00a0c"  # of letters that are joined, or not
    assert all(printable(name) == name for name in names)
    assert printable("one\ntwo\x1b\u202e", "\n") == "one\ntwo\\x1b\\u202e"
