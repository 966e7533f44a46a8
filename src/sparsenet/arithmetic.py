"""With what a run computes: its precision and its implementation, what ``auto`` came to, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from sparsenet.config import TrainConfig
from sparsenet.device import computes_in_bf16
from sparsenet.ops import dispatch, measured


@dataclass(frozen=True)
class Arithmetic:
    """What was asked for, ``auto`` resolved."""

    precision: str
    implementation: str
    kept: bool = False  # whether it is what ``auto`` came to when the run began

    @property
    def dtype(self) -> torch.dtype:
        """Of features."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def settle(asked: TrainConfig, before: Mapping[str, str], device: torch.device) -> Arithmetic:
    """What is *asked* for; ``auto`` is what a resumed run had *before*, so that it goes on bit for bit, else the best.

    Raises ``ValueError`` for an implementation that cannot run on *device*.
    """
    implementation = (
        before.get("implementation", "auto")
        if asked.implementation == "auto"
        else asked.implementation
    )
    precision = before.get("precision", "auto") if asked.precision == "auto" else asked.precision
    try:
        dispatch.choose(implementation, device, memory=asked.memory)
    except ValueError as error:
        if implementation == asked.implementation:
            raise
        other = dispatch.choose("auto", device, memory=asked.memory)
        raise ValueError(
            f"--resume: the run began with implementation {implementation!r}; {error}. Resume it where that can run, "
            f"or go on with another, no longer bit for bit: --implementation {other}"
        ) from None
    precision = dispatch.choose_precision(precision, device, implementation, memory=asked.memory)
    autos = [name for name in ("implementation", "precision") if getattr(asked, name) == "auto"]
    kept = (
        bool(autos)
        and all(name in before for name in autos)
        and implementation == before.get("implementation")
    )
    found = Arithmetic(precision, implementation, kept)
    return replace(
        found,
        implementation=dispatch.choose(implementation, device, found.dtype, memory=asked.memory),
    )


def explain(used: Arithmetic, asked: TrainConfig, device: torch.device) -> Iterator[str]:
    """Lines for the user: what it is, and why where that was left to the program."""
    line = f"{device}, {used.precision}, implementation {used.implementation}"
    if used.kept:
        yield f"{line}, as the run began"
        return
    figures = dispatch.timings(device, used.dtype) if asked.implementation == "auto" else None
    if figures and used.implementation in figures.training:
        line += f", {measured.describe_speedup(used.implementation, figures.training)} here, in training steps of small layers"
    yield line
    compared = asked.precision == "auto" and computes_in_bf16(device)
    if compared and (times := dispatch.slowdown(device, asked.implementation, memory=asked.memory)):
        yield f"precision {used.precision}: training steps of small layers take {times:.2f} of fp32's time in bf16 here"
    if asked.implementation == "auto":
        for name, reason in dispatch.passed_over(device).items():
            yield f"implementation {name} cannot run here: {reason}"
