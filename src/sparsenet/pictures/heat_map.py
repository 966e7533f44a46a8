"""Heat maps over pictures: what speaks for a class in orange, what speaks against it in blue."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from sparsenet.extras import require

MOST_PIXELS = 1024  # of a side of what is drawn
FEWEST_PIXELS = 256  # of the longer side: a smaller picture is enlarged by a whole number
# Of Okabe and Ito's colours two that people of any colour vision can tell apart, also from grey.
FOR, AGAINST = (213, 94, 0), (0, 114, 178)
STRENGTH = 0.85  # of the colour where the map is largest
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


def overlay(picture: np.ndarray, heat_map: np.ndarray, grid: Grid) -> np.ndarray:
    """The whole *picture*, uint8 ``(C, H, W)``, in greys under its *heat_map*: uint8 ``(h, w, 3)``.

    The map, ``(rows, columns)``, is that of the central square to which pictures are cropped; what
    was cropped away is faded. It is interpolated between the centres of cells. Large pictures are
    reduced, and small ones enlarged.
    """
    grey = _grey(_fitting(picture))
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
    largest = float(np.abs(heat_map).max()) or 1.0
    return STRENGTH * np.abs(values / largest).clip(0, 1), np.where(values > 0, FOR, AGAINST)


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG of *pixels*, uint8 ``(H, W, 3)``, or 4 with transparency."""
    file = io.BytesIO()
    require("PIL.Image", "train").fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _fitting(picture: np.ndarray) -> Any:
    """The picture for Pillow, of a size that can be looked at."""
    pillow = require("PIL.Image", "train")
    pixels = picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, 2)
    image = pillow.fromarray(np.ascontiguousarray(pixels))
    longest = max(image.size)
    if longest > MOST_PIXELS:
        sides = (max(1, round(side * MOST_PIXELS / longest)) for side in image.size)
        return image.resize(tuple(sides), pillow.Resampling.BILINEAR)
    times = -(-FEWEST_PIXELS // longest)
    sides = (times * side for side in image.size)
    return image.resize(tuple(sides), pillow.Resampling.NEAREST)


def _grey(image: Any) -> np.ndarray:
    return np.asarray(image.convert("L"), np.float64)


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
