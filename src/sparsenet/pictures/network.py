"""The network as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sparsenet.files import write_atomic
from sparsenet.graph import Node, totals
from sparsenet.pictures.figure import FAINT, INK, render

MARGIN, BOX, WIDTH = 24, 104, 1100  # of the drawing, its boxes and the whole, in SVG units
STAGE_COLOURS = ("#0072b2", "#009e73", "#b8548c", "#d55e00")  # readable on white
MOST_LINKS = 6000


@dataclass(frozen=True)
class StageRow:
    """A stage as it is drawn."""

    y: float  # of its features
    colour: str
    before: Node  # whose output is the stage's input
    nodes: Sequence[Node]  # the layers, and last what reads the stage output


def draw_graph(nodes: Sequence[Node], target: Path, title: str = "") -> None:
    """Draws an SVG of the network: a row for each stage, with arcs from what each feature reads.

    Pointing at a feature shows its name, sources, shape and cost. A network with more than 6,000
    links gets those of every n-th layer only, and says so.
    """
    stages = [list(stage) for _, stage in groupby(nodes[1:], lambda node: node.stage)]
    longest = max(map(len, stages))
    pitch = max(7.0, min(56.0, (WIDTH - 2 * MARGIN - 2 * BOX) / longest))

    def arc_height(distance: int) -> float:
        return (7 + 0.15 * pitch) * float(distance**0.65)

    rows: list[StageRow] = []
    y, before = 48.0, nodes[0]
    for number, stage in enumerate(stages):
        y += 30 + max(arc_height(node.index - min(node.sources)) for node in stage)
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        rows.append(StageRow(y, colour, before, stage))
        before = stage[-1]
        y += 56
    stride = -(-sum(len(node.sources) for node in nodes) // MOST_LINKS)
    caption = f"{_format_costs(nodes)} an image"
    if stride > 1:
        caption += f" · links of one layer in {stride} drawn"
    svg = render(
        "network.svg",
        title=title or "The network",
        rows=rows,
        pitch=pitch,
        arc_height=arc_height,
        width=max(2 * MARGIN + 2 * BOX + pitch * longest, 640.0),
        height=y + 30,
        margin=MARGIN,
        box_width=BOX,
        ink=INK,
        faint=FAINT,
        stride=stride,
        caption=caption,
        describe=_describe,
    )
    write_atomic(target, svg + "\n")


def _describe(node: Node) -> str:
    sources = ", ".join(map(str, node.sources))
    if len(node.sources) > 40:
        sources = f"{len(node.sources)} features"
    reads = f" reads {sources}" if sources else ""
    shape = "×".join(map(str, node.shape))
    return f"{node.name}{reads}, makes {shape}: {_format_costs([node], ', ')}"


def _format_costs(nodes: Sequence[Node], separator: str = " · ") -> str:
    parameters, macs = totals(nodes)
    return f"{parameters:,} parameters{separator}{macs / 1e6:,.1f} million multiply-accumulates"
