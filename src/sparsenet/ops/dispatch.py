"""One arithmetic, several implementations: chosen by name, without a silent fallback."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from sparsenet.device import casts_to_bf16, computes_in_bf16, traits
from sparsenet.extras import MissingExtra
from sparsenet.ops import measured, reference, shared  # noqa: F401 - always loaded
from sparsenet.ops.implementations import IMPLEMENTATIONS
from sparsenet.ops.measured import Timings
from sparsenet.ops.plan import Operands, Plan
from sparsenet.ops.tracing import is_watched
from sparsenet.texts import shown

MEASURED = (torch.float32, torch.bfloat16)  # fp64 is for checks; fp16 takes a CPU minutes


class Implementation(Protocol):
    """What a module offers. Importing it may raise ``sparsenet.extras.MissingExtra``."""

    def aggregate(self, plan: Plan, x: Tensor, operands: Operands) -> Tensor: ...

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run there, in half a line: what is expected and what is found."""


def choose(
    implementation: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    memory: str = "normal",
) -> str:
    """The name of an implementation that can run on *device*; ``ValueError`` where it cannot.

    ``auto`` becomes the fastest by ``timings``, those of training or of inference, or, on a
    device where nothing is measured, the preferred one. While the *device* is unknown it stays.
    """
    if implementation == "auto":
        return "auto" if device is None else _fastest(device, dtype, training, memory)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation: expected one of {known}, found {implementation!r}")
    if reason := unavailable(implementation, device):
        raise ValueError(f"implementation: {implementation!r} cannot run here: {reason}")
    return implementation


def _fastest(device: torch.device, dtype: torch.dtype, training: bool, memory: str) -> str:
    measurement = timings(device, dtype)
    seconds = dict(measurement.of(training)) if measurement else {}
    if memory == "lean":
        seconds.pop("reference", None)  # it keeps everything
    if seconds:
        return measured.fastest(seconds)
    excluded = "native" if dtype == torch.float16 else None
    return next(name for name in _runnable(device) if name != excluded)


def choose_precision(
    precision: str,
    device: torch.device,
    implementation: str = "auto",
    training: bool = True,
    memory: str = "normal",
) -> str:
    """``auto`` becomes bf16 where the *device* computes in it, unless fp32 is measured faster.

    Raises ``ValueError`` for another *precision* than auto, fp32 and bf16, and for bf16 where
    nothing would be cast to it.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"--precision: expected auto, fp32 or bf16, found {shown(precision)}")
    if precision == "bf16" and not casts_to_bf16(device):
        raise ValueError(
            f"--precision: expected fp32 on {device}, where autocast casts nothing to bf16, "
            "found 'bf16'"
        )
    if precision != "auto":
        return precision
    if not computes_in_bf16(device):
        return "fp32"
    ratio = slowdown(device, implementation, training, memory)
    return "bf16" if ratio is None or ratio <= 1 else "fp32"


def slowdown(
    device: torch.device,
    implementation: str = "auto",
    training: bool = True,
    memory: str = "normal",
) -> float | None:
    """Time in bf16 divided by time in fp32 on *device*; ``None`` where that is not measured."""
    bf16, fp32 = timings(device, torch.bfloat16), timings(device, torch.float32)
    if bf16 and fp32 and bf16.busy != fp32.busy:  # measured in two ways, not to be compared
        bf16 = timings(device, torch.bfloat16, anew=True)
        fp32 = timings(device, torch.float32, anew=True)
    if not bf16 or not fp32 or bf16.busy != fp32.busy:
        return None
    in_bf16 = choose(implementation, device, torch.bfloat16, training, memory)
    in_fp32 = choose(implementation, device, torch.float32, training, memory)
    numerator, denominator = bf16.of(training).get(in_bf16), fp32.of(training).get(in_fp32)
    return numerator / denominator if numerator and denominator else None


def timings(device: torch.device, dtype: torch.dtype, anew: bool = False) -> Timings | None:
    """How long each implementation takes for a few small layers on *device*.

    ``None`` where that is not measured. *anew* measures even if there is a result already.
    """
    if not traits(device).measured or dtype not in MEASURED:
        return None

    def implementations() -> dict[str, measured.Aggregate]:
        return {name: _load(name).aggregate for name in _runnable(device)}

    measurement = measured.timings(device, dtype, implementations, anew)
    return measurement if measurement.training else None


def unavailable(implementation: str, device: torch.device | None = None) -> str | None:
    """Why a known implementation cannot run on *device* (``None``: on any); ``None`` if it can."""
    try:
        module = _load(implementation)
    except MissingExtra as error:
        return str(error)
    return None if device is None else module.unavailable(device)


def passed_over(device: torch.device) -> dict[str, str]:
    """Implementations that ``auto`` would prefer on *device*, with why they cannot run there."""
    reasons = {name: unavailable(name, device) for name in traits(device).engines}
    return {name: reason for name, reason in reasons.items() if reason}


def _runnable(device: torch.device) -> list[str]:
    """What ``auto`` may take on *device*, in order of preference."""
    names = (*traits(device).engines, "shared", "reference")
    return [name for name in names if not unavailable(name, device)]


def aggregate(implementation: str, plan: Plan, x: Tensor, operands: Operands) -> Tensor:
    """Runs a stage: ``(N, C_0, H, W)`` to the activated stage output ``(N, C_out, H, W)``.

    Who looks at single operations, or changes what they do, is shown those of the reference: see
    ``is_watched``. It also computes batches without an image, and those without memory.
    """
    if is_watched(x) or not x.numel() or x.is_meta:
        return reference.aggregate(plan, x, operands)
    with_gradient = operands.training or torch.is_grad_enabled()
    name = choose(implementation, x.device, x.dtype, with_gradient, plan.memory)
    return _load(name).aggregate(plan, x, operands)


def _load(implementation: str) -> Implementation:
    name = IMPLEMENTATIONS[implementation]
    module = sys.modules.get(name) or import_module(name)  # torch.compile knows the first only
    return cast(Implementation, module)
