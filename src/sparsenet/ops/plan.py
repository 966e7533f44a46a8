"""What an implementation is given: who reads what, with which parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from sparsenet.topology import Topology

MOMENTUM = 0.1  # weight of the new batch in the running statistics
EPS = 1e-5  # added to the variance


def stands_for_another(tensor: Tensor) -> bool:
    """Whether it has no data of its own to compute with, as fake tensors and other wrappers."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


class Reader(NamedTuple):
    """The parameters that belong to one reader: BN-ReLU, then a convolution unless it is the stage output."""

    scale: Tensor  # (C_read,)
    shift: Tensor  # (C_read,)
    weight: Tensor | None  # (C_out, C_read, kernel, kernel), kernel odd, stride 1, same padding


class Statistics(NamedTuple):
    """Running mean and variance of one feature, updated in place."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)


class Columns(NamedTuple):
    """Where the features of a stage lie in a block: feature *j* fills *width* columns from ``first[j]``."""

    first: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class Plan:
    """Features of a stage: 0 is the input, ``r + 1`` what reader ``r`` makes; the last reader is the output.

    With concatenation statistics belong to features, so entry ``j`` of a list of statistics is feature ``j``'s;
    a sum is a tensor of its own, so with summation entry ``r`` belongs to what reader ``r`` reads.
    """

    reads: tuple[tuple[int, ...], ...]
    aggregation: str = "concat"
    dropout: float = 0.0
    memory: str = "normal"  # what is kept: "normal" all features, "lean" not the recomputed, "live" none that is read
    reuse: bool = True  # whether an engine may keep memory for the next pass
    terms: tuple[
        tuple[int, ...], ...
    ] = ()  # where features are sums: of which things made before (see ``stored``)

    @cached_property
    def topology(self) -> Topology:
        """The same with readers numbered from 1, as layers are."""
        return Topology(self.reads)

    @cached_property
    def stored(self) -> Plan:
        """The same as an engine sees it, whose features are what readers gather.

        With summation these are the sums: reader *r* gathers feature *r* alone, which is the sum of ``terms[r]``: the
        stage input, 0, and what readers make, ``r + 1``.
        """
        if self.aggregation == "concat":
            return self
        return replace(
            self,
            reads=tuple((r,) for r in range(len(self.reads))),
            aggregation="concat",
            terms=self.reads,
        )

    @cached_property
    def additions(self) -> tuple[tuple[bool, tuple[int, ...]], ...]:
        """For each sum: whether it goes on from the last one of several terms, and the terms to add then."""
        found, last = list[tuple[bool, tuple[int, ...]]](), tuple[int, ...]()
        for terms in self.terms:
            goes_on = bool(last) and terms[: len(last)] == last
            found.append((goes_on, terms[len(last) :] if goes_on else terms))
            last = terms if len(terms) > 1 else last
        return tuple(found)

    @cached_property
    def last_added(self) -> dict[int, int]:
        """For each term, the last sum to which it is added."""
        return {k: j for j, (_, terms) in enumerate(self.additions) for k in terms}

    @cached_property
    def sent_first(self) -> tuple[int | None, ...]:
        """For each feature, the reader whose gradient backward meets first; ``None``: none depends on it."""
        found: list[int | None] = [None] * len(self.reads)
        for r in reversed(range(len(self.reads))):
            if r + 1 == len(self.reads) or found[r + 1] is not None:
                for j in self.reads[r]:
                    found[j] = r if found[j] is None else found[j]
        return tuple(found)

    @cached_property
    def recomputed(self) -> frozenset[int]:
        """With lean memory: features that only the next reader reads, made from kept ones; bottlenecks, that is."""
        found: set[int] = set()
        for j in range(1, len(self.reads) - 1):
            alone = self.topology.first_reader[j] == self.topology.last_reader[j] == j + 1
            alone = alone and (not self.terms or self.terms[j] == (j,))
            if self.memory == "lean" and alone and not found.intersection(self.reads[j - 1]):
                found.add(j)
        return frozenset(found)

    def columns(self, widths: Sequence[int]) -> Columns:
        """Where features of these widths lie; one that is no longer needed makes room for one as wide."""
        if tuple(widths) not in self._columns:
            self._columns[tuple(widths)] = self._lay_out(widths)
        return self._columns[tuple(widths)]

    @cached_property
    def _columns(self) -> dict[tuple[int, ...], Columns]:
        return {}

    @cached_property
    def without_gradient(self) -> Plan:
        """The same for a pass that no backward follows."""
        return replace(self, memory="live", reuse=self.memory != "lean")

    def _lay_out(self, widths: Sequence[int]) -> Columns:
        freed: dict[
            int, list[int]
        ] = {}  # reader, counted from 1, to the features that it reads last
        for i in range(len(widths)):
            if self.memory == "live" or i in self.recomputed:
                freed.setdefault(max(self.topology.last_reader[i], i), []).append(i)
        first: list[int] = []
        total = 0
        free: dict[int, list[int]] = {}
        for j, width in enumerate(widths):
            if free.get(width):
                first.append(free[width].pop())
            else:
                first.append(total)
                total += width
            for i in freed.get(j, ()):  # reader j has made feature j
                free.setdefault(widths[i], []).append(first[i])
        return Columns(tuple(first), total)
