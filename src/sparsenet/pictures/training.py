"""How training went: loss and error, the confusion matrix, confidence, the worst mistakes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet.data.dataset import Images
from sparsenet.evaluation import CALIBRATION_BINS, calibration
from sparsenet.extras import require
from sparsenet.pictures.figure import (
    FAINT,
    INK,
    drawable,
    escaped,
    measured_points,
    picture,
    shorten,
)
from sparsenet.results import EpochMetrics, likely

SPLITS = {"train": "train", "val": "val", "test": "test"}  # and what pictures call them
SPLIT_COLOURS = {"train": "#0072b2", "val": "#e69f00", "test": "#d55e00"}
SQUARES = 1000  # of a side of the confusion matrix; the picture has 1,800 points
MISTAKES_ROWS, MISTAKES_COLUMNS = 4, 8
NUMBERED = "#: number in result.json's list of classes, from 0; no font here has this script"


def draw_curves(
    rows: Sequence[EpochMetrics],
    target: Path,
    title: str = "",
    names: Mapping[str, str] = SPLITS,
    chosen: int = 0,
) -> None:
    """Draws a PNG of loss and error over the epochs, and of the learning rate.

    The error is written at the *chosen* epoch, whose weights are kept, or else at the last. The
    rate is drawn as a line at each drop, or as a curve where it changes all the time. *names* are
    what the splits are called.
    """
    with picture(target, 11, 4.4, title) as figure:
        loss_axis, error_axis = figure.subplots(1, 2)
        _draw_quantity(loss_axis, rows, "loss", "nats", names)
        _draw_quantity(error_axis, rows, "error", "%", names)
        _annotate_error(error_axis, rows, names, chosen)
        rates = measured_points(rows, "lr")
        drops = [after for before, after in pairwise(rates) if before[1] != after[1]]
        if 3 * len(drops) > len(rates):
            _draw_rates(loss_axis.twinx(), rates)
        else:
            _mark_drops(loss_axis, drops)
            _mark_drops(error_axis, drops)


def _draw_quantity(
    axis: Any, rows: Sequence[EpochMetrics], quantity: str, unit: str, names: Mapping[str, str]
) -> None:
    axis.set(xlabel="epoch", title=f"{quantity} ({unit})")
    axis.grid(axis="y")
    axis.xaxis.get_major_locator().set_params(integer=True)
    values = []
    for split, colour in SPLIT_COLOURS.items():
        points = measured_points(rows, f"{split}_{quantity}")
        if points:
            line = ".-" if len(points) <= 40 else "-"
            axis.plot(*zip(*points, strict=True), line, color=colour, label=names[split])
            values += [value for _, value in points]
    if not values:
        axis.set(xticks=[], yticks=[])
        place = {"transform": axis.transAxes, "ha": "center"}
        axis.text(0.5, 0.5, "no epoch finished yet", color=FAINT, **place)
        return
    # The first epochs of a long run would leave no room for the rest: they may leave the picture.
    values.sort()
    top = values[-1] if len(values) < 100 else values[int(0.98 * len(values))]
    axis.set(ylim=(0, 1.08 * top or 1), xlim=(0, 1.015 * rows[-1].epoch))
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1.01)}
    axis.legend(ncols=3, handlelength=1.2, columnspacing=1.4, **place)


def _annotate_error(
    axis: Any, rows: Sequence[EpochMetrics], names: Mapping[str, str], chosen: int
) -> None:
    tested = measured_points(rows, "test_error")
    split = "test" if tested else "val"
    points = tested or measured_points(rows, "val_error")
    if not points:
        return
    epoch, error = next((each for each in points if each[0] == chosen), points[-1])
    when = f"\nepoch {epoch}" * (epoch != points[-1][0])
    colour = SPLIT_COLOURS[split]
    axis.plot(epoch, error, "o", color=colour, ms=7, mec="white", clip_on=False, zorder=5)
    axis.annotate(
        f"{names[split]}\n{error:.2f} %{when}",
        (1.015, min(error, axis.get_ylim()[1])),
        xycoords=("axes fraction", "data"),
        annotation_clip=False,
        va="center",
        weight="bold",
        color=colour,
    )


def _draw_rates(axis: Any, rates: Sequence[tuple[int, float]]) -> None:
    axis.plot(*zip(*rates, strict=True), color=FAINT, lw=1, ls=":")
    axis.set_ylim(bottom=0)
    axis.tick_params(labelcolor=FAINT, labelsize=8)
    axis.set_ylabel("learning rate (dotted)", color=FAINT, fontsize=8)


def _mark_drops(axis: Any, drops: Sequence[tuple[int, float]]) -> None:
    style = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 8, "color": FAINT}
    for epoch, rate in drops:
        axis.axvline(epoch - 0.5, color=FAINT, lw=0.8, ls="--", zorder=0)
        place = epoch - 0.5, 0.98
        axis.annotate(f"lr {rate:.3g} ", place, xycoords=("data", "axes fraction"), **style)


def draw_confusion(labels: Tensor, predicted: Tensor, classes: Sequence[str], target: Path) -> None:
    """Draws a PNG of the confusion matrix, whose rows are the true classes.

    *labels* and *predicted* are int64 ``(N,)``, on the CPU. Each row is drawn in percent of its own
    images, and where there is room their numbers are written below. Of more than ``SQUARES``
    classes, as many neighbouring ones share a row as it takes. A class whose name no installed font
    can write is a number, from 0.
    """
    images, wrong = len(labels), int((labels != predicted).sum())
    counts, shared = _counts(labels, predicted, len(classes))
    percent = _percent(counts)
    side = min(max(6.0, 1.5 + 0.62 * len(classes)), 14.0)
    title = f"Confusion: {100 * wrong / max(images, 1):.2f} % of {images:,} images wrong"
    names = drawable(classes)
    with picture(target, side + 1, side, title, names) as figure:
        axis = figure.subplots()
        # Over the square root of the share a confusion of 1 % can be told from none.
        norm = require("matplotlib.colors", "train").PowerNorm(0.5, 0, 100)
        end = len(percent) * shared - 0.5
        extent = (-0.5, end, end, -0.5)
        image = axis.imshow(percent.numpy(), cmap="Blues", norm=norm, extent=extent)
        ticks = [0, 1, 5, 10, 25, 50, 100]
        bar = figure.colorbar(image, ax=axis, ticks=ticks, shrink=0.8, pad=0.02, aspect=36)
        bar.set_label("% of the true class")
        bar.outline.set_visible(False)
        axis.spines[:].set_visible(False)
        together = f", {shared} classes in a row" * (shared > 1)
        axis.set(xlabel="predicted", ylabel=f"true{together}")
        _name_classes(axis, names)
        _explain_numbers(figure, names, classes)
        if len(classes) <= 20:
            _write_cells(axis, percent, counts)


def _counts(labels: Tensor, predicted: Tensor, classes: int) -> tuple[Tensor, int]:
    """A confusion matrix, and how many classes share each of its rows."""
    shared = -(-classes // SQUARES)
    rows = -(-classes // shared)
    pairs = labels // shared * rows + predicted // shared
    return torch.bincount(pairs, minlength=rows * rows).view(rows, rows), shared


def _percent(counts: Tensor) -> Tensor:
    """The same in percent of each row; that of classes without images is NaN, drawn blank."""
    return 100 * counts.double() / counts.sum(1, keepdim=True)


def _explain_numbers(
    figure: Any, names: Sequence[str], classes: Sequence[str], more: str = ""
) -> None:
    lines = [more] * bool(more) + [NUMBERED] * (list(names) != list(classes))
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8.5)


def _name_classes(axis: Any, classes: Sequence[str]) -> None:
    few = len(classes) <= 20
    step = 1 + (len(classes) - 1) // 100
    places = range(0, len(classes), step)
    names = [shorten(name, 20) for name in classes[::step]]
    size = min(10.0, 660 / len(classes) * step)
    rotation = 45 if few else 90
    style = {"rotation": rotation, "ha": "right", "va": "center", "rotation_mode": "anchor"}
    if few and max(map(len, names)) <= 2:
        style = {}
    axis.set_xticks(places, names, fontsize=size, **style)
    axis.set_yticks(places, names, fontsize=size)


def _write_cells(axis: Any, percent: Tensor, counts: Tensor) -> None:
    for y, x in counts.nonzero().tolist():
        share, count = percent[y, x].item(), int(counts[y, x])
        colour = "white" if share > 30 else INK
        style = {"ha": "center", "color": colour}
        text = f"{share:.0f}" if share >= 9.95 else f"{share:.1f}"
        axis.text(x, y, text, va="bottom", fontsize=8, **style)
        axis.text(x, y + 0.08, f"{count:,}", va="top", fontsize=6, **style)


def draw_reliability(confidence: Tensor, right: Tensor, target: Path) -> None:
    """Draws a PNG that compares how sure the network is with how often it is right.

    *confidence* (0 to 1) and *right*, bool, are ``(N,)``, on the CPU. The bins are those of the
    expected calibration error. Bars reach over the accuracies that fit a bin in 95 of 100 cases
    (Wilson's interval), which is wide where it has few images.
    """
    bins = calibration(confidence, right)
    counts = bins[0]
    middles = (torch.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    there = counts > 0
    n, sure, accuracy = counts[there], *(bins[1:, there] / counts[there])
    gap = 100 * (n * (accuracy - sure).abs()).sum().item() / len(right)
    mean, share = (100 * each.double().mean().item() for each in (confidence, right))
    title = f"{mean:.1f} % sure, {share:.1f} % right; expected calibration error {gap:.2f} %"
    with picture(target, 6.5, 6.5, title) as figure:
        axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axis.plot((0, 100), (0, 100), "--", color=FAINT, linewidth=1)
        low, high = torch.tensor(list(map(likely, accuracy.tolist(), n.tolist()))).T
        bars = 100 * torch.stack([accuracy - low, high - accuracy]).clamp(min=0)
        style = {"color": SPLIT_COLOURS["train"], "fmt": "o-", "capsize": 2, "elinewidth": 1}
        axis.errorbar((100 * sure).tolist(), (100 * accuracy).tolist(), bars.tolist(), **style)
        axis.set(xlim=(0, 100), ylim=(0, 102), ylabel="right, % of the images")
        axis.grid()
        wide = {"width": 92 / CALIBRATION_BINS, "color": FAINT}
        below.bar((100 * middles).tolist(), counts.tolist(), **wide)
        below.set(xlabel="probability of the predicted class, %", ylabel="images")


def draw_samples(
    images: Images,
    predicted: Tensor,
    confidence: Tensor,
    classes: Sequence[str],
    target: Path,
    image_names: Sequence[str] = (),
) -> None:
    """Draws a PNG of the images that the network gets wrong with the most confidence, at most 32.

    On the CPU are *predicted*, int64 ``(N,)``, and *confidence* (0 to 1), ``(N,)``. Classes are
    named as in ``draw_confusion``. Of *image_names*, which are paths or what images are called
    where they lie, the common folder is written once, below, and of each the end that has room.
    """
    labels = images.labels.cpu()
    wrong = (predicted != labels).nonzero()[:, 0]
    if not len(wrong):
        with picture(target, 8, 2.4) as figure:
            text = f"No mistakes: all {len(labels):,} images are classified correctly."
            figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14)
        return
    order = confidence[wrong].argsort(descending=True, stable=True)
    worst = wrong[order][: MISTAKES_ROWS * MISTAKES_COLUMNS].tolist()
    columns = min(len(worst), MISTAKES_COLUMNS)
    rows = -(-len(worst) // columns)
    title = f"{len(wrong):,} of {len(labels):,} images wrong; the most confident first"
    names = drawable(classes)
    below, place_names = _split_names([image_names[i] for i in worst] if image_names else [])
    written = [*names, below, *place_names]
    with picture(target, max(1.5 * columns, 6), 1.95 * rows + 0.7, title, written) as figure:
        axis = figure.subplots()  # one for all images: to make 32 takes longer than all else
        shown = images[torch.tensor(worst).to(images.device)].pixels.cpu()
        for place, (i, image) in enumerate(zip(worst, shown, strict=True)):
            x, y = place % columns * 1.25, place // columns * 1.65  # in sides of an image
            prediction = shorten(names[int(predicted[i])], 12)
            truth = shorten(names[int(labels[i])], 12)
            _draw_image(axis, x, y, image)
            _write_below(axis, x, y, 4, f"{prediction} · {100 * confidence[i]:.0f} %", "test")
            _write_below(axis, x, y, 16, f"true: {truth}", "train")
            if place_names:
                _write_below(axis, x, y, 28, place_names[place], "", 6)
        axis.set(xlim=(0, columns * 1.25 - 0.25), ylim=(rows * 1.65 - 0.2, 0))
        axis.axis("off")
        _explain_numbers(figure, names, classes, f"in {below}" * bool(below))


def _split_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all *names* begin with, and the end of what is left of each."""
    # Of characters, as what follows the path of a file may be the name of an image in it.
    names = [name.replace("\\", "/") if os.name == "nt" else name for name in names]
    folder = os.path.commonprefix(names).rpartition("/")[0]  # noqa: RUF071
    rests = [escaped(name.removeprefix(folder).lstrip("/")) for name in names]
    return escaped(folder), [f"…{rest[-28:]}" if len(rest) > 30 else rest for rest in rests]


def _write_below(
    axis: Any, x: float, y: float, distance: int, text: str, split: str, size: float = 8.5
) -> None:
    colour = SPLIT_COLOURS.get(split, FAINT)
    style = {"ha": "center", "va": "top", "fontsize": size, "color": colour}
    axis.annotate(text, (x + 0.5, y + 1), (0, -distance), textcoords="offset points", **style)


def _draw_image(axis: Any, x: float, y: float, pixels: Tensor) -> None:
    image = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    interpolation = "nearest" if min(pixels.shape[1:]) < 96 else "antialiased"
    style = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": interpolation}
    axis.imshow(image.numpy(), extent=(x, x + 1, y + 1, y), **style)
