"""Topologies: which earlier features a layer reads.

Inside a stage, feature 0 is the stage input and feature *i* the output of layer *i*. A *fetch* maps a layer's
number ``i >= 1`` to the features it reads, in the order in which they are gathered; the stage output is the
same fetch at ``depth + 1``. Everything else about a stage's structure is derived from that one function.

Sources: sparse -- Zhu et al., "Sparsely Aggregated Convolutional Networks" (arXiv:1801.05895); dense -- Huang
et al. (arXiv:1608.06993); harmonic -- Chao et al., "HarDNet" (arXiv:1909.00948).
"""

from __future__ import annotations

import difflib
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

Fetch = Callable[[int], Sequence[int]]
Sources = tuple[tuple[int, ...], ...]


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


FETCHES: dict[str, Callable[..., Fetch]] = {
    "sparse": sparse,
    "dense": dense,
    "harmonic": harmonic,
    "windowed": windowed,
}


def named_fetch(name: str) -> Fetch:
    """``"sparse"``, ``"sparse:3"`` (base 3), ``"dense"``, ``"harmonic"``, ``"windowed:4"``; else ``ValueError``."""
    kind, _, argument = name.partition(":")
    takes_argument = kind in ("sparse", "windowed")
    if kind not in FETCHES or (argument and not (takes_argument and argument.isdecimal())):
        near = difflib.get_close_matches(kind, FETCHES, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near and kind not in FETCHES else ""
        expected = "sparse[:BASE], dense, harmonic, windowed[:WIDTH] or FILE.py:FUNCTION"
        raise ValueError(f"fetch: expected {expected}, found {name!r}{hint}")
    return FETCHES[kind](int(argument)) if argument else FETCHES[kind]()


def fetch_from_file(name: str) -> Fetch:
    """The function that ``FILE.py:FUNCTION`` names; runs the file. ``ValueError`` for whatever goes wrong in it."""
    path, _, function = name.rpartition(":")
    try:
        found = runpy.run_path(path).get(function)
    except Exception as error:  # noqa: BLE001  somebody else's code can raise anything
        raise ValueError(
            f"fetch: expected a Python file that runs, found {path}: {error!r}"
        ) from None
    if not callable(found):
        raise ValueError(f"fetch: expected a function {function!r} in {path}, found none")

    def sources(i: int) -> Sequence[int]:
        try:
            return tuple(found(i))
        except Exception as error:  # noqa: BLE001
            raise ValueError(
                f"fetch: expected {name} to give the sources of layer {i}, found {error!r}"
            ) from None

    return sources


@dataclass(frozen=True)
class Topology:
    """The sources of layers ``1 .. depth`` and, last, of the stage output.

    Raises ``ValueError`` naming the layer where a source is out of range, not earlier, repeated, or missing.
    """

    sources: Sources

    def __post_init__(self) -> None:
        for i, read in enumerate(self.sources, start=1):
            layer = f"layer {i}" if i <= self.depth else "the stage output"
            if not read:
                raise ValueError(
                    f"topology: {layer} reads nothing; expected at least one earlier feature"
                )
            for j in read:
                if not 0 <= j < i:
                    raise ValueError(
                        f"topology: {layer} reads feature {j}; expected one of 0 to {i - 1}"
                    )
            if len(set(read)) < len(read):
                raise ValueError(f"topology: {layer} reads a feature twice: {list(read)}")

    @classmethod
    def of(cls, fetch: Fetch, depth: int) -> Topology:
        """The topology of a stage of *depth* layers under *fetch*."""
        return cls(tuple(tuple(fetch(i)) for i in range(1, depth + 2)))

    @property
    def depth(self) -> int:
        return len(self.sources) - 1

    @property
    def is_dense(self) -> bool:
        """Whether every layer reads every earlier feature, oldest first, as in DenseNet."""
        return all(read == tuple(range(i)) for i, read in enumerate(self.sources, start=1))

    @property
    def output(self) -> tuple[int, ...]:
        """What the stage output reads."""
        return self.sources[-1]

    @property
    def edges(self) -> int:
        """Number of links, the stage output's included."""
        return sum(map(len, self.sources))

    @cached_property
    def last_reader(self) -> tuple[int, ...]:
        """For each feature, the last layer that reads it (``depth + 1``: the stage output; 0: nobody)."""
        last = [0] * (self.depth + 1)
        for i, read in enumerate(self.sources, start=1):
            for j in read:
                last[j] = i
        return tuple(last)

    @cached_property
    def first_reader(self) -> tuple[int, ...]:
        """For each feature, the first layer that reads it (0: nobody)."""
        first = [0] * (self.depth + 1)
        for i, read in reversed([*enumerate(self.sources, start=1)]):
            for j in read:
                first[j] = i
        return tuple(first)

    @cached_property
    def shortest_path(self) -> int:
        """Fewest links from the stage input to the stage output."""
        return self._path(min)

    @cached_property
    def longest_path(self) -> int:
        """Most links from the stage input to the stage output."""
        return self._path(max)

    def _path(self, pick: Callable[[list[int]], int]) -> int:
        lengths = [0]
        for read in self.sources:
            lengths.append(1 + pick([lengths[j] for j in read]))
        return lengths[-1]
