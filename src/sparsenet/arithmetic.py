"""The precision and the implementation that a run computes with, and what ``auto`` stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta

from sparsenet.config import TrainConfig
from sparsenet.device import computes_in_bf16
from sparsenet.ops import dispatch, measured


@dataclass(frozen=True)
class Arithmetic:
    """A precision and an implementation; ``auto`` is one that is not known yet."""

    precision: Annotated[str, Meta(pattern="^(auto|fp32|bf16)$")] = "auto"
    implementation: str = "auto"
    ranks: int = 1  # processes

    @property
    def dtype(self) -> torch.dtype:
        """The type of features."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def choose_arithmetic(
    config: TrainConfig,
    device: torch.device,
    previous: Arithmetic = Arithmetic(),
    ranks: int = 1,
) -> Arithmetic:
    """What *config* asks for, with a choice in place of ``auto``.

    That is what a resumed run had *previously*, so that it goes on bit for bit, else the fastest.
    Raises ``ValueError`` for an implementation that cannot run on *device*.
    """
    precision, implementation = config.precision, config.implementation
    if precision == "auto":
        precision = previous.precision
    if implementation == "auto":
        implementation = previous.implementation
    try:
        dispatch.choose(implementation, device, memory=config.memory)
    except ValueError as error:
        if implementation == config.implementation:
            raise
        other = dispatch.choose("auto", device, memory=config.memory)
        raise ValueError(
            f"--resume: the run began with implementation {implementation!r}; {error}. Resume it "
            "where that can run, or go on with another, no longer bit for bit: "
            f"--implementation {other}"
        ) from None
    precision = dispatch.choose_precision(precision, device, implementation, memory=config.memory)
    dtype = Arithmetic(precision).dtype
    implementation = dispatch.choose(implementation, device, dtype, memory=config.memory)
    return Arithmetic(precision, implementation, ranks)


def describe_choice(
    arithmetic: Arithmetic,
    config: TrainConfig,
    device: torch.device,
    previous: Arithmetic = Arithmetic(),
) -> Iterator[str]:
    """Lines for the user: the choice, and the reasons for it where *config* says ``auto``."""
    precision, implementation = arithmetic.precision, arithmetic.implementation
    line = f"{device}, {precision}, implementation {implementation}"
    if arithmetic.ranks > 1:
        line = f"{arithmetic.ranks} processes, {line}"
    if previous.precision != "auto" and arithmetic.ranks != previous.ranks:
        yield (
            f"warning: {arithmetic.ranks} processes instead of {previous.ranks}: the same batches, "
            "but sums are rounded otherwise, so the run goes on no longer bit for bit"
        )
    if arithmetic == previous and "auto" in (config.precision, config.implementation):
        yield f"{line}, as the run began"
        return
    steps = "training steps of small layers"
    if config.implementation == "auto":
        timings = dispatch.timings(device, arithmetic.dtype)
        if timings and implementation in timings.training:
            speedup = measured.describe_speedup(implementation, timings.training)
            line += f", {speedup} here, in {steps}"
    yield line
    if config.precision == "auto" and computes_in_bf16(device):
        times = dispatch.slowdown(device, config.implementation, memory=config.memory)
        if times:
            yield f"precision {precision}: {steps} take {times:.2f} of fp32's time in bf16 here"
    if config.implementation == "auto":
        for name, reason in dispatch.passed_over(device).items():
            yield f"implementation {name} cannot run here: {reason}"
