"""What an implementation is given: who reads what, with which parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

MOMENTUM = 0.1  # weight of the new batch in the running statistics
EPS = 1e-5  # added to the variance


class Reader(NamedTuple):
    """The parameters that belong to one reader: BN-ReLU, then a convolution unless it is the stage output."""

    scale: Tensor  # (C_read,)
    shift: Tensor  # (C_read,)
    weight: Tensor | None  # (C_out, C_read, kernel, kernel), kernel odd, stride 1, same padding


class Statistics(NamedTuple):
    """Running mean and variance of one feature, updated in place."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)


@dataclass(frozen=True)
class Plan:
    """Features of a stage: 0 is the input, ``r + 1`` what reader ``r`` makes; the last reader is the output.

    With concatenation statistics belong to features, so entry ``j`` of a list of statistics is feature ``j``'s;
    a sum is a tensor of its own, so with summation entry ``r`` belongs to what reader ``r`` reads.
    """

    reads: tuple[tuple[int, ...], ...]
    aggregation: str = "concat"
    dropout: float = 0.0

    @cached_property
    def last_reader(self) -> tuple[int, ...]:
        """For each feature the last reader of it, -1 where nobody reads it."""
        return _readers_of(self.reads)

    @cached_property
    def first_reader(self) -> tuple[int, ...]:
        """For each feature the first reader of it, -1 where nobody reads it."""
        last = len(self.reads) - 1
        mirrored = _readers_of(self.reads[::-1])
        return tuple(last - reader if reader >= 0 else -1 for reader in mirrored)


def _readers_of(reads: Sequence[Sequence[int]]) -> tuple[int, ...]:
    found = [-1] * len(reads)
    for reader, read in enumerate(reads):
        for feature in read:
            found[feature] = reader
    return tuple(found)
