"""What all pictures share: their look, and the filling of templates."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsenet.extras import require
from sparsenet.files import write_atomic
from sparsenet.results import EpochMetrics

INK, FAINT, GRID = "#22272e", "#8a929c", "#e3e6ea"
# The colours of Okabe and Ito, which people of any colour vision can tell apart.
SERIES_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, FAINT,
)  # fmt: skip
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


@contextmanager
def picture(
    target: Path | io.BytesIO, width: float, height: float, title: str = ""
) -> Iterator[Any]:
    """Yields a figure of *width* by *height* inches to draw on, and writes it to *target* as a PNG.

    No window opens, and the caller's own settings of matplotlib stay as they are.
    """
    figures = require("matplotlib.figure", "train")
    with require("matplotlib", "train").rc_context(STYLE), warnings.catch_warnings():
        # The font may lack the script of a class name.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = figures.Figure((width, height), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        if title:
            figure.suptitle(title, fontsize=13)
        yield figure
        png = target if isinstance(target, io.BytesIO) else io.BytesIO()
        figure.savefig(png, format="png", dpi=130)
    if isinstance(target, Path):
        write_atomic(target, png.getvalue())


def measured_points(metrics: Sequence[EpochMetrics], column: str) -> list[tuple[int, float]]:
    """Pairs of epoch and value for the epochs in which *column* was measured."""
    pairs = [(row.epoch, getattr(row, column)) for row in metrics]
    return [(epoch, value) for epoch, value in pairs if value is not None]


def render(template: str, **values: Any) -> str:
    """Fills a template of the package; what *values* hold is escaped, and none may be missing."""
    environment = Environment(
        loader=PackageLoader("sparsenet"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(values)
