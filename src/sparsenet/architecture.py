"""What a network is made of, before any tensor exists: its configuration, its stages, its costs.

A stage is a :class:`~sparsenet.topology.Topology` plus widths; a layer is a *branch*, a chain of BN-ReLU-Conv
units written as ``(kernel, width)`` pairs. Parameter and multiply-accumulate counts, the drawn graph and the
modules of :mod:`sparsenet.model` are all read off the same :class:`Stage` objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import floor
from typing import Any

from sparsenet.topology import Fetch, Sources, Topology, named_fetch

Branch = tuple[tuple[int, int], ...]  # (kernel, output width) of each BN-ReLU-Conv unit

CIFAR_STAGES = 3
STEMS = {"cifar": 3, "imagenet": 7}  # kernel


@dataclass(frozen=True)
class Stage:
    """One stage: feature 0 has ``in_width`` channels, feature *i* the width of the branch's last unit."""

    topology: Topology
    in_width: int
    branch: Branch
    aggregation: str

    @property
    def growth(self) -> int:
        return self.branch[-1][1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of features ``0 .. depth``."""
        return (self.in_width,) + (self.growth,) * self.topology.depth

    @cached_property
    def read_widths(self) -> tuple[int, ...]:
        """Channels that layers ``1 .. depth`` and the stage output gather."""
        if self.aggregation == "sum":
            return (self.growth,) * (self.topology.depth + 1)
        return tuple(sum(self.widths[j] for j in read) for read in self.topology.sources)

    @property
    def out_width(self) -> int:
        return self.read_widths[-1]

    @cached_property
    def reads(self) -> Sources:
        """What each BN-ReLU unit reads, the stage output's last, with every unit's output numbered as a feature.

        Feature 0 is the stage input and feature ``u + 1`` the output of unit ``u``, so layer *i* of a branch
        of ``n`` units makes feature ``n * i``.
        """
        n = len(self.branch)
        reads: list[tuple[int, ...]] = []
        for i, read in enumerate(self.topology.sources, start=1):
            reads.append(tuple(n * j for j in read))
            if i <= self.topology.depth:
                reads += [(n * (i - 1) + unit,) for unit in range(1, n)]
        return tuple(reads)

    @property
    def unit_widths(self) -> tuple[int, ...]:
        """Channels of the features that :attr:`reads` numbers."""
        return (self.in_width,) + tuple(out for _, out in self.branch) * self.topology.depth

    def units(self, layer: int) -> Iterator[tuple[int, int, int]]:
        """``(in width, kernel, out width)`` of the units of layer ``1 .. depth``."""
        width = self.read_widths[layer - 1]
        for kernel, out in self.branch:
            yield width, kernel, out
            width = out


@dataclass(frozen=True)
class Architecture:
    """The network. ``depth`` counts convolutions and the classifier, as the paper does; ``blocks`` replaces it.

    ``fetch`` may be a name, a function ``i -> sources`` or a table of sources for layers ``1 .. n`` and the
    output; a function is evaluated at once, so that an architecture can always be written to a file.

    Raises ``ValueError`` (expected, found, name of the field) for anything that fits no network.
    """

    fetch: str | Fetch | Sources = field(
        default="sparse",
        metadata={
            "help": "topology: sparse[:BASE], dense, harmonic, windowed[:WIDTH] or FILE.py:FUNCTION"
        },
    )
    aggregation: str = field(
        default="concat",
        metadata={"help": "how fetched features are joined", "choices": ("concat", "sum")},
    )
    depth: int = field(
        default=0,
        metadata={"help": "layers with weights: 4 + 3*n, or 4 + 6*n with --bottleneck; 0: 40"},
    )
    blocks: tuple[int, ...] = field(
        default=(), metadata={"help": "layers of each stage, instead of --depth (as 6,12,24,16)"}
    )
    growth_rate: int | tuple[int, ...] = field(
        default=(12,),
        metadata={"help": "channels a layer adds; one number, or one a stage (16,32,64)"},
    )
    bottleneck: bool = field(
        default=False,
        metadata={"help": "1x1 convolution before the 3x3 one (BC; halves the transitions)"},
    )
    bottleneck_factor: int = field(
        default=4, metadata={"help": "width of a bottleneck's 1x1 convolution, in growth rates"}
    )
    reduction: float = field(
        default=0.0, metadata={"help": "transition width factor; 0: 0.5 with --bottleneck, else 1"}
    )
    stem: str = field(default="cifar", metadata={"help": "first layers", "choices": tuple(STEMS)})
    stem_width: int = field(
        default=0, metadata={"help": "channels of the stem; 0: twice the growth rate"}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "probability of dropping after each convolution"}
    )
    in_chans: int = 3
    num_classes: int = 10

    def __post_init__(self) -> None:
        rates = self.growth_rate
        self._set("growth_rate", (rates,) if isinstance(rates, int) else tuple(rates))
        self._set("blocks", tuple(self.blocks))
        self._check_ranges()
        self._set("depth", self._checked_depth())
        if callable(self.fetch):
            self._set("fetch", Topology.of(self.fetch, max(self.stage_depths)).sources)
        elif not isinstance(self.fetch, str):
            self._set("fetch", tuple(tuple(read) for read in self.fetch))
        _ = self.stages  # a wrong topology or width is found here, not at the first forward pass

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        stages = len(self.blocks) or CIFAR_STAGES
        expectations = [
            ("aggregation", self.aggregation in ("concat", "sum"), "concat or sum"),
            ("stem", self.stem in STEMS, " or ".join(STEMS)),
            ("growth_rate", len(self._rates) in (1, stages), f"1 or {stages} numbers"),
            ("growth_rate", min(self._rates, default=0) >= 1, "positive numbers"),
            ("blocks", min(self.blocks, default=1) >= 1, "at least one layer a stage"),
            ("bottleneck_factor", self.bottleneck_factor >= 1, "at least 1"),
            ("reduction", 0 <= self.reduction <= 1, "a factor from 0 to 1"),
            ("dropout", 0 <= self.dropout < 1, "a probability below 1"),
            ("stem_width", self.stem_width >= 0, "a number of channels"),
            ("in_chans", self.in_chans >= 1, "at least 1 channel"),
            ("num_classes", self.num_classes >= 0, "a number of classes"),
        ]
        for name, holds, expected in expectations:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        if self.aggregation == "sum" and self.stem_width not in (0, self.growth_rates[0]):
            raise ValueError(
                f"stem_width: summed features have one width, expected {self.growth_rates[0]}, found {self.stem_width}"
            )

    def _checked_depth(self) -> int:
        if self.blocks:
            made = self._depth_of(self.blocks)
            if self.depth not in (0, made):
                raise ValueError(
                    f"depth: blocks {list(self.blocks)} make {made}, found {self.depth}"
                )
            return made
        depth, step = self.depth or 40, CIFAR_STAGES * len(self._branch(1))
        if depth < 4 + step or (depth - 4) % step:
            below = 4 + max((depth - 4) // step, 1) * step
            raise ValueError(
                f"depth: expected 4 + {step}*n (such as {below} or {below + step}), found {depth}"
            )
        return depth

    def _depth_of(self, blocks: tuple[int, ...]) -> int:
        return sum(blocks) * len(self._branch(1)) + len(blocks) + 1

    def _branch(self, growth: int) -> Branch:
        factor = self.bottleneck_factor
        if self.aggregation == "sum":
            if self.bottleneck:
                narrow = max(growth // factor, 1)
                return ((1, narrow), (3, narrow), (1, growth))
            return ((3, growth), (3, growth))
        return ((1, factor * growth), (3, growth)) if self.bottleneck else ((3, growth),)

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """Layers of each stage."""
        per_stage = (self.depth - 4) // (CIFAR_STAGES * len(self._branch(1)))
        return self.blocks or (per_stage,) * CIFAR_STAGES

    @property
    def growth_rates(self) -> tuple[int, ...]:
        """Growth rate of each stage."""
        stages = len(self.blocks) or CIFAR_STAGES
        return self._rates * stages if len(self._rates) == 1 else self._rates

    @property
    def _rates(self) -> tuple[int, ...]:
        return (self.growth_rate,) if isinstance(self.growth_rate, int) else self.growth_rate

    def topology(self, depth: int) -> Topology:
        """The topology of a stage of *depth* layers."""
        if isinstance(self.fetch, str):
            return Topology.of(named_fetch(self.fetch), depth)
        assert not callable(self.fetch)  # a function has become a table
        if len(self.fetch) <= depth:
            raise ValueError(
                f"fetch: expected sources for {depth} layers and the output, found {len(self.fetch)}"
            )
        return Topology(self.fetch[: depth + 1])

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, first to last."""
        stages: list[Stage] = []
        factor = self.reduction or (0.5 if self.bottleneck else 1.0)
        for number, (depth, growth) in enumerate(
            zip(self.stage_depths, self.growth_rates, strict=True)
        ):
            summed = self.aggregation == "sum"
            if number == 0:
                width = growth if summed else self.stem_width or 2 * growth
            else:
                width = growth if summed else max(floor(stages[-1].out_width * factor), 1)
            stages.append(
                Stage(self.topology(depth), width, self._branch(growth), self.aggregation)
            )
        return tuple(stages)

    def sizes(self, image_size: int) -> tuple[int, ...]:
        """Height of each stage's features for square images of *image_size* pixels; ``ValueError`` if too small."""
        size = image_size
        if self.stem == "imagenet":
            size = _strided(_strided(size))
        sizes = [size // 2**number for number in range(len(self.stages))]
        if sizes[-1] < 1:
            least = 2 ** (len(sizes) - 1) * (4 if self.stem == "imagenet" else 1)
            raise ValueError(
                f"image_size: expected at least {least} for this network, found {image_size}"
            )
        return tuple(sizes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value from which ``Architecture(**value)`` makes an equal architecture."""
        return dataclasses.asdict(self)


def _strided(size: int) -> int:
    return (size + 1) // 2


@dataclass(frozen=True)
class Node:
    """One drawn and counted piece of a network; ``sources`` are feature numbers within its stage."""

    name: str
    kind: str  # stem, layer, transition or classifier
    stage: int
    index: int  # the feature it makes in its stage (transitions make feature 0 of the next)
    sources: tuple[int, ...]
    shape: tuple[int, ...]  # (C, H, W) or (classes,)
    parameters: int
    macs: int


def graph(architecture: Architecture, image_size: int = 32) -> list[Node]:
    """Every piece of the network with its sources, output shape, parameters and multiply-accumulates an image."""
    stages, sizes = architecture.stages, architecture.sizes(image_size)
    nodes = [_stem(architecture, image_size, sizes[0])]
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        nodes += _layers(stage, number, size)
        read, width, depth = stage.topology.output, stage.out_width, stage.topology.depth
        shape: tuple[int, ...]
        norm = 2 * width  # the stage's output norm is counted with what follows it
        if number + 1 < len(stages):
            out, half = stages[number + 1].in_width, sizes[number + 1]
            name, kind, shape = f"transitions.{number}", "transition", (out, half, half)
            parameters, macs = norm + width * out, width * out * size * size
        else:
            classes = architecture.num_classes
            name, kind, shape = "classifier", "classifier", (classes,)
            parameters, macs = norm + (width + 1) * classes, width * classes
        nodes.append(Node(name, kind, number, depth + 1, read, shape, parameters, macs))
    return nodes


def _stem(architecture: Architecture, image_size: int, size: int) -> Node:
    kernel, width = STEMS[architecture.stem], architecture.stages[0].in_width
    weights = kernel * kernel * architecture.in_chans * width
    strided = architecture.stem == "imagenet"
    pixels = _strided(image_size) ** 2 if strided else image_size**2
    norm = 2 * width if strided else 0
    return Node("stem", "stem", 0, 0, (), (width, size, size), weights + norm, weights * pixels)


def _layers(stage: Stage, number: int, size: int) -> list[Node]:
    nodes = []
    for i in range(1, stage.topology.depth + 1):
        weights = [kernel * kernel * read * out for read, kernel, out in stage.units(i)]
        norms = sum(2 * read for read, _, _ in stage.units(i))
        nodes.append(
            Node(
                name=f"stages.{number}.layers.{i - 1}",
                kind="layer",
                stage=number,
                index=i,
                sources=stage.topology.sources[i - 1],
                shape=(stage.growth, size, size),
                parameters=norms + sum(weights),
                macs=sum(weights) * size * size,
            )
        )
    return nodes


def count(architecture: Architecture, image_size: int = 32) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image (convolutions and classifier)."""
    nodes = graph(architecture, image_size)
    return sum(node.parameters for node in nodes), sum(node.macs for node in nodes)
