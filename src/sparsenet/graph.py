"""The pieces of a network as they are drawn and counted, before any tensor exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsenet.architecture import Architecture, StageLayout


@dataclass(frozen=True)
class Node:
    """One piece of a network; ``sources`` are feature numbers within its stage."""

    name: str
    kind: str  # stem, layer, transition or classifier
    stage: int
    index: int  # the feature it makes in its stage (transitions make feature 0 of the next)
    sources: tuple[int, ...]
    shape: tuple[int, ...]  # (C, H, W) or (classes,)
    parameters: int
    macs: int


def graph(architecture: Architecture, image_size: int = 32) -> list[Node]:
    """Every piece of the network, first to last.

    ``macs`` are the multiply-accumulates of its convolutions, or the classifier, for one image of
    *image_size* pixels a side. Raises ``ValueError`` for images that are too small.
    """
    stages, sizes = architecture.stages, architecture.sizes(image_size)
    nodes = [_stem(architecture, image_size, sizes[0])]
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        nodes += [_layer(stage, number, i, size) for i in range(1, stage.topology.depth + 1)]
        shape: tuple[int, ...]
        if number + 1 < len(stages):
            kind, name = "transition", f"transitions.{number}"
            out, bias, pixels = stages[number + 1].in_width, 0, size**2
            shape = (out, sizes[number + 1], sizes[number + 1])
        else:
            kind = name = "classifier"
            out, bias, pixels = architecture.num_classes, architecture.num_classes, 1
            shape = (out,)
        weights = stage.out_width * out
        parameters = 2 * stage.out_width + weights + bias  # the stage's output norm among them
        index, sources = stage.topology.depth + 1, stage.topology.sources[-1]
        nodes.append(Node(name, kind, number, index, sources, shape, parameters, weights * pixels))
    return nodes


def count(architecture: Architecture, image_size: int = 32) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image (convolutions and classifier)."""
    return totals(graph(architecture, image_size))


def totals(nodes: Sequence[Node]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image, of all *nodes*."""
    return sum(node.parameters for node in nodes), sum(node.macs for node in nodes)


def _stem(architecture: Architecture, image_size: int, size: int) -> Node:
    stem, width = architecture.for_images(image_size).stem_layers, architecture.stages[0].in_width
    weights = stem.kernel**2 * architecture.in_chans * width
    norm = 2 * width if stem.stride > 1 else 0
    side = (image_size + stem.stride - 1) // stem.stride  # before the pooling
    shape = (width, size, size)
    return Node("stem", "stem", 0, 0, (), shape, weights + norm, weights * side**2)


def _layer(stage: StageLayout, number: int, index: int, size: int) -> Node:
    units = list(stage.units(index))
    weights = sum(kernel**2 * width * out for width, kernel, out in units)
    norms = sum(2 * width for width, _, _ in units)
    return Node(
        name=f"stages.{number}.layers.{index - 1}",
        kind="layer",
        stage=number,
        index=index,
        sources=stage.topology.sources[index - 1],
        shape=(stage.growth, size, size),
        parameters=norms + weights,
        macs=weights * size**2,
    )
