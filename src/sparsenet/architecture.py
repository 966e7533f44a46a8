"""What a network is made of, before any tensor exists: its settings and the stages they make.

A stage is a ``sparsenet.topology.Topology`` plus widths. A layer is a *branch*, a chain of
BN-ReLU-Conv units. The graph and counts of ``sparsenet.graph`` and the modules of
``sparsenet.model`` are all read off the same ``StageLayout`` objects.
"""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import floor
from numbers import Real
from typing import Any

from sparsenet.topology import FETCH_SYNTAX, Fetch, Sources, Topology, check_reads, named_fetch
from sparsenet.validation import check_settings, check_type, expect, plain, setting

Branch = tuple[tuple[int, int], ...]  # (kernel, output width) of each BN-ReLU-Conv unit

CIFAR_STAGES = 3  # where the depth is given and not the blocks


@dataclass(frozen=True)
class StemLayers:
    """A convolution; if strided, BN-ReLU and max pooling of the same stride follow it."""

    kernel: int
    stride: int


MAX_LAYERS = 10_000  # of a network, which has one module for each
MAX_STAGES = 16  # each halves the images
MAX_WIDTH = 2**24  # channels

STEMS = {"cifar": StemLayers(kernel=3, stride=1), "imagenet": StemLayers(kernel=7, stride=2)}
LARGE_IMAGES = 96  # pixels a side from which ``auto`` is the strided stem (docs/results.md)


@dataclass(frozen=True)
class StageLayout:
    """One stage: ``topology.depth`` layers, each of them a ``branch``."""

    topology: Topology
    in_width: int
    branch: Branch
    aggregation: str  # concat or sum

    @property
    def growth(self) -> int:
        """Channels of the output of a layer."""
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
        widths = self.widths
        return tuple(sum(widths[j] for j in read) for read in self.topology.sources)

    @property
    def out_width(self) -> int:
        """Channels of the stage output."""
        return self.read_widths[-1]

    @cached_property
    def reads(self) -> Sources:
        """What each unit and, last, the stage output reads, where every unit makes a feature.

        Feature 0 is the stage input and feature ``u + 1`` the output of unit ``u``, so layer *i* of
        branches of ``n`` units makes feature ``n * i``.
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
        """Channels of the features that ``reads`` numbers."""
        return (self.in_width,) + tuple(out for _, out in self.branch) * self.topology.depth

    def units(self, layer: int) -> Iterator[tuple[int, int, int]]:
        """``(in width, kernel, out width)`` of the units of layer ``1 .. depth``."""
        width = self.read_widths[layer - 1]
        for kernel, out in self.branch:
            yield width, kernel, out
            width = out


def _whole_number(value: Any) -> int | None:
    """*value* where it is a whole number, of Python or of NumPy; else ``None``."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    is_many = isinstance(value, Iterable) and not isinstance(value, str)
    numbers = [_whole_number(each) for each in (value if is_many else [value])]
    expect(None not in numbers, name, "a whole number, or one for each stage", value)
    return tuple(numbers)  # type: ignore[arg-type]


def _table(fetch: Any) -> Sources:
    try:
        return tuple(tuple(read) for read in plain(fetch))
    except TypeError:
        expected = "a name, a function or a list of sources for each layer and the output"
        raise ValueError(f"fetch: expected {expected}, found {fetch!r}") from None


@dataclass(frozen=True)
class Architecture:
    """The network. ``depth`` counts convolutions and the classifier; ``blocks`` replaces it.

    ``fetch`` may be a name, a function ``i -> sources`` or a table of sources for layers ``1 .. n``
    and the output. A function becomes a table at once, so that an architecture can always be
    written to a file.

    Raises ``ValueError`` (name of the field, expected, found) for anything that fits no network.
    """

    fetch: str | Fetch | Sources = setting("sparse", f"topology: {FETCH_SYNTAX}")
    aggregation: str = setting("concat", "how fetched features are joined", ("concat", "sum"))
    depth: int = setting(0, "layers with weights: 4 + 3*n, or 4 + 6*n with --bottleneck; 0: 40")
    blocks: tuple[int, ...] = setting(
        (), "layers of each stage, instead of --depth (as 6,12,24,16)"
    )
    growth_rate: int | tuple[int, ...] = setting(
        (12,), "channels a layer adds; one number, or one a stage (16,32,64)"
    )
    bottleneck: bool = setting(
        False, "1x1 convolution before the 3x3 one (BC; halves the transitions)"
    )
    bottleneck_factor: int = setting(4, "width of a bottleneck's 1x1 convolution, in growth rates")
    reduction: float = setting(0.0, "transition width factor; 0: 0.5 with --bottleneck, else 1")
    stem: str = setting(
        "cifar",
        f"first layers; auto: imagenet where images have {LARGE_IMAGES} pixels a side or more, "
        "else cifar",
        ("auto", *STEMS),
    )
    stem_width: int = setting(0, "channels of the stem; 0: twice the growth rate")
    dropout: float = setting(0.0, "probability of dropping after each convolution")
    in_chans: int = 3
    num_classes: int = 10

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_ranges()
        self._set("depth", self._checked_depth())
        layers = sum(self.stage_depths)
        expect(layers <= MAX_LAYERS, "depth", f"at most {MAX_LAYERS:,} layers in all", layers)
        if callable(self.fetch):
            self._set("fetch", Topology.of(self.fetch, max(self.stage_depths)).sources)
        elif not isinstance(self.fetch, str):
            self._set("fetch", _table(self.fetch))
        _ = self.stages  # a wrong topology or width is refused here, not at the first forward pass

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_kinds(self) -> None:
        """Refuses values of other types; whole numbers such as NumPy's become Python's."""
        for name in ("growth_rate", "blocks"):
            self._set(name, _whole_numbers(name, getattr(self, name)))
        for name in ("depth", "bottleneck_factor", "stem_width", "in_chans", "num_classes"):
            found = getattr(self, name)
            number = _whole_number(found)
            expect(number is not None, name, "a whole number", found)
            self._set(name, number)
        for name in ("reduction", "dropout"):
            expect(isinstance(getattr(self, name), Real), name, "a number", getattr(self, name))
        expect(self.bottleneck in (True, False), "bottleneck", "True or False", self.bottleneck)

    def _check_ranges(self) -> None:
        rates, stages = self._rates, len(self.blocks) or CIFAR_STAGES
        rules = (
            ("growth_rate", len(rates) in (1, stages), f"1 or {stages} numbers, one a stage"),
            ("growth_rate", min(rates, default=0) >= 1, "positive numbers"),
            ("growth_rate", max(rates, default=1) <= MAX_WIDTH, f"at most {MAX_WIDTH:,}"),
            ("blocks", min(self.blocks, default=1) >= 1, "at least one layer a stage"),
            ("blocks", stages <= MAX_STAGES, f"at most {MAX_STAGES} stages"),
            ("bottleneck_factor", 1 <= self.bottleneck_factor <= 1024, "from 1 to 1,024"),
            ("reduction", 0 <= self.reduction <= 1, "a factor from 0 to 1"),
            ("dropout", 0 <= self.dropout < 1, "a probability below 1"),
            ("stem_width", 0 <= self.stem_width <= MAX_WIDTH, f"0 to {MAX_WIDTH:,} channels"),
            ("in_chans", 1 <= self.in_chans <= MAX_WIDTH, f"1 to {MAX_WIDTH:,} channels"),
            ("num_classes", 0 <= self.num_classes <= MAX_WIDTH, f"0 to {MAX_WIDTH:,} classes"),
        )
        check_settings(self, *rules)
        if self.aggregation == "sum" and self.stem_width not in (0, rates[0]):
            raise ValueError(
                "stem_width: summed features have one width, "
                f"expected {rates[0]}, found {self.stem_width}"
            )

    def _checked_depth(self) -> int:
        units = self._units_per_layer
        if self.blocks:
            depth = sum(self.blocks) * units + len(self.blocks) + 1
            if self.depth not in (0, depth):
                raise ValueError(
                    f"depth: blocks {list(self.blocks)} make {depth}, found {self.depth}"
                )
            return depth
        depth, step = self.depth or 40, CIFAR_STAGES * units
        below = 4 + max((depth - 4) // step, 1) * step
        fits = depth >= 4 + step and (depth - 4) % step == 0
        expect(fits, "depth", f"4 + {step}*n (such as {below} or {below + step})", depth)
        return depth

    @property
    def _rates(self) -> tuple[int, ...]:
        assert not isinstance(self.growth_rate, int)  # a number has become a tuple
        return self.growth_rate

    @property
    def _units_per_layer(self) -> int:
        return len(self._branch(1))

    def _branch(self, growth: int) -> Branch:
        if self.aggregation == "sum":
            if not self.bottleneck:
                return ((3, growth), (3, growth))
            narrow = max(growth // self.bottleneck_factor, 1)
            return ((1, narrow), (3, narrow), (1, growth))
        if not self.bottleneck:
            return ((3, growth),)
        return ((1, self.bottleneck_factor * growth), (3, growth))

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """Layers of each stage."""
        depth = (self.depth - 4) // (CIFAR_STAGES * self._units_per_layer)
        return self.blocks or (depth,) * CIFAR_STAGES

    @property
    def growth_rates(self) -> tuple[int, ...]:
        """Growth rate of each stage."""
        stages = len(self.stage_depths)
        return self._rates * stages if len(self._rates) == 1 else self._rates

    @property
    def stem_layers(self) -> StemLayers:
        """What the stem is made of; ``ValueError`` where the size of the images is to say so."""
        expected = f"{' or '.join(STEMS)} (Architecture.for_images says which)"
        expect(self.stem in STEMS, "stem", expected, self.stem)
        return STEMS[self.stem]

    def for_images(self, side: int) -> Architecture:
        """The architecture with a stem for images of *side* pixels where it is ``auto``."""
        if self.stem != "auto":
            return self
        return dataclasses.replace(self, stem="imagenet" if side >= LARGE_IMAGES else "cifar")

    def topology(self, depth: int) -> Topology:
        """The topology of a stage of *depth* layers."""
        if isinstance(self.fetch, str):
            return Topology.of(named_fetch(self.fetch), depth)
        assert not callable(self.fetch)  # a function has become a table
        rows = len(self.fetch)
        expect(rows > depth, "fetch", f"sources for {depth} layers and the output", rows)
        return Topology(self.fetch[: depth + 1])

    @cached_property
    def stages(self) -> tuple[StageLayout, ...]:
        """The stages, first to last."""
        reduction = self.reduction or (0.5 if self.bottleneck else 1.0)
        stages: list[StageLayout] = []
        for depth, growth in zip(self.stage_depths, self.growth_rates, strict=True):
            if self.aggregation == "sum":
                in_width = growth
            elif not stages:
                in_width = self.stem_width or 2 * growth
            else:
                in_width = max(floor(stages[-1].out_width * reduction), 1)
            branch = self._branch(growth)
            stages.append(StageLayout(self.topology(depth), in_width, branch, self.aggregation))
            check_reads(sum(stage.topology.edges for stage in stages))
        return tuple(stages)

    def sizes(self, image_size: int) -> tuple[int, ...]:
        """Height of each stage's features for square images of *image_size* pixels.

        Raises ``ValueError`` for images that are too small.
        """
        stem = self.for_images(image_size).stem_layers
        stride = stem.stride**2  # of the convolution and the pooling
        size = (image_size + stride - 1) // stride
        halved = len(self.stages) - 1  # times, by the transitions
        least = stride * 2**halved
        expect(size >= 2**halved, "image_size", f"at least {least} for this network", image_size)
        return tuple(size // 2**number for number in range(halved + 1))

    def to_dict(self) -> dict[str, Any]:
        """A JSON value from which ``from_dict`` makes an equal architecture."""
        return dataclasses.asdict(self)


# The types of fields in a file: a function has become a table by the time that it is written.
WRITTEN = {**typing.get_type_hints(Architecture), "fetch": str | Sources}


def from_dict(value: Mapping[str, Any]) -> Architecture:
    """The architecture that ``to_dict`` made *value* of, perhaps read from a file.

    Raises ``ValueError`` naming a field that is unknown, of another type, or fits no network.
    """
    for name, each in value.items():
        if name not in WRITTEN:
            raise ValueError(f"{name}: expected a field that this version knows, found another")
        check_type(name, each, WRITTEN[name])
    return Architecture(**value)
