"""What a network learned to read: how strongly each layer weighs each of its sources.

The picture is that of figure 5 of DenseNet (arXiv:1608.06993) and its like in SparseNet
(arXiv:1801.05895).
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsenet.extras import require
from sparsenet.model import SparseNet
from sparsenet.pictures.figure import picture

NO_LINK = "#dde1e6"
# Bright yellow for 0 and dark for 1 are both far from white and from the grey of no link.
COLOURS = "viridis_r"
PANEL = 4.3  # inches of a stage's map with its labels
GAP = 0.5  # cells between the layers and what reads the stage output
CAPTION = (
    "Mean absolute weight of a reader's first convolution (or the classifier) over a source's "
    "channels, times its batch norm scale; each column is divided by its largest value. "
    "Grey: no link. A network that has learned nothing is nearly of one colour."
)


def link_weights(model: SparseNet) -> list[Tensor]:
    """Returns for each stage how strongly readers weigh their sources.

    The tensors are fp64 ``(depth + 1, depth + 1)`` on the CPU. Row *j* is feature *j* (0 is the
    stage input). Column *i - 1* is reader *i*: a layer by its first convolution, and last the
    transition's convolution or the classifier. An element is the mean of ``|weight| * |scale|``
    over the channels that come from *j*, all output channels and the kernel, where *scale* is that
    of the reader's batch norm. NaN stands where there is no link, and in the last column of a
    network without a classifier.

    The papers show ``|weight|`` alone. But the same network can be written with a channel's
    weights halved and its scale and shift doubled: with the scale, equal networks have equal
    values. What a convolution makes is normalised again, so only ratios within a column mean
    something.

    Raises ``ValueError`` for a network that sums, where a reader weighs the sum and not its
    sources.
    """
    if model.architecture.aggregation == "sum":
        raise ValueError(
            "filters: expected a network that concatenates, found aggregation 'sum': a layer "
            "weighs the sum that it reads, not each source; such a network has no picture of its "
            "filters"
        )
    return [_stage_weights(model, number) for number in range(len(model.stages))]


def _stage_weights(model: SparseNet, number: int) -> Tensor:
    stage = model.architecture.stages[number]
    side = stage.topology.depth + 1
    weights = torch.full((side, side), torch.nan, dtype=torch.float64)
    # A network without a classifier has one reader less than there are sets of sources.
    readers = zip(stage.topology.sources, _channel_weights(model, number), strict=False)
    for column, (sources, channels) in enumerate(readers):
        slices = channels.split([stage.widths[source] for source in sources])
        weights[list(sources), column] = torch.stack([each.mean() for each in slices])
    return weights


def _channel_weights(model: SparseNet, number: int) -> list[Tensor]:
    # For each reader of the stage: what it weighs each channel with that it reads, (C_read,).
    stage: Any = model.stages[number]
    readers = [(layer[0].norm, layer[0].conv) for layer in stage.layers]
    if number < len(model.transitions):
        readers.append((stage.norm, model.transitions[number].conv))
    elif isinstance(model.classifier, torch.nn.Linear):
        readers.append((stage.norm, model.classifier))
    weights = []
    for norm, reader in readers:
        magnitude = reader.weight.detach().cpu().double().abs()
        scale = norm.weight.detach().cpu().double().abs()
        weights.append(magnitude.transpose(0, 1).flatten(1).mean(1) * scale)
    return weights


def draw_filters(model: SparseNet, target: Path, title: str = "") -> None:
    """Draws a PNG of ``link_weights``, a map for each stage.

    Each column is divided by its largest value. Raises ``ValueError`` as ``link_weights`` does.
    """
    stages = link_weights(model)
    rows = -(-len(stages) // 3)
    columns = -(-len(stages) // rows)
    with picture(target, PANEL * columns + 1, PANEL * rows + 1, title) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(stages) :]:
            axis.axis("off")
        for number, (axis, weights) in enumerate(zip(axes, stages, strict=False), start=1):
            axis.set_title(f"stage {number}")
            last_reader = "classifier" if number == len(stages) else "transition"
            mesh = _draw_stage(axis, weights.numpy(), last_reader)
        for axis in axes[::columns]:
            axis.set_ylabel("source layer")
        bar = figure.colorbar(mesh, ax=axes, shrink=0.7, pad=0.02, aspect=30 * rows)
        bar.set_label("weight relative to the reader's largest")
        bar.outline.set_visible(False)
        figure.supxlabel(fill(CAPTION, min(130, int(13 * figure.get_figwidth()))), fontsize=8.5)


def _draw_stage(axis: Any, weights: Any, last_reader: str) -> Any:
    side = len(weights)
    largest = np.nan_to_num(weights).max(0)
    # A reader of zeros only is divided by 1.
    shades = weights / np.where(largest > 0, largest, 1)
    # A link is possible on and above the diagonal; what is NaN stays white.
    no_link = np.where(np.triu(np.isnan(weights)), 0, np.nan)
    grey = require("matplotlib.colors", "train").ListedColormap([NO_LINK])
    # The last column, which is no layer, stands apart: before it lies an empty one.
    shades, no_link = (np.insert(cells, side - 1, np.nan, axis=1) for cells in (shades, no_link))
    edges = [*range(side), side - 1 + GAP, side + GAP], range(side + 1)
    style = {"edgecolors": "white" if side < 80 else "none", "linewidth": min(1.0, 12 / side)}
    axis.pcolormesh(*edges, no_link, cmap=grey, **style)
    mesh = axis.pcolormesh(*edges, shades, cmap=COLOURS, vmin=0, vmax=1, **style)
    axis.set(aspect="equal", xlabel="reading layer")
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    step = next(step for step in (1, 2, 5, 10, 20, 50, side) if side / step <= 13)
    numbers = range(step, side, step)
    readers = [*(number - 0.5 for number in numbers), side - 0.5 + GAP]
    axis.set_xticks(readers, [*map(str, numbers), f"\n{last_reader}"], fontsize=8)
    sources = [number + 0.5 for number in (0, *numbers)]
    axis.set_yticks(sources, ["input", *map(str, numbers)], fontsize=8)
    return mesh
