"""What a network learned to read: how strongly each layer weighs each of its sources, as data and as a picture.

After figure 5 of DenseNet (arXiv:1608.06993) and its like in SparseNet (arXiv:1801.05895).
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from sparsenet.extras import require
from sparsenet.model import SparseNet
from sparsenet.pictures import picture

NO_LINK = "#dde1e6"
COLOURS = "viridis_r"  # bright yellow for 0 and dark for 1: both far from white and from the grey of no link
PANEL = 4.3  # inches of a stage's map with its labels
GAP = 0.5  # cells between the layers and what reads the stage output
TINY = torch.finfo(torch.float64).tiny  # keeps a reader of all zeros from dividing by zero
CAPTION = (
    "Mean absolute weight of a reader's first convolution (or the classifier) over a source's channels, times its "
    "batch norm scale; each column is divided by its largest value. Grey: no link. A network that has learned nothing "
    "is nearly of one colour."
)


def link_weights(model: SparseNet) -> list[Tensor]:
    """How strongly readers weigh their sources: for each stage fp64 ``(depth + 1, depth + 1)``, on the CPU.

    Row *j* is feature *j* (0: the stage input), column *i - 1* the reader *i*: a layer by its first convolution, and
    last the transition's convolution or the classifier. An element is the mean of ``|weight| * |scale|`` over the
    channels that come from *j*, all output channels and the kernel; *scale* is that of the reader's batch norm.
    NaN: no link; without a classifier nothing weighs the last stage's output, and its column is NaN too.

    The papers show ``|weight|`` alone. But the same network can be written with a channel's weights halved and its
    scale and shift doubled: with the scale, equal networks have equal values. What a convolution makes is normalised
    again, so only ratios within a column mean something.

    Raises ``ValueError`` for a network that sums, where a reader weighs the sum and not its sources.
    """
    found = model.architecture.aggregation
    if found == "sum":
        raise ValueError(
            "filters: expected a network that concatenates, found aggregation 'sum': a layer weighs the sum that it "
            "reads, not each source; such a network has no picture of its filters"
        )
    return [_stage_weights(model, number) for number in range(len(model.stages))]


def _stage_weights(model: SparseNet, number: int) -> Tensor:
    stage = model.architecture.stages[number]
    weights = torch.full(
        (stage.topology.depth + 1, stage.topology.depth + 1), torch.nan, dtype=torch.float64
    )
    for column, (read, channels) in enumerate(
        zip(stage.topology.sources, _channels(model, number), strict=False)
    ):
        slices = channels.split([stage.widths[j] for j in read])
        weights[list(read), column] = torch.stack([channel.mean() for channel in slices])
    return weights


def _channels(model: SparseNet, number: int) -> list[Tensor]:
    """For each reader of a stage what it weighs the channels with that it gathers, ``(C_read,)``."""
    stage: Any = model.stages[number]
    last: Any = (
        model.transitions[number].conv if number < len(model.transitions) else model.classifier
    )
    readers = [(layer[0].norm, layer[0].conv) for layer in stage.layers]
    if hasattr(last, "weight"):
        readers.append((stage.norm, last))
    return [
        _magnitude(reader.weight) * norm.weight.detach().cpu().double().abs()
        for norm, reader in readers
    ]


def _magnitude(weight: Tensor) -> Tensor:
    """Mean absolute value for each input channel of a convolution or linear map."""
    return weight.detach().cpu().double().abs().transpose(0, 1).flatten(1).mean(1)


def draw_filters(model: SparseNet, target: Path, title: str = "") -> None:
    """A PNG of :func:`link_weights`: a map for each stage, each column divided by its largest value.

    *title* names the network. Raises ``ValueError`` as :func:`link_weights` does.
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
            mesh = _draw_stage(
                axis, weights, "classifier" if number == len(stages) else "transition"
            )
        for axis in axes[::columns]:
            axis.set_ylabel("source layer")
        bar = figure.colorbar(mesh, ax=axes, shrink=0.7, pad=0.02, aspect=30 * rows)
        bar.set_label("weight relative to the reader's largest")
        bar.outline.set_visible(False)
        figure.supxlabel(fill(CAPTION, min(130, int(13 * figure.get_figwidth()))), fontsize=8.5)


def _draw_stage(axis: Any, weights: Tensor, end: str) -> Any:
    side = len(weights)
    shades = weights / weights.nan_to_num().amax(0).clamp_min(TINY)
    blank = torch.where(
        weights.isnan().triu(), 0.0, torch.nan
    )  # above the diagonal a link is possible
    grey = require("matplotlib.colors", "train").ListedColormap([NO_LINK])
    edges = [*range(side), side - 1 + GAP, side + GAP], range(side + 1)
    style = {"edgecolors": "white" if side < 80 else "none", "linewidth": min(1.0, 12 / side)}
    axis.pcolormesh(*edges, _set_apart(blank), cmap=grey, **style)
    mesh = axis.pcolormesh(*edges, _set_apart(shades), cmap=COLOURS, vmin=0, vmax=1, **style)
    axis.set(aspect="equal", xlabel="reading layer")
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    step = next(step for step in (1, 2, 5, 10, 20, 50, side) if side / step <= 13)
    numbers = range(step, side, step)
    readers = [*(i - 0.5 for i in numbers), side - 0.5 + GAP]
    axis.set_xticks(readers, [*map(str, numbers), f"\n{end}"], fontsize=8)
    axis.set_yticks([j + 0.5 for j in (0, *numbers)], ["input", *map(str, numbers)], fontsize=8)
    return mesh


def _set_apart(cells: Tensor) -> Any:
    """The same as an array, an empty column before the last, which is no layer."""
    return torch.cat(
        [cells[:, :-1], torch.full_like(cells[:, :1], torch.nan), cells[:, -1:]], 1
    ).numpy()
