"""What an implementation is given: who reads what, with which parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from sparsenet.topology import Topology

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
    def topology(self) -> Topology:
        """The same with readers numbered from 1, as layers are."""
        return Topology(self.reads)
