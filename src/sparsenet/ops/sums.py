"""Features that are sums of what readers made: the sums in the forward pass, shared in backward."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from sparsenet.ops.plan import Plan


class SumAggregation:
    """One pass over the sums of a stage: ``add_term`` from 0 up or ``term_gradient`` back to 0."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.terms: dict[int, Tensor] = {}  # that later sums need
        self.last_sum: Tensor | None = None  # of several terms
        self.term_gradients: dict[int, Tensor] = {}
        self.sum_gradients: dict[int, Tensor] = {}  # from sums that were computed from these

    def add_term(self, j: int, term: Tensor) -> Tensor:
        """Sum *j*, whose last possible term is *j*; *term* itself where that is the only one."""
        addition = self.plan.additions[j]
        self.terms[j] = term
        parts = [self.terms[k] for k in addition.terms]
        if addition.earlier_sum is not None:
            assert self.last_sum is not None
            parts = [self.last_sum, *parts]
        total = reduce(torch.add, parts)
        if len(self.plan.terms[j]) > 1:
            self.last_sum = total
        last_addition = self.plan.last_addition
        self.terms = {k: each for k, each in self.terms.items() if last_addition.get(k, 0) > j}
        return total

    def term_gradient(self, j: int, d_sum: Tensor | None) -> Tensor | None:
        """The gradient of term *j*, complete once all sums from *j* on have given theirs.

        *d_sum* is the gradient of sum *j* from its reader, ``None`` where it has none.
        """
        d_later = self.sum_gradients.pop(j, None)
        if d_later is not None:
            d_sum = d_later if d_sum is None else d_sum + d_later
        if d_sum is not None:
            addition = self.plan.additions[j]
            if addition.earlier_sum is not None:
                self.sum_gradients[addition.earlier_sum] = d_sum
            for k in addition.terms:
                before = self.term_gradients.get(k)
                self.term_gradients[k] = d_sum if before is None else before + d_sum
        return self.term_gradients.pop(j, None)
