"""One arithmetic, several implementations: the door that picks one by name, never by silent fallback."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from sparsenet.device import computes_in_bf16, traits
from sparsenet.extras import MissingExtra
from sparsenet.ops import measured, reference, shared  # noqa: F401 - always loaded
from sparsenet.ops.implementations import IMPLEMENTATIONS, OPAQUE
from sparsenet.ops.plan import Plan, Reader, Statistics, stands_for_another

MEASURED = (torch.float32, torch.bfloat16)  # fp64 is for checks; fp16 takes a CPU minutes


class Implementation(Protocol):
    """What a module offers; importing it may raise :class:`sparsenet.extras.MissingExtra`."""

    def aggregate(
        self,
        plan: Plan,
        x: Tensor,
        readers: Sequence[Reader],
        statistics: Sequence[Statistics],
        training: bool,
    ) -> Tensor: ...

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run there, in half a line: what is expected and what is found."""


def choose(
    implementation: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    memory: str = "normal",
) -> str:
    """The implementation's name, ``auto`` resolved; ``ValueError`` where the one asked for cannot run.

    ``auto`` is the fastest by :func:`figures`, those of a step with a gradient or, without *training*, of inference;
    on a device where nothing is measured the preferred one. As long as the *device* is unknown, it stays ``auto``.
    """
    if implementation == "auto":
        return "auto" if device is None else _fastest(device, dtype, training, memory)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation: expected one of {known}, found {implementation!r}")
    if reason := unavailable(implementation, device):
        raise ValueError(f"implementation: {implementation!r} cannot run here: {reason}")
    return implementation


def choose_precision(
    name: str,
    device: torch.device,
    implementation: str = "auto",
    training: bool = True,
    memory: str = "normal",
) -> str:
    """``auto``: bf16 where the *device* computes in it and, as far as that is measured, is no slower than in fp32."""
    if name != "auto":
        return name
    times = slowdown(device, implementation, training, memory)
    return "bf16" if computes_in_bf16(device) and (times is None or times <= 1) else "fp32"


def slowdown(
    device: torch.device,
    implementation: str = "auto",
    training: bool = True,
    memory: str = "normal",
) -> float | None:
    """How many times as long as fp32 bf16 takes on *device*; ``None`` where it is not measured."""
    bf16, fp32 = (figures(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    if bf16 and fp32 and bf16.busy != fp32.busy:  # measured in two ways, so not to be compared
        bf16, fp32 = (
            figures(device, dtype, anew=True) for dtype in (torch.bfloat16, torch.float32)
        )
    if not bf16 or not fp32 or bf16.busy != fp32.busy:
        return None
    seconds = []
    for dtype, found in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        seconds.append(
            found.of(training).get(choose(implementation, device, dtype, training, memory))
        )
    return seconds[0] / seconds[1] if seconds[0] and seconds[1] else None


def figures(
    device: torch.device, dtype: torch.dtype, anew: bool = False
) -> measured.Figures | None:
    """How long each implementation takes on *device* for a few small layers; ``None`` where that is not measured."""
    if not traits(device).measured or dtype not in MEASURED:
        return None
    found = measured.figures(
        device, dtype, lambda: {name: _load(name).aggregate for name in _able(device)}, anew
    )
    return found if found.training else None


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
    implementation is ``auto`` or one whose kernels they cannot look into; so are batches without an image, and by
    ``auto`` tensors that stand for others (fake ones).
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if (traced and implementation in ("auto", *OPAQUE)) or not x.numel():
        return reference.aggregate(plan, x, readers, statistics, training)
    if implementation == "auto" and stands_for_another(x):
        return reference.aggregate(plan, x, readers, statistics, training)
    name = choose(
        implementation, x.device, x.dtype, training or torch.is_grad_enabled(), plan.memory
    )
    return _load(name).aggregate(plan, x, readers, statistics, training)


def passed_over(device: torch.device) -> dict[str, str]:
    """Implementations that ``auto`` would prefer on the *device*, with the reason why they cannot run there."""
    reasons = {name: unavailable(name, device) for name in traits(device).engines}
    return {name: reason for name, reason in reasons.items() if reason}


def _fastest(device: torch.device, dtype: torch.dtype, training: bool, memory: str) -> str:
    found = figures(device, dtype)
    seconds = dict(found.of(training)) if found else {}
    if memory != "normal":
        seconds.pop("reference", None)  # it keeps everything
    if seconds:
        return measured.fastest(seconds)
    return next(name for name in _able(device) if name != "native" or dtype != torch.float16)


def _able(device: torch.device) -> Iterator[str]:
    """What ``auto`` may take on *device*, in order of preference."""
    names = (*traits(device).engines, "shared", "reference")
    return (name for name in names if not unavailable(name, device))


def _load(implementation: str) -> Implementation:
    name = IMPLEMENTATIONS[implementation]
    return cast(
        Implementation, sys.modules.get(name) or import_module(name)
    )  # torch.compile knows the first only
