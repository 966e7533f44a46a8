"""What people look at first: curves, the confusion matrix, the worst mistakes, and the network as a graph."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet.architecture import Node
from sparsenet.extras import require
from sparsenet.run import write_atomic

# Okabe and Ito's palette: distinguishable with any colour vision.
COLOURS = {"train": "#0072b2", "val": "#e69f00", "test": "#d55e00"}
INK, FAINT = "#22272e", "#8a929c"
SHEET = (4, 8)  # rows and columns of the sheet of mistakes

Row = Mapping[str, float | None]


def draw_curves(rows: Sequence[Row], target: Path, title: str = "") -> None:
    """A PNG of loss and error in percent over the epochs of metrics.csv, with the learning rate's drops.

    A schedule that changes at every epoch is drawn as a curve of its own instead. ``None``: not measured.
    """
    figure = _figure(11, 4.4, title)
    axes = figure.subplots(1, 2)
    drops = _drops(rows)
    for axis, quantity, unit in ((axes[0], "loss", "nats"), (axes[1], "error", "%")):
        for split, colour in COLOURS.items():
            points = _points(rows, f"{split}_{quantity}")
            style = ".-" if len(points) <= 40 else "-"
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=split, lw=1.6, ms=6)
        _frame_curves(axis, rows, quantity, f"{quantity} ({unit})")
        for epoch, rate in drops or ():
            axis.axvline(epoch - 0.5, color=FAINT, lw=0.8, ls="--", zorder=0)
            axis.annotate(
                f"lr {rate:.3g} ", (epoch - 0.5, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                ha="right", va="top", fontsize=8, color=FAINT,
            )  # fmt: skip
    if drops is None:
        _draw_rate(axes[0], rows)
    _annotate_last(axes[1], rows)
    _save(figure, target)


def _points(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    cells = [(row.get("epoch"), row.get(column)) for row in rows]
    return [(epoch, value) for epoch, value in cells if epoch is not None and value is not None]


def _drops(rows: Sequence[Row]) -> list[tuple[float, float]] | None:
    """The epochs with a new learning rate, and the rate; ``None`` for a smooth schedule."""
    rates = _points(rows, "lr")
    changes = [new for old, new in pairwise(rates) if old[1] != new[1]]
    return changes if 3 * len(changes) <= len(rates) else None


def _frame_curves(axis: Any, rows: Sequence[Row], quantity: str, label: str) -> None:
    axis.set_xlabel("epoch", color=INK)
    axis.set_title(label, loc="left", fontsize=11, color=INK)
    axis.grid(axis="y", color="#e3e6ea", lw=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=INK, length=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    values = sorted(value for split in COLOURS for _, value in _points(rows, f"{split}_{quantity}"))
    if not values:
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "no epoch finished yet", transform=axis.transAxes, ha="center", color=FAINT)
        return
    # In a long run the first epochs would leave no room for the rest: they may leave the picture at the top.
    shown = values if len(values) < 100 else values[: int(0.98 * len(values))]
    axis.set_ylim(0, 1.08 * shown[-1] or 1)
    axis.set_xlim(0, 1.015 * max(row.get("epoch") or 0 for row in rows) or 1)
    where = {"loc": "lower right", "bbox_to_anchor": (1, 1.01), "borderpad": 0, "borderaxespad": 0}
    axis.legend(frameon=False, labelcolor=INK, ncols=3, handlelength=1.2, columnspacing=1.4, **where)


def _draw_rate(axis: Any, rows: Sequence[Row]) -> None:
    twin = axis.twinx()
    twin.plot(*zip(*_points(rows, "lr"), strict=True), color=FAINT, lw=1, ls=":")
    twin.set_ylim(bottom=0)
    twin.spines[["top", "right", "left", "bottom"]].set_visible(False)
    twin.tick_params(colors=FAINT, length=0, labelsize=8)
    twin.set_ylabel("learning rate (dotted)", color=FAINT, fontsize=8)


def _annotate_last(axis: Any, rows: Sequence[Row]) -> None:
    for split in ("test", "val"):
        if points := _points(rows, f"{split}_error"):
            epoch, error = points[-1]
            at = (1.015, min(error, axis.get_ylim()[1]))
            axis.plot(epoch, error, "o", color=COLOURS[split], ms=7, mec="white", clip_on=False, zorder=5)
            axis.annotate(
                f"{split}\n{error:.2f} %", at, xycoords=("axes fraction", "data"), va="center",
                color=COLOURS[split], weight="bold", fontsize=10, annotation_clip=False,
            )  # fmt: skip
            return


def draw_confusion(counts: Tensor, classes: Sequence[str], target: Path) -> None:
    """A PNG of the confusion matrix *counts* ``(C, C)``, true classes in rows, each row in percent of itself."""
    images, many = counts.sum(1, keepdim=True).double(), len(classes)
    shares = (100 * counts / images).cpu()  # a class without images gives a row of NaN, drawn blank
    wrong = counts.sum() - counts.diagonal().sum()
    error = 100 * wrong.item() / max(counts.sum().item(), 1)
    side = min(max(6.0, 1.5 + 0.62 * many), 14.0)
    figure = _figure(side + 1, side, f"Confusion: {error:.2f} % of {int(counts.sum()):,} images wrong")
    axis = figure.subplots()
    # The square root of the share: a confusion of 1 % can be told from none.
    norm = require("matplotlib.colors", "train").PowerNorm(0.5, 0, 100)
    image = axis.imshow(shares.numpy(), cmap="Blues", norm=norm)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 1, 5, 10, 25, 50, 100], shrink=0.8, pad=0.02, aspect=36)
    bar.set_label("% of the true class", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, length=0)
    step = 1 + (many - 1) // 100
    names, size = [_short(name, 20) for name in classes[::step]], min(10.0, 660 / many * step)
    longest = max(map(len, names), default=0)
    turn = 0 if longest <= 2 and many <= 20 else 90 if many > 20 else 45
    axis.set_xticks(range(0, many, step), names, fontsize=size, rotation=turn, parse_math=False)
    axis.set_yticks(range(0, many, step), names, fontsize=size, parse_math=False)
    for label in axis.get_xticklabels():
        label.set(ha="right" if turn == 45 else "center", rotation_mode="anchor" if turn == 45 else "default")
    axis.set_xlabel("predicted", color=INK)
    axis.set_ylabel("true", color=INK)
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)
    if many <= 20:
        _write_shares(axis, shares)
    _save(figure, target)


def _write_shares(axis: Any, shares: Tensor) -> None:
    for (y, x), share in zip(torch.cartesian_prod(*map(torch.arange, shares.shape)), shares.flatten(), strict=True):
        if share > 0:
            text = f"{share:.0f}" if share >= 9.95 else f"{share:.1f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if share > 30 else INK)


def draw_samples(
    pixels: Tensor,
    labels: Tensor,
    predicted: Tensor,
    confidence: Tensor,
    classes: Sequence[str],
    target: Path,
) -> None:
    """A PNG of the images that the network gets wrong with the most confidence.

    *pixels* uint8 ``(N, C, H, W)``; *labels*, *predicted* int64 and *confidence* (0 to 1) ``(N,)``.
    """
    wrong = (predicted != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][: SHEET[0] * SHEET[1]]
    if not len(worst):
        figure = _figure(8, 2.4)
        text = f"No mistakes: all {len(labels):,} images are classified correctly." if len(labels) else "No images."
        figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14, color=INK)
        _save(figure, target)
        return
    columns = min(len(worst), SHEET[1])
    rows = -(-len(worst) // columns)
    title = f"{len(wrong):,} of {len(labels):,} images wrong; the most confident first"
    figure = _figure(max(1.5 * columns, 6), 1.85 * rows + 0.6, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, worst.tolist(), strict=False):
        _draw_image(axis, pixels[i])
        said, truth = _short(classes[predicted[i]], 16), _short(classes[labels[i]], 15)
        lines = ((f"{said} {100 * confidence[i]:.0f} %", COLOURS["test"]), (f"true: {truth}", COLOURS["train"]))
        for line, (text, colour) in enumerate(lines):
            axis.text(
                0.5, -0.04 - 0.15 * line, text, transform=axis.transAxes, ha="center", va="top", fontsize=8.5,
                color=colour, parse_math=False,
            )  # fmt: skip
    _save(figure, target)


def _draw_image(axis: Any, pixels: Tensor) -> None:
    shown = pixels.cpu().permute(1, 2, 0) if pixels.shape[0] == 3 else pixels[0].cpu()
    smooth = "nearest" if min(pixels.shape[1:]) < 96 else "antialiased"
    axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=255, interpolation=smooth)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _figure(width: float, height: float, title: str = "") -> Any:
    """A figure of its own, *width* by *height* inches: no window, no state shared with the caller's plots."""
    figure = require("matplotlib.figure", "train").Figure((width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    if title:
        figure.suptitle(title, fontsize=13, color=INK, parse_math=False)
    return figure


def _save(figure: Any, target: Path) -> None:
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name in a script that the font lacks
        figure.savefig(png, format="png", dpi=130)
    write_atomic(target, png.getvalue())


MARGIN, BOX, WIDTH = 24, 104, 1100  # of the drawn network, in SVG units; a box is BOX wide and 36 high
STAGE_COLOURS = ("#0072b2", "#009e73", "#b8548c", "#d55e00")  # four of Okabe and Ito's, one darkened for white
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
    write_atomic(target, graph_svg(nodes, title))


def graph_svg(nodes: Sequence[Node], title: str = "") -> str:
    """The drawing of :func:`draw_graph` as text."""
    stages = [list(stage) for _, stage in groupby(nodes[1:], lambda node: node.stage)]
    pitch = max(7.0, min(56.0, (WIDTH - 2 * MARGIN - 2 * BOX) / max(map(len, stages))))
    stride = -(-sum(len(node.sources) for node in nodes) // MOST_LINKS)
    y, parts, before = 48.0, [], nodes[0]
    for stage in stages:
        y += 36 + max(_height(node.index - min(node.sources)) for node in stage)
        parts += _row(stage, before, y, pitch, stride)
        before = stage[-1]
        y += 58
    width = max(2 * MARGIN + 2 * BOX + pitch * max(map(len, stages)), 640.0)
    counts = f"{sum(n.parameters for n in nodes):,} parameters · {_millions(sum(n.macs for n in nodes))} an image"
    sampled = f" · links of every {stride}th layer drawn" if stride > 1 else ""
    name = escape(title or "The network")
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="sparsenet" role="img" aria-label="{name}" '
            f'viewBox="0 0 {width:.0f} {y + 12:.0f}" width="{width:.0f}"><style>{STYLE}</style>',
            '<rect width="100%" height="100%" rx="8" fill="#fff"/>',
            _text(MARGIN, 34, title or "The network", "font-size:17px;font-weight:600;text-anchor:start"),
            *parts,
            _text(MARGIN, y - 8, counts + sampled, "text-anchor:start"),
            "</svg>\n",
        ]
    )


def _height(distance: int) -> float:
    return 11 * distance**0.65


def _row(stage: Sequence[Node], before: Node, y: float, pitch: float, stride: int) -> Iterator[str]:
    """Feature 0 as a box on the left, layers as dots, the transition or classifier as a box on the right."""
    end, colour = stage[-1], STAGE_COLOURS[stage[0].stage % len(STAGE_COLOURS)]
    xs = [MARGIN + BOX + pitch * index for index in range(end.index + 1)]
    if before.kind == "transition":
        x = MARGIN + BOX / 2
        yield f'<path d="M{x:.0f} {y - 38:.0f}v14m-4 -6l4 6l4 -6" stroke="{FAINT}"/>'
    yield from (_layer(node, xs, y, pitch, colour, node.index % stride == 0) for node in stage)
    yield _box(before, MARGIN, y, "stem" if before.kind == "stem" else f"transition {before.stage + 1}")
    yield _box(end, xs[-1], y, end.kind if end.kind == "classifier" else f"transition {end.stage + 1}")
    made, size = stage[0].shape[0], "×".join(map(str, stage[0].shape[1:]))
    note = f"stage {end.stage + 1}: {len(stage) - 1} layers of {made} channels at {size}"
    yield _text(MARGIN + BOX, y + 36, note, f"text-anchor:start;fill:{colour};font-weight:600")


def _layer(node: Node, xs: Sequence[float], y: float, pitch: float, colour: str, linked: bool) -> str:
    arcs, x = [], xs[node.index]
    for source in node.sources if linked or node.kind != "layer" else ():
        distance, half = node.index - source, (x - xs[source]) / 2
        arcs.append(
            f'<path d="M{xs[source]:.1f} {y:.0f}a{half:.1f} {_height(distance):.1f} 0 0 1 {2 * half:.1f} 0" '
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
    reads = f" reads {', '.join(map(str, node.sources))}" if node.sources else ""
    shape = "×".join(map(str, node.shape))
    return f"{node.name}{reads}, makes {shape}: {node.parameters:,} parameters, {_millions(node.macs)}"


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.2f} million multiply-accumulates"
