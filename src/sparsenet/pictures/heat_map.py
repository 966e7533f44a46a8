"""Heat maps over pictures: what speaks for a class in orange, what speaks against it in blue."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsenet.extras import require
from sparsenet.pictures.figure import FAINT, picture

MOST_PIXELS = 1024  # of a side of what is drawn
FEWEST_PIXELS = 256  # of the longer side: a smaller picture is enlarged by a whole number
# Of Okabe and Ito's colours two that people of any colour vision can tell apart, also from grey.
FOR, AGAINST = (213, 94, 0), (0, 114, 178)
STRENGTH = 0.85  # of the colour where the map is largest
MARK, MARK_LENGTH = "sparsenet", 16  # a text in the file by which it is known as ours
FADED = 0.75  # how much of what was cropped away is white


class Grid(NamedTuple):
    """Where the cells of a heat map lie in the square image that the network sees.

    The first begins *first* pixels from the left and from the top, each is *step* pixels wide and
    high, and the image has *size* pixels a side.
    """

    first: float
    step: float
    size: int


def veil(heat_map: np.ndarray, grid: Grid, pixels: int) -> np.ndarray:
    """The *heat_map* alone, to be laid over the central square: uint8 ``(pixels, pixels, 4)``."""
    positions = _positions(pixels, pixels)
    weights = _interpolation(positions, heat_map.shape[0], grid)
    strength, colour = _coloured(heat_map, weights, weights)
    drawn: np.ndarray = np.rint(np.concatenate([colour, 255 * strength], 2)).astype(np.uint8)
    return drawn


def overlay(image: np.ndarray, heat_map: np.ndarray, grid: Grid) -> np.ndarray:
    """The whole *image*, uint8 ``(C, H, W)``, in greys under its *heat_map*: uint8 ``(h, w, 3)``.

    The map, ``(rows, columns)``, is that of the central square to which pictures are cropped; what
    was cropped away is faded. It is interpolated between the centres of cells. Large pictures are
    reduced, and small ones enlarged.
    """
    grey = np.asarray(_fitting(image).convert("L"), np.float64)
    height, width = grey.shape
    rows, columns = _positions(height, min(height, width)), _positions(width, min(height, width))
    down = _interpolation(rows, heat_map.shape[0], grid)  # (height, cells)
    across = _interpolation(columns, heat_map.shape[1], grid)  # (width, cells)
    strength, colour = _coloured(heat_map, down, across)
    drawn = grey[..., None] * (1 - strength) + colour * strength
    seen = _within(rows)[:, None] & _within(columns)[None, :]
    faded = grey[..., None] * (1 - FADED) + 255 * FADED
    return np.rint(np.where(seen[..., None], drawn, faded)).astype(np.uint8)


def _coloured(
    heat_map: np.ndarray, down: np.ndarray, across: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How strongly each pixel is coloured, ``(H, W, 1)``, and its colour, ``(H, W, 3)``."""
    values = (down @ heat_map.astype(np.float64) @ across.T)[..., None]
    shares = values / _largest(heat_map)
    return STRENGTH * np.abs(shares).clip(0, 1), np.where(values > 0, FOR, AGAINST)


def _largest(heat_map: np.ndarray) -> float:
    return float(np.abs(heat_map).max()) or 1.0


def draw_explanation(
    image: np.ndarray,
    heat_map: np.ndarray,
    grid: Grid,
    title: str,
    effects: Sequence[Sequence[float]],
    mark: str,
) -> bytes:
    """The bytes of a PNG: the picture, its heat map, and what a logit loses without each layer.

    *effects* has for each stage those of its layers. *mark*, of ``MARK_LENGTH`` characters, is
    written into the file.
    """
    file = io.BytesIO()
    _, height, width = image.shape
    above_inches = min(max(4.0 * height / width, 2.0), 5.0)
    with picture(file, 9, above_inches + 2.7, title, metadata={MARK: mark}) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(above_inches, 2.2))
        axes = above.subplots(1, 2)
        shown = overlay(image, heat_map, grid)
        for axis, pixels in zip(axes, (_fitting(image), shown), strict=True):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axis.axis("off")
        _draw_scale(above, axes, _largest(heat_map))
        _draw_effects(below.subplots(), effects)
    return file.getvalue()


def mark_of(png: bytes) -> bytes:
    """The mark in a PNG of ``draw_explanation``, given its first 4 KiB; else nothing."""
    _, _, text = png[:4096].partition(f"tEXt{MARK}\0".encode())
    return text.partition(b"\0")[0][:MARK_LENGTH]


def _draw_scale(figure: Any, axes: Any, largest: float) -> None:
    colours = require("matplotlib.colors", "train")
    shades = [tuple(level / 255 for level in colour) for colour in (AGAINST, (235, 235, 235), FOR)]
    scale = require("matplotlib.cm", "train").ScalarMappable(
        colours.Normalize(-largest, largest), colours.LinearSegmentedColormap.from_list("", shades)
    )
    bar = figure.colorbar(scale, ax=axes, shrink=0.9, pad=0.02, aspect=30)
    bar.set_label("what places say (mean + bias = logit)")
    bar.outline.set_visible(False)


def _draw_effects(axis: Any, effects: Sequence[Sequence[float]]) -> None:
    first, centres = 0, []
    speaking_for, against = (tuple(level / 255 for level in each) for each in (FOR, AGAINST))
    for stage in effects:
        places = range(first, first + len(stage))
        colours = [speaking_for if effect > 0 else against for effect in stage]
        axis.bar(places, stage, color=colours)
        centres.append(first + (len(stage) - 1) / 2)
        first += len(stage) + 1
    axis.axhline(0, color=FAINT, lw=0.8)
    axis.set_xticks(centres, [f"stage {number}" for number in range(1, len(effects) + 1)])
    axis.set(title="how far the logit falls without a layer, first to last")
    axis.grid(axis="y")
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", length=0)
    axis.spines.bottom.set_visible(False)


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG of *pixels*, uint8 ``(H, W, 3)``, or 4 with transparency."""
    file = io.BytesIO()
    require("PIL.Image", "train").fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _fitting(image: np.ndarray) -> Any:
    """The image for Pillow, of a size that can be looked at."""
    pillow = require("PIL.Image", "train")
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)
    found = pillow.fromarray(np.ascontiguousarray(pixels))
    longest = max(found.size)
    if longest > MOST_PIXELS:
        sides = (max(1, round(side * MOST_PIXELS / longest)) for side in found.size)
        return found.resize(tuple(sides), pillow.Resampling.BILINEAR)
    times = -(-FEWEST_PIXELS // longest)
    sides = (times * side for side in found.size)
    return found.resize(tuple(sides), pillow.Resampling.NEAREST)


def _positions(pixels: int, square: int) -> np.ndarray:
    """Where pixels' centres lie on the central square, which goes from 0 to 1."""
    return (np.arange(pixels) + 0.5 - (pixels - square) / 2) / square


def _within(positions: np.ndarray) -> np.ndarray:
    within: np.ndarray = (positions >= 0) & (positions <= 1)
    return within


def _interpolation(positions: np.ndarray, cells: int, grid: Grid) -> np.ndarray:
    """How much each cell counts at each position: ``(positions, cells)``, rows that sum to one."""
    places = (positions * grid.size - grid.first) / grid.step - 0.5  # cells' centres are whole
    weights: np.ndarray = 1 - np.abs(places.clip(0, cells - 1)[:, None] - np.arange(cells))
    return weights.clip(min=0)
