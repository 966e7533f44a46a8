"""One arithmetic, several implementations: the door that picks one by name, never by silent fallback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from sparsenet.extras import MissingExtra
from sparsenet.ops import reference, shared  # noqa: F401 - always loaded
from sparsenet.ops.plan import MEMORY, Plan, Reader, Statistics

__all__ = [
    "IMPLEMENTATIONS",
    "MEMORY",
    "OPAQUE",
    "Plan",
    "Reader",
    "Statistics",
    "aggregate",
    "choose",
    "passed_over",
    "unavailable",
]

IMPLEMENTATIONS = {  # modules, loaded when first asked for: see Implementation
    "reference": "sparsenet.ops.reference",
    "shared": "sparsenet.ops.shared",
    "native": "sparsenet.ops.native",
    "triton": "sparsenet.ops.triton",
}
OPAQUE = ("native", "triton")  # kernels of their own
PREFERRED = {
    "cuda": ("triton",),
    "cpu": ("native",),
}  # by ``auto``, by kind of device: the first that can run there, else ``shared``


class Implementation(Protocol):
    """What a module offers; importing it may raise :class:`sparsenet.extras.MissingExtra`."""

    def aggregate(
        self, plan: Plan, x: Tensor, readers: Sequence[Reader], statistics: Sequence[Statistics], training: bool
    ) -> Tensor: ...

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run there, in half a line: what is expected and what is found."""


def choose(implementation: str, device: torch.device | None = None) -> str:
    """The implementation's name, ``auto`` resolved; ``ValueError`` where the one asked for cannot run.

    As long as the *device* is unknown, ``auto`` stays ``auto`` where the choice depends on it.
    """
    if implementation == "auto":
        return _prefer(device)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation: expected one of {known}, found {implementation!r}")
    if reason := unavailable(implementation, device):
        raise ValueError(f"implementation: {implementation!r} cannot run here: {reason}")
    return implementation


def unavailable(implementation: str, device: torch.device | None = None) -> str | None:
    """Why a known implementation cannot run on the *device*, or not on any; ``None`` where it can."""
    try:
        module = _load(implementation)
    except MissingExtra as error:
        return str(error)
    return None if device is None else module.unavailable(device)


def aggregate(
    implementation: str,
    plan: Plan,
    x: Tensor,
    readers: Sequence[Reader],
    statistics: Sequence[Statistics],
    training: bool,
) -> Tensor:
    """Runs a stage: ``(N, C_0, H, W)`` to the activated stage output ``(N, C_out, H, W)``.

    Tracers (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ONNX) are shown the reference where the
    implementation is ``auto`` or one whose kernels they cannot look into; so are batches without an image.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if (traced and implementation in ("auto", *OPAQUE)) or not x.numel():
        return reference.aggregate(plan, x, readers, statistics, training)
    name = choose(implementation, x.device)
    if implementation == "auto" and name == "native" and x.dtype == torch.float16:
        name = "shared"
    return _load(name).aggregate(plan, x, readers, statistics, training)


def passed_over(device: torch.device) -> dict[str, str]:
    """Implementations that ``auto`` would prefer on the *device*, with the reason why they cannot run there."""
    reasons = {name: unavailable(name, device) for name in PREFERRED.get(device.type, ())}
    return {name: reason for name, reason in reasons.items() if reason}


def _prefer(device: torch.device | None) -> str:
    if device is None:
        return "auto"
    able = (name for name in PREFERRED.get(device.type, ()) if not unavailable(name, device))
    return next(able, "shared")


def _load(implementation: str) -> Implementation:
    name = IMPLEMENTATIONS[implementation]
    return cast(Implementation, sys.modules.get(name) or import_module(name))  # torch.compile knows the first only
