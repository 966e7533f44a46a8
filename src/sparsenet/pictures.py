"""What people look at first: curves, the confusion matrix, the worst mistakes, and the network as a graph."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsenet.architecture import Node
from sparsenet.extras import require
from sparsenet.files import write_atomic
from sparsenet.results import EpochMetrics

INK, FAINT, GRID = "#22272e", "#8a929c", "#e3e6ea"
COLOURS = {
    "train": "#0072b2",
    "val": "#e69f00",
    "test": "#d55e00",
}  # Okabe and Ito's, for any colour vision
LOOK = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(
        ("xtick.major.size", "ytick.major.size", "legend.borderpad", "legend.borderaxespad"), 0
    ),
    **dict.fromkeys(
        ("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon"), False
    ),
    "text.parse_math": False,  # a $ in the name of a class is a $
    "grid.color": GRID,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}
KINDS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, FAINT)
SHEET = (4, 8)  # rows and columns of the sheet of mistakes

Row = EpochMetrics


@contextmanager
def picture(target: Path, width: float, height: float, title: str = "") -> Iterator[Any]:
    """A figure of *width* by *height* inches to draw on, written to *target* at the end: no window opens."""
    figures = require("matplotlib.figure", "train")
    with require("matplotlib", "train").rc_context(LOOK), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing"
        )  # a class name in a script that the font lacks
        figure = figures.Figure((width, height), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        if title:
            figure.suptitle(title, fontsize=13)
        yield figure
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=130)
    write_atomic(target, png.getvalue())


def draw_curves(rows: Sequence[Row], target: Path, title: str = "") -> None:
    """A PNG of loss and error over the epochs of metrics.csv (``None``: not measured), and the learning rate.

    The rate is drawn as a line at each drop, or as a curve where it changes all the time.
    """
    with picture(target, 11, 4.4, title) as figure:
        axes = figure.subplots(1, 2)
        _draw_curves(axes[0], rows, "loss", "nats")
        _draw_curves(axes[1], rows, "error", "%")
        _annotate_last(axes[1], rows)
        rates = _points(rows, "lr")
        drops = [new for old, new in pairwise(rates) if old[1] != new[1]]
        if 3 * len(drops) > len(rates):
            _draw_rates(axes[0].twinx(), rates)
            return
        for axis in axes:
            for epoch, rate in drops:
                axis.axvline(epoch - 0.5, color=FAINT, lw=0.8, ls="--", zorder=0)
                style = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 8, "color": FAINT}
                axis.annotate(
                    f"lr {rate:.3g} ",
                    (epoch - 0.5, 0.98),
                    xycoords=("data", "axes fraction"),
                    **style,
                )


def _points(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    cells = [(row.epoch, getattr(row, column)) for row in rows]
    return [(epoch, value) for epoch, value in cells if epoch is not None and value is not None]


def _draw_curves(axis: Any, rows: Sequence[Row], quantity: str, unit: str) -> None:
    axis.set(xlabel="epoch", title=f"{quantity} ({unit})")
    axis.grid(axis="y")
    axis.xaxis.get_major_locator().set_params(integer=True)
    curves = {
        split: points for split in COLOURS if (points := _points(rows, f"{split}_{quantity}"))
    }
    if not curves:
        axis.set(xticks=[], yticks=[])
        axis.text(
            0.5, 0.5, "no epoch finished yet", transform=axis.transAxes, ha="center", color=FAINT
        )
        return
    for split, points in curves.items():
        style = ".-" if len(points) <= 40 else "-"
        axis.plot(*zip(*points, strict=True), style, color=COLOURS[split], label=split)
    values = sorted(value for points in curves.values() for _, value in points)
    # In a long run the first epochs would leave no room for the rest: they may leave the picture at the top.
    top = values[-1] if len(values) < 100 else values[int(0.98 * len(values))]
    axis.set(
        ylim=(0, 1.08 * top or 1),
        xlim=(0, 1.015 * max(points[-1][0] for points in curves.values()) or 1),
    )
    axis.legend(
        ncols=3, handlelength=1.2, columnspacing=1.4, loc="lower right", bbox_to_anchor=(1, 1.01)
    )


def _draw_rates(axis: Any, rates: Sequence[tuple[float, float]]) -> None:
    axis.plot(*zip(*rates, strict=True), color=FAINT, lw=1, ls=":")
    axis.set_ylim(bottom=0)
    axis.tick_params(labelcolor=FAINT, labelsize=8)
    axis.set_ylabel("learning rate (dotted)", color=FAINT, fontsize=8)


def _annotate_last(axis: Any, rows: Sequence[Row]) -> None:
    split = "test" if _points(rows, "test_error") else "val"
    for epoch, error in _points(rows, f"{split}_error")[-1:]:
        axis.plot(
            epoch, error, "o", color=COLOURS[split], ms=7, mec="white", clip_on=False, zorder=5
        )
        at = (1.015, min(error, axis.get_ylim()[1]))
        style = {
            "xycoords": ("axes fraction", "data"),
            "annotation_clip": False,
            "va": "center",
            "weight": "bold",
        }
        axis.annotate(f"{split}\n{error:.2f} %", at, color=COLOURS[split], **style)


COSTS = {  # their names and units; the first two are always known
    "parameters": ("parameters (thousands)", 1e3),
    "macs": ("multiply-accumulates an image (millions)", 1e6),
    "step_seconds": ("a training step, benchmarked (ms)", 1e-3),
    "depth": ("depth", 1),
}


def draw_comparison(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """A PNG of error against what networks cost, one colour for each kind of network.

    *rows* are those of :func:`sparsenet.records.read_rows`: every seed is a dot, the mean of a network a ring with
    its depth and growth rate; networks of one kind are joined. The costs are parameters and MACs, the seconds of a
    training step where all rows have them, and the depth where it takes three values or more.
    """
    kinds = sorted({row["architecture"] for row in rows})
    title = f"{rows[0]['dataset']}, {rows[0]['recipe']}"
    shown = [cost for cost in COSTS if all(row[cost] for row in rows)]
    if len({row["depth"] for row in rows}) < 3 and "depth" in shown:
        shown.remove("depth")
    with picture(target, 2 + 4.5 * len(shown), 4.6, title) as figure:
        axes = figure.subplots(1, len(shown), sharey=True)
        for axis, cost in zip(axes, shown, strict=True):
            name, unit = COSTS[cost]
            for number, kind in enumerate(kinds):
                own = sorted(
                    (row for row in rows if row["architecture"] == kind), key=lambda row: row[cost]
                )
                _draw_kind(
                    axis, [row[cost] / unit for row in own], own, kind, KINDS[number % len(KINDS)]
                )
            axis.set(xlabel=name, xscale="log")
            axis.margins(y=0.08)
            _plain_ticks(axis, [row[cost] / unit for row in rows])
            axis.grid(axis="y")
        axes[0].set_ylabel("test error (%)")
        legend = axes[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=min(len(kinds), 4))


def _draw_kind(
    axis: Any, xs: Sequence[float], rows: Sequence[Mapping[str, Any]], kind: str, colour: str
) -> None:
    ys = [row["error"] for row in rows]
    axis.plot(xs, ys, "-", color=colour, lw=1.2)
    axis.plot(xs, ys, "o", color=colour, mfc="white", ms=8, mew=1.8, label=kind)
    for x, row in zip(xs, rows, strict=True):
        axis.plot([x] * len(row["errors"]), row["errors"], ".", color=colour, ms=4, zorder=3)
        name = f"{row['depth']}-{row['growth']}"
        axis.annotate(
            name, (x, row["error"]), (7, 5), textcoords="offset points", fontsize=8, color=colour
        )


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis marked more closely than at powers of ten, of which a narrow one has none."""
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 1.5, 2, 3, 5, 7)]
    left, right = 0.8 * min(values), 1.35 * max(values)
    inside = [tick for tick in ticks if left <= tick <= right]
    axis.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axis.set_xticks([], minor=True)
    axis.set_xlim(left, right)


def draw_confusion(counts: Tensor, classes: Sequence[str], target: Path) -> None:
    """A PNG of the confusion matrix *counts* ``(C, C)``: true classes in rows, each row in percent of itself."""
    many, images = len(classes), int(counts.sum())
    error = 100 * (images - int(counts.diagonal().sum())) / max(images, 1)
    shares = (
        100 * counts.double() / counts.sum(1, keepdim=True)
    )  # NaN, drawn blank, for a class without images
    side = min(max(6.0, 1.5 + 0.62 * many), 14.0)
    with picture(
        target, side + 1, side, f"Confusion: {error:.2f} % of {images:,} images wrong"
    ) as figure:
        axis = figure.subplots()
        # Over the square root of the share a confusion of 1 % can be told from none.
        norm = require("matplotlib.colors", "train").PowerNorm(0.5, 0, 100)
        image = axis.imshow(shares.numpy(), cmap="Blues", norm=norm)
        bar = figure.colorbar(
            image, ax=axis, ticks=[0, 1, 5, 10, 25, 50, 100], shrink=0.8, pad=0.02, aspect=36
        )
        bar.set_label("% of the true class")
        bar.outline.set_visible(False)
        _name_classes(axis, classes)
        if many <= 20:
            _write_shares(axis, shares)


def _name_classes(axis: Any, classes: Sequence[str]) -> None:
    many = len(classes)
    step = 1 + (many - 1) // 100
    names, size = [_short(name, 20) for name in classes[::step]], min(10.0, 660 / many * step)
    upright = many <= 20 and max(map(len, names)) <= 2
    turned = {
        "rotation": 45 if many <= 20 else 90,
        "ha": "right",
        "va": "center",
        "rotation_mode": "anchor",
    }
    axis.set_xticks(range(0, many, step), names, fontsize=size, **({} if upright else turned))
    axis.set_yticks(range(0, many, step), names, fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    axis.spines[:].set_visible(False)


def _write_shares(axis: Any, shares: Tensor) -> None:
    for y, row in enumerate(shares.tolist()):
        for x, share in enumerate(row):
            if share > 0:
                text, colour = (
                    f"{share:.{0 if share >= 9.95 else 1}f}",
                    "white" if share > 30 else INK,
                )
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)


def draw_samples(
    pixels: Tensor,
    labels: Tensor,
    predicted: Tensor,
    confidence: Tensor,
    classes: Sequence[str],
    target: Path,
) -> None:
    """A PNG of the images that the network gets wrong with the most confidence, at most 32.

    *pixels* uint8 ``(N, C, H, W)``; *labels*, *predicted* int64 and *confidence* (0 to 1) ``(N,)``; on the CPU.
    """
    wrong = (predicted != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][
        : SHEET[0] * SHEET[1]
    ].tolist()
    if not worst:
        with picture(target, 8, 2.4) as figure:
            text = f"No mistakes: all {len(labels):,} images are classified correctly."
            figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14)
        return
    columns = min(len(worst), SHEET[1])
    rows = -(-len(worst) // columns)
    title = f"{len(wrong):,} of {len(labels):,} images wrong; the most confident first"
    with picture(target, max(1.5 * columns, 6), 1.85 * rows + 0.6, title) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, i in zip(axes, worst, strict=False):
            said, truth = (_short(classes[int(label[i])], 15) for label in (predicted, labels))
            _draw_sample(axis, pixels[i], f"{said} · {100 * confidence[i]:.0f} %", f"true: {truth}")


def _draw_sample(axis: Any, pixels: Tensor, said: str, truth: str) -> None:
    image = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    enlarged = "nearest" if min(pixels.shape[1:]) < 96 else "antialiased"
    axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255, interpolation=enlarged)
    style = {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 8.5}
    axis.text(0.5, -0.04, said, color=COLOURS["test"], **style)
    axis.text(0.5, -0.19, truth, color=COLOURS["train"], **style)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


MARGIN, BOX, WIDTH = (
    24,
    104,
    1100,
)  # of the drawn network, in SVG units; a box is BOX wide and 36 high
STAGE_COLOURS = (
    "#0072b2",
    "#009e73",
    "#b8548c",
    "#d55e00",
)  # four of Okabe and Ito's, one darkened for white
MOST_LINKS = 6000
STYLE = (
    ".sparsenet{font-family:system-ui,sans-serif;font-size:12px;text-anchor:middle}.sparsenet path{fill:none}"
    ".sparsenet g:hover>path{stroke:#000;stroke-opacity:1}.sparsenet g:hover>circle{fill:#000}"
)


def draw_graph(nodes: Sequence[Node], target: Path, title: str = "") -> None:
    """An SVG of the network: a row for each stage, its features in order, what they read as arcs above them.

    Pointing at a feature shows its name, sources, shape and cost. A network with more than 6,000 links gets
    those of every n-th layer only, and says so.
    """
    stages = [list(stage) for _, stage in groupby(nodes[1:], lambda node: node.stage)]
    pitch = max(7.0, min(56.0, (WIDTH - 2 * MARGIN - 2 * BOX) / max(map(len, stages))))
    stride = -(-sum(len(node.sources) for node in nodes) // MOST_LINKS)
    y, before = 48.0, nodes[0]
    parts: list[str] = []
    for stage in stages:
        y += 30 + max(_height(node.index - min(node.sources), pitch) for node in stage)
        parts += _row(stage, before, y, pitch, stride)
        before = stage[-1]
        y += 56
    width = max(2 * MARGIN + 2 * BOX + pitch * max(map(len, stages)), 640.0)
    counts = f"{sum(n.parameters for n in nodes):,} parameters · {_millions(sum(n.macs for n in nodes))} an image"
    sampled = f" · links of one layer in {stride} drawn" if stride > 1 else ""
    title = title or "The network"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sparsenet" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width:.0f} {y + 30:.0f}" width="{width:.0f}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="#fff"/>'
    )
    heading = _text(MARGIN, 34, title, "font-size:17px;font-weight:600;text-anchor:start")
    caption = _text(MARGIN, y + 10, counts + sampled, "text-anchor:start")
    write_atomic(target, "".join([head, heading, *parts, caption, "</svg>\n"]))


def _height(distance: int, pitch: float) -> float:
    return (7 + 0.15 * pitch) * float(distance**0.65)


def _row(stage: Sequence[Node], before: Node, y: float, pitch: float, stride: int) -> Iterator[str]:
    """Feature 0 as a box on the left, layers as dots, the transition or classifier as a box on the right."""
    end, colour = stage[-1], STAGE_COLOURS[stage[0].stage % len(STAGE_COLOURS)]
    xs = [MARGIN + BOX + pitch * index for index in range(end.index + 1)]
    yield from (_layer(node, xs, y, pitch, colour, node.index % stride == 0) for node in stage)
    yield _box(
        before, MARGIN, y, "stem" if before.kind == "stem" else f"transition {before.stage + 1}"
    )
    yield _box(
        end, xs[-1], y, end.kind if end.kind == "classifier" else f"transition {end.stage + 1}"
    )
    made, size = stage[0].shape[0], "×".join(map(str, stage[0].shape[1:]))
    note = f"stage {end.stage + 1}: {len(stage) - 1} layers of {made} channels at {size}"
    yield _text(MARGIN + BOX, y + 36, note, f"text-anchor:start;fill:{colour};font-weight:600")


def _layer(
    node: Node, xs: Sequence[float], y: float, pitch: float, colour: str, linked: bool
) -> str:
    arcs, x = [], xs[node.index]
    for source in node.sources if linked or node.kind != "layer" else ():
        distance, half = node.index - source, (x - xs[source]) / 2
        arcs.append(
            f'<path d="M{xs[source]:.1f} {y:.0f}a{half:.1f} {_height(distance, pitch):.1f} 0 0 1 {2 * half:.1f} 0" '
            f'stroke="{colour}" stroke-opacity="{0.9 * distance**-0.35:.2f}"/>'
        )
    dot = ""
    if node.kind == "layer":
        dot = f'<circle cx="{x:.1f}" cy="{y:.0f}" r="{min(5, 0.3 * pitch):.1f}" fill="{colour}"/>'
        if pitch >= 18:
            dot += _text(x, y + 18, str(node.index), f"font-size:9px;fill:{FAINT}")
    return f"<g><title>{escape(_describe(node))}</title>{''.join(arcs)}{dot}</g>"


def _box(node: Node, x: float, y: float, name: str) -> str:
    shape = "×".join(map(str, node.shape)) + (" classes" if node.kind == "classifier" else "")
    return (
        f'<g><title>{escape(_describe(node))}</title><rect x="{x:.1f}" y="{y - 18:.0f}" width="{BOX}" height="36" '
        f'rx="6" fill="#f4f6f8" stroke="{FAINT}"/>{_text(x + BOX / 2, y - 3, name, "font-weight:600")}'
        f"{_text(x + BOX / 2, y + 12, shape, 'font-size:11px')}</g>"
    )


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.0f}" fill="{INK}" style="{style}">{escape(text)}</text>'


def _describe(node: Node) -> str:
    many = len(node.sources)
    read = (
        f" reads {', '.join(map(str, node.sources)) if many <= 40 else f'{many} features'}"
        if many
        else ""
    )
    shape = "×".join(map(str, node.shape))
    return (
        f"{node.name}{read}, makes {shape}: {node.parameters:,} parameters, {_millions(node.macs)}"
    )


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.1f} million multiply-accumulates"
