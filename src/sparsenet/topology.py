"""Topologies: which earlier features a layer reads.

Inside a stage, feature 0 is the stage input and feature *i* the output of layer *i*. A *fetch* maps
the number ``i >= 1`` of a layer to the features it reads, in the order in which they are gathered.
The stage output is the same fetch at ``depth + 1``. All else about the structure of a stage follows
from that one function.

To add a topology, write the function that makes its fetch and enter it in ``FETCHES``.

Sources: sparse -- Zhu et al., "Sparsely Aggregated Convolutional Networks" (arXiv:1801.05895);
dense -- Huang et al. (arXiv:1608.06993); harmonic -- Chao et al., "HarDNet" (arXiv:1909.00948).
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from sparsenet.texts import nearest, shown
from sparsenet.validation import plain

Fetch = Callable[[int], Sequence[int]]
Sources = tuple[tuple[int, ...], ...]

MAX_READS = 2_000_000  # of a network: each is a number in memory and in graph.json


def sparse(base: int = 2) -> Fetch:
    """Features ``i - base**k``, newest first: at most ``1 + log_base(i)`` of them."""
    if base < 2:
        raise ValueError(f"fetch 'sparse': expected a base of at least 2, found {base}")

    def sources(i: int) -> list[int]:
        steps = [1]
        while steps[-1] * base <= i:
            steps.append(steps[-1] * base)
        return [i - step for step in steps]

    return sources


def dense() -> Fetch:
    """Every earlier feature, oldest first (DenseNet)."""
    return lambda i: range(i)


def harmonic() -> Fetch:
    """Features ``i - 2**n`` for every ``2**n`` that divides *i*, newest first (HarDNet)."""
    return lambda i: [i - 2**n for n in range(i.bit_length()) if i % 2**n == 0]


def windowed(width: int = 4) -> Fetch:
    """The *width* newest features, newest first; ``windowed(1)`` is a plain chain."""
    if width < 1:
        raise ValueError(f"fetch 'windowed': expected a width of at least 1, found {width}")
    return lambda i: range(i - 1, max(i - width, 0) - 1, -1)


@dataclass(frozen=True)
class NamedFetch:
    """One entry of ``FETCHES``."""

    make: Callable[..., Fetch]
    argument: str = ""  # what the whole number after a colon is; "": the name takes none
    family: str = ""  # the networks' name in tables; "": SparseNet, with the fetch in parentheses


FETCHES = {
    "sparse": NamedFetch(sparse, argument="BASE", family="SparseNet"),
    "dense": NamedFetch(dense, family="DenseNet"),
    "harmonic": NamedFetch(harmonic, family="HarDNet"),
    "windowed": NamedFetch(windowed, argument="WIDTH"),
}


_names = [f"{name}[:{e.argument}]" if e.argument else name for name, e in FETCHES.items()]
FETCH_SYNTAX = ", ".join(_names) + " or FILE.py:FUNCTION"  # as help and errors tell it


def named_fetch(name: str) -> Fetch:
    """The fetch of a name: ``"sparse"``, ``"sparse:3"`` (base 3), ``"dense"`` and so on.

    Raises ``ValueError`` for a name that is not in ``FETCHES``, or takes no such argument.
    """
    kind, _, argument = name.partition(":")
    entry = FETCHES.get(kind)
    fits = not argument or (argument.isdecimal() and len(argument) < 10)
    if entry is None or not fits or (argument and not entry.argument):
        hint = "" if entry else nearest(kind, FETCHES)
        raise ValueError(f"fetch: expected {FETCH_SYNTAX}, found {shown(name)}{hint}")
    return entry.make(int(argument)) if argument else entry.make()


def fetch_from_file(name: str) -> Fetch:
    """The function that ``FILE.py:FUNCTION`` names; runs the file.

    Raises ``ValueError`` for whatever goes wrong in the file or, later, in the function.
    """
    path, _, function_name = name.rpartition(":")
    if Path(path).exists() and not Path(path).is_file():  # a pipe may never end
        raise ValueError(f"fetch: expected a Python file, found {path}, which is no file")
    try:
        function = runpy.run_path(path).get(function_name)
    except Exception as error:  # noqa: BLE001  somebody else's code can raise anything
        raise ValueError(
            f"fetch: expected a Python file that runs, found {path}: {error!r}"
        ) from None
    if not callable(function):
        raise ValueError(f"fetch: expected a function {function_name!r} in {path}, found none")

    def sources(i: int) -> Sequence[int]:
        try:
            return tuple(function(i))
        except Exception as error:  # noqa: BLE001
            raise ValueError(
                f"fetch: expected {name} to give the sources of layer {i}, found {error!r}"
            ) from None

    return sources


def check_reads(reads: int) -> None:
    """Raises ``ValueError`` for more links between layers than a network may have."""
    if reads > MAX_READS:
        raise ValueError(
            f"topology: expected layers that read at most {MAX_READS:,} features in all, found more"
        )


def _sources(fetch: Fetch, i: int) -> tuple[int, ...]:
    read = plain(fetch(i))
    try:
        return tuple(islice(read, i + 1))  # one more is one twice, which is refused
    except TypeError:
        expected = f"a sequence of the features that layer {i} reads"
        raise ValueError(f"topology: expected {expected}, found {read!r}") from None


def family_name(fetch: object) -> str:
    """What tables call networks with this ``fetch``: ``DenseNet``, ``SparseNet (sparse:3)``."""
    if not isinstance(fetch, str):
        return "SparseNet (own topology)"
    family = FETCHES[fetch].family if fetch in FETCHES else ""
    return family or f"SparseNet ({fetch})"


@dataclass(frozen=True)
class Topology:
    """The sources of layers ``1 .. depth`` and, last, of the stage output.

    Raises ``ValueError`` naming the layer that reads nothing, a feature twice, or a later one.
    """

    sources: Sources

    def __post_init__(self) -> None:
        for i, read in enumerate(self.sources, start=1):
            reader = f"layer {i}" if i <= self.depth else "the stage output"
            if not read:
                raise ValueError(
                    f"topology: {reader} reads nothing; expected at least one earlier feature"
                )
            for feature in read:
                if type(feature) is not int or not 0 <= feature < i:
                    expected = f"one of 0 to {i - 1}"
                    raise ValueError(
                        f"topology: {reader} reads feature {feature!r}; expected {expected}"
                    )
            if len(set(read)) < len(read):
                raise ValueError(f"topology: {reader} reads a feature twice: {shown(list(read))}")

    @classmethod
    def of(cls, fetch: Fetch, depth: int) -> Topology:
        """The topology of a stage of *depth* layers under *fetch*."""
        rows: list[tuple[int, ...]] = []
        reads = 0
        for i in range(1, depth + 2):
            rows.append(_sources(fetch, i))
            reads += len(rows[-1])
            check_reads(reads)
        return cls(tuple(rows))

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.sources) - 1

    @property
    def edges(self) -> int:
        """Number of links, the stage output's included."""
        return sum(map(len, self.sources))

    @property
    def is_dense(self) -> bool:
        """Whether every layer reads every earlier feature, oldest first, as in DenseNet."""
        return all(read == tuple(range(i)) for i, read in enumerate(self.sources, start=1))

    @cached_property
    def first_reader(self) -> tuple[int, ...]:
        """For each feature, the first layer that reads it (``depth + 1``: the output; 0: none)."""
        return self._last_among(range(self.depth + 1, 0, -1))

    @cached_property
    def last_reader(self) -> tuple[int, ...]:
        """For each feature, the last layer that reads it (``depth + 1``: the output; 0: none)."""
        return self._last_among(range(1, self.depth + 2))

    @cached_property
    def used(self) -> frozenset[int]:
        """The features that the stage output depends on."""
        found = set(self.sources[-1])
        for layer in range(self.depth, 0, -1):
            if layer in found:
                found.update(self.sources[layer - 1])
        return frozenset(found)

    def _last_among(self, layers: range) -> tuple[int, ...]:
        readers = {feature: i for i in layers for feature in self.sources[i - 1]}
        return tuple(readers.get(feature, 0) for feature in range(self.depth + 1))
