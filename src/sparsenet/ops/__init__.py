"""One arithmetic, several implementations: the door that picks one by name, never by silent fallback."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sparsenet.ops import reference, shared
from sparsenet.ops.plan import Plan, Reader, Statistics

__all__ = ["IMPLEMENTATIONS", "Plan", "Reader", "Statistics", "aggregate", "choose"]

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.aggregate,
    "shared": shared.aggregate,
}


def choose(implementation: str, aggregation: str) -> str:
    """The implementation's name, ``auto`` resolved; ``ValueError`` where the one asked for cannot run."""
    if implementation == "auto":
        return "shared" if aggregation == "concat" else "reference"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation: expected one of {known}, found {implementation!r}")
    if implementation != "reference" and aggregation == "sum":
        raise ValueError(
            f"implementation: {implementation!r} shares statistics between readers of one feature, but a sum "
            "is a new tensor for each reader; expected 'reference' or 'auto' with aggregation 'sum'"
        )
    return implementation


def aggregate(
    implementation: str,
    plan: Plan,
    x: Tensor,
    readers: Sequence[Reader],
    statistics: Sequence[Statistics],
    training: bool,
) -> Tensor:
    """Runs a stage: ``(N, C_0, H, W)`` to the activated stage output ``(N, C_out, H, W)``."""
    return IMPLEMENTATIONS[implementation](plan, x, readers, statistics, training)
