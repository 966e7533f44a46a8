"""What all pictures share: their look, and the filling of templates."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsenet.extras import require
from sparsenet.files import write_atomic
from sparsenet.results import EpochMetrics
from sparsenet.texts import printable

INK, FAINT, GRID = "#22272e", "#8a929c", "#e3e6ea"
# The colours of Okabe and Ito, which people of any colour vision can tell apart.
SERIES_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, FAINT,
)  # fmt: skip
# Lines and gaps, in widths of the line; beyond as many lines as there are colours.
SERIES_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
STYLE = {
    "text.color": INK,
    "text.parse_math": False,  # a $ in the name of a class is a $
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "legend.frameon": False,
    "xtick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
}


def series(number: int) -> tuple[str, tuple[float, ...]]:
    """The colour and the dashes of a line among others, of which 32 can be told apart."""
    cycle, place = divmod(number, len(SERIES_COLOURS))
    return SERIES_COLOURS[place], SERIES_DASHES[cycle % len(SERIES_DASHES)]


@contextmanager
def picture(
    target: Path | io.BytesIO,
    width: float,
    height: float,
    title: str = "",
    names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """Yields a figure of *width* by *height* inches to draw on, and writes it to *target* as a PNG.

    The fonts are those that *title* and *names* ask for, as far as they are installed. *metadata*
    are texts in the file that are not seen. No window opens, and the caller's own settings of
    matplotlib stay as they are.
    """
    figures = require("matplotlib.figure", "train")
    families, missing = _fonts(frozenset().union(title, *names))
    matplotlib = require("matplotlib", "train")
    fonts = {"font.family": [*matplotlib.rcParams["font.family"], *families]}
    # A file in the current folder may ask for TeX, which runs programs.
    plain = {"text.usetex": False}
    with matplotlib.rc_context(STYLE | plain | fonts):
        figure = figures.Figure((width, height), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        if title:
            written = _escaped(title, missing)
            figure.suptitle(shorten(written, int(12 * width)), fontsize=13)
        yield figure
        png = target if isinstance(target, io.BytesIO) else io.BytesIO()
        figure.savefig(png, format="png", dpi=130, metadata=metadata)
    if isinstance(target, Path):
        write_atomic(target, png.getvalue())


def shorten(text: str, length: int) -> str:
    """*text*, or where it is longer than *length* its beginning and its end."""
    if len(text) <= length:
        return text
    end = length // 3  # where names that begin alike differ
    return f"{text[: length - 1 - end]}…{text[-end:]}"


def drawable(names: Sequence[str]) -> list[str]:
    """*names* as a picture shows them: one that no installed font can write becomes its number.

    Numbers count from 0 and are written ``#0``.
    """
    missing = _fonts(frozenset().union(*names))[1]
    return [f"#{i}" if missing & set(name) else name for i, name in enumerate(names)]


def escaped(text: str) -> str:
    """*text* with escapes such as ``\\u732b`` for characters that no installed font has."""
    return _escaped(text, _fonts(frozenset(text))[1])


def _escaped(text: str, missing: frozenset[str]) -> str:
    return "".join(ascii(each)[1:-1] if each in missing else each for each in text)


@cache
def _fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families of fonts that have what the usual one lacks of *characters*; what none has."""
    manager = require("matplotlib.font_manager", "train")
    usual = manager.findfont(manager.FontProperties())
    missing = characters - _written_by(usual, characters)
    families = []
    for font in sorted(manager.fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        regular = font.style == "normal" and font.weight == 400  # what the family's name finds
        if missing and regular and (found := _written_by(font.fname, missing)):
            families.append(font.name)
            missing -= found
    return tuple(families), missing


def _written_by(font: str, characters: frozenset[str]) -> frozenset[str]:
    # Of a font that shows code points in boxes, or pictures of one size, nothing can be used.
    face = require("matplotlib.font_manager", "train").get_font(font)
    if not face.scalable or "lastresort" in Path(font).name.lower():
        return frozenset()
    return frozenset(each for each in characters if face.get_char_index(ord(each)))


def measured_points(metrics: Sequence[EpochMetrics], column: str) -> list[tuple[int, float]]:
    """Pairs of epoch and value for the epochs in which *column* was measured."""
    pairs = [(row.epoch, getattr(row, column)) for row in metrics]
    return [(epoch, value) for epoch, value in pairs if value is not None]


def _written(value: Any) -> Any:
    """What becomes of a value in a template: a text, or a part of the page as it is."""
    return value if hasattr(value, "__html__") else printable(str(value), "\n\t")


def render(template: str, **values: Any) -> str:
    """Fills a template of the package; what *values* hold is escaped, and none may be missing."""
    environment = Environment(
        loader=PackageLoader("sparsenet"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_written,
    )
    return environment.get_template(template).render(values)
