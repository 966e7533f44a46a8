"""What an implementation is given: who reads what, with which parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from torch import Tensor

from sparsenet.ops.synchronised import Group
from sparsenet.topology import Topology

MOMENTUM = 0.1  # weight of the new batch in the running statistics
EPS = 1e-5  # added to the variance


class Reader(NamedTuple):
    """The parameters of one reader: BN-ReLU, then a convolution unless it is the stage output."""

    scale: Tensor  # (C_read,)
    shift: Tensor  # (C_read,)
    weight: Tensor | None  # (C_out, C_read, kernel, kernel); kernel odd, stride 1, same padding


class Statistics(NamedTuple):
    """Running mean and variance of one feature, updated in place."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)


class Operands(NamedTuple):
    """What a stage computes with, besides its input."""

    readers: Sequence[Reader]
    statistics: Sequence[Statistics]  # running ones, which move in training
    training: bool  # the batch is normalised by its own statistics
    group: Group | None = None  # processes whose batches have their statistics in common


class Columns(NamedTuple):
    """Where the features of a stage lie in a block of memory: feature *j* from ``first[j]`` on."""

    first: tuple[int, ...]
    total: int


class Addition(NamedTuple):
    """How one sum is computed: from an earlier sum that has its first terms, and further terms."""

    earlier_sum: int | None
    terms: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The structure of a stage.

    Feature 0 is the stage input and feature ``r + 1`` is what reader ``r`` makes; the last reader
    is the stage output, which makes none. With concatenation batch statistics belong to features:
    entry ``j`` of a list of statistics is that of feature ``j``. A sum has statistics of its own:
    with summation entry ``r`` is that of the sum which reader ``r`` reads.
    """

    reads: tuple[tuple[int, ...], ...]
    aggregation: str = "concat"
    dropout: float = 0.0
    memory: str = "normal"  # "lean": the backward pass makes some features again
    gradient: bool = True  # whether a backward pass follows, for which features are kept
    terms: tuple[tuple[int, ...], ...] = ()  # of each feature that is a sum: see for_engine

    @cached_property
    def topology(self) -> Topology:
        """The same structure with readers numbered from 1, as layers are."""
        return Topology(self.reads)

    @cached_property
    def for_engine(self) -> Plan:
        """The same stage as an engine sees it, whose features are what readers gather.

        With summation the sums become the features: reader ``r`` gathers feature ``r`` alone, the
        sum of ``terms[r]``. Term 0 is the stage input, term ``r + 1`` what reader ``r`` makes.
        """
        if self.aggregation == "concat":
            return self
        chain = tuple((r,) for r in range(len(self.reads)))
        return replace(self, reads=chain, aggregation="concat", terms=self.reads)

    @cached_property
    def without_gradient(self) -> Plan:
        """The same stage for a pass that no backward pass follows."""
        return replace(self, gradient=False)

    @cached_property
    def additions(self) -> tuple[Addition, ...]:
        """How each sum is computed, its terms in the order of ``terms``.

        A sum whose first terms are those of the last sum of several terms is computed from it, so
        that dense sums, the stream of a residual network, take one addition each.
        """
        additions: list[Addition] = []
        last_sum: int | None = None
        for j, terms in enumerate(self.terms):
            earlier = self.terms[last_sum] if last_sum is not None else ()
            if earlier and terms[: len(earlier)] == earlier:
                additions.append(Addition(last_sum, terms[len(earlier) :]))
            else:
                additions.append(Addition(None, terms))
            if len(terms) > 1:
                last_sum = j
        return tuple(additions)

    @cached_property
    def last_addition(self) -> dict[int, int]:
        """For each term, the last sum to which it is added."""
        return {k: j for j, addition in enumerate(self.additions) for k in addition.terms}

    @cached_property
    def first_gradient_from(self) -> tuple[int | None, ...]:
        """For each feature, the reader from which backward gets the first part of its gradient.

        This is its last reader on which the stage output depends; ``None`` where there is none.
        """
        used = Topology(self.terms or self.reads).used
        output = len(self.reads) - 1
        first = {
            j: r for r, read in enumerate(self.reads) if r == output or r + 1 in used for j in read
        }
        return tuple(first.get(j) for j in range(len(self.reads)))

    @cached_property
    def recomputed(self) -> frozenset[int]:
        """With lean memory, the features that backward makes again: those of bottlenecks.

        Only the next reader reads them, and they are made from features that are kept.
        """
        recomputed: set[int] = set()
        if self.memory != "lean" or not self.gradient:
            return frozenset()
        first_reader, last_reader = self.topology.first_reader, self.topology.last_reader
        for j in range(1, len(self.reads) - 1):
            read_once = first_reader[j] == last_reader[j] == j + 1
            is_one_term = not self.terms or self.terms[j] == (j,)
            if read_once and is_one_term and recomputed.isdisjoint(self.reads[j - 1]):
                recomputed.add(j)
        return frozenset(recomputed)

    def columns(self, widths: Sequence[int]) -> Columns:
        """Where features of these widths lie; one that nobody needs makes room for one as wide."""
        return _lay_out(self, tuple(widths))


@lru_cache(maxsize=1024)
def _lay_out(plan: Plan, widths: tuple[int, ...]) -> Columns:
    released_by = defaultdict[int, list[int]](list)  # feature made -> features not needed then
    for j in range(len(widths)):
        if not plan.gradient or j in plan.recomputed:
            # Reader j, counted from 1, makes feature j.
            released_by[max(plan.topology.last_reader[j], j)].append(j)
    first: list[int] = []
    total = 0
    free = defaultdict[int, list[int]](list)  # width -> first columns of free places
    for j, width in enumerate(widths):
        if free[width]:
            first.append(free[width].pop())
        else:
            first.append(total)
            total += width
        for i in released_by[j]:
            free[widths[i]].append(first[i])
    return Columns(tuple(first), total)
