"""The engine's passes as fused kernels for CUDA (:mod:`sparsenet.ops.triton_kernels`); the convolutions are PyTorch's.

On a CPU the kernels run in Triton's interpreter, which is slow and for tests: ``TRITON_INTERPRET=1`` must be in the
environment before this module is imported. Nothing waits for the device and nothing depends on data, so a step can be
captured as a CUDA graph once a first one has made the tables.
"""

from __future__ import annotations

import math
from functools import cache, cached_property, partial
from itertools import accumulate
from subprocess import SubprocessError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsenet.ops import engine
from sparsenet.ops import triton_kernels as kernels
from sparsenet.ops.plan import EPS, MOMENTUM, Plan, Statistics
from sparsenet.ops.triton_kernels import tl, triton

INTERPRETED: bool = triton.knobs.runtime.interpret  # settled when the kernels were defined
PRECISIONS = {torch.float32: tl.float32, torch.float64: tl.float64}
PARTS = 512  # of a sum over pixels, at most: as many as one program adds up without a loop
OLDEST = (8, 0)  # compute capability that Triton supports


def unavailable(device: torch.device) -> str | None:
    if INTERPRETED and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"expected a CUDA device, or TRITON_INTERPRET=1 set for a slow trial without one, found {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        return f"expected a device of compute capability 8.0 or later, found {found[0]}.{found[1]}"
    return _trouble()


@cache
def _trouble() -> str | None:
    """Triton compiles a small launcher in C when first used: what it says where it cannot."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        return f"expected a C compiler with Python's headers, which Triton needs, found: {error}"
    return None


class Pieces(NamedTuple):
    """What a kernel goes through: see :func:`sparsenet.ops.triton_kernels.read_piece`."""

    table: Tensor  # (number, 8) int32
    number: int


class Tables(NamedTuple):
    """All pieces of a stage, made once and kept for good: a captured graph reads them again."""

    features: list[Pieces]
    readers: list[Pieces]
    unit: int
    width: int

    @classmethod
    @cache
    def of(cls, plan: Plan, widths: tuple[int, ...], device: torch.device) -> Tables:
        width = piece_width(widths)
        first, index = plan.columns(widths).first, [0, *accumulate(widths)]

        def pieces(read: tuple[int, ...], reader: int | None = None) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = []
            column, columns = 0, sum(widths[j] for j in read)
            for j in read:
                for channel in range(0, widths[j], width):
                    count = min(width, widths[j] - channel)
                    begun = reader is not None and plan.sent_first[j] != reader
                    found.append(
                        (
                            first[j],
                            widths[j],
                            channel,
                            count,
                            column,
                            columns,
                            index[j] + channel,
                            begun,
                        )
                    )
                    column += count
            return found

        lists = [
            *(pieces((j,)) for j in range(len(widths))),
            *(pieces(read, r) for r, read in enumerate(plan.reads)),
        ]
        rows = torch.tensor([row for each in lists for row in each], dtype=torch.int32).to(device)
        cut = [Pieces(table, len(table)) for table in rows.split([len(each) for each in lists])]
        return cls(cut[: len(widths)], cut[len(widths) :], math.gcd(8, *widths), width)


def piece_width(widths: tuple[int, ...]) -> int:
    """Columns of a piece, a power of two: few idle lanes, but not for many more pieces, each with its addresses."""
    return min(
        (32, 64, 16), key=lambda lanes: sum(-(-width // lanes) * (lanes + 4) for width in widths)
    )


class Spread(NamedTuple):
    """How the pixels are dealt out to programs."""

    rows: int  # that a program takes at a time
    span: int  # that it takes in all, a multiple of those
    parts: int  # programs for one piece

    @classmethod
    def over(
        cls, pixels: int, programs: int, width: int, processors: int, most: int | None = None
    ) -> Spread:
        """For so many *programs* a part, *most* parts: tiles of 2,048 elements, or 512 where processors would idle."""
        rows = 2048 // width
        if programs * -(-pixels // rows) < processors:
            rows //= 4
        tiles = -(-pixels // rows)
        span = rows * (-(-tiles // most) if most else 1)
        return cls(rows, span, -(-pixels // span))


@cache
def processors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


class Triton(engine.Engine):
    """Features channels-last and raw, as the convolutions made them."""

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        return torch.channels_last

    @cached_property
    def kept(self) -> tuple[Tensor, ...]:
        statistics = torch.empty(2, sum(self.widths), dtype=self.wide, device=self.device)
        return self.empty(self.columns.total), statistics, *self.cast_weights()

    @cached_property
    def tables(self) -> Tables:
        return Tables.of(self.plan, self.widths, self.device)

    def put(self, j: int, made: Tensor, statistics: Statistics | None, training: bool) -> None:
        if statistics is None or not training:
            self.features[j].copy_(made)
            return
        pieces, made = self.tables.features[j], made.contiguous(memory_format=self.layout)
        spread, partials = self.partials(pieces, self.widths[j])
        self.launch(kernels.measure, pieces, spread, made, self.kept[0], partials)
        settled = partials, self.kept[1], *statistics
        self.settle(kernels.settle_statistics, pieces, spread, *settled, EPS=EPS, MOMENTUM=MOMENTUM)

    def activate(self, r: int, out: Tensor) -> None:
        pieces, (block, statistics, *_) = self.tables.readers[r], self.kept
        given = block, statistics, self.scales[r], self.shifts[r], out
        self.launch(kernels.activate, pieces, self.spread(pieces), *given)

    def collect(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        pieces, (block, statistics, *_) = self.tables.readers[r], self.kept
        scale, shift = self.scales[r], self.shifts[r]
        d_activated = d_activated.to(self.dtype).contiguous(memory_format=self.layout)
        spread, partials = self.partials(pieces, len(scale))
        given = block, self.block_of_sums, d_activated, statistics, scale, shift, partials
        self.launch(kernels.collect, pieces, spread, *given)
        d_scale, d_shift = torch.empty_like(scale), torch.empty_like(shift)
        settled = partials, statistics, scale, d_scale, d_shift, self.totals
        self.settle(kernels.settle_gradients, pieces, spread, *settled)
        return d_scale, d_shift

    def corrected(self, j: int, training: bool) -> Tensor:
        pieces, (block, statistics, *_) = self.tables.features[j], self.kept
        d_made = self.view(self.empty(self.widths[j]), self.widths[j])
        given = block, self.block_of_sums, statistics, self.totals, d_made
        self.launch(kernels.correct, pieces, self.spread(pieces), *given, TRAINING=training)
        return d_made

    def spread(self, pieces: Pieces, most: int | None = None) -> Spread:
        return Spread.over(
            self.pixels, pieces.number, self.tables.width, processors(self.device), most
        )

    def partials(self, pieces: Pieces, columns: int) -> tuple[Spread, Tensor]:
        """How to deal the pixels out for sums of so many *columns*, and memory for each part's two."""
        spread = self.spread(pieces, PARTS)
        return spread, torch.empty(spread.parts, 2, columns, dtype=self.wide, device=self.device)

    def launch(
        self, kernel: Any, pieces: Pieces, spread: Spread, *tensors: Tensor, **constants: Any
    ) -> None:
        """Runs a kernel over the pixels: a program for each part of each piece."""
        arguments = *tensors, pieces.table, pieces.number
        self._run(
            kernel, pieces.number * spread.parts, spread.rows, arguments, spread.span, constants
        )

    def settle(
        self, kernel: Any, pieces: Pieces, spread: Spread, *tensors: Tensor, **constants: Any
    ) -> None:
        """Runs a kernel that adds up the parts: a program for each piece."""
        arguments, rows = (
            (*tensors, pieces.table, spread.parts),
            triton.next_power_of_2(spread.parts),
        )
        self._run(kernel, pieces.number, rows, arguments, spread.span, constants)

    def _run(
        self,
        kernel: Any,
        programs: int,
        rows: int,
        arguments: tuple[Any, ...],
        span: int,
        constants: dict[str, Any],
    ) -> None:
        width = self.tables.width
        warps = min(
            16, max(1, rows * width // 512)
        )  # 16 elements a thread: two 16-byte loads of bf16
        with torch.cuda.device_of(self.kept[0]):
            kernel[(programs,)](
                *arguments, self.pixels, sum(self.widths), span,
                UNIT=self.tables.unit, ROWS=rows, WIDTH=width, PRECISION=PRECISIONS[self.wide],
                num_warps=warps, **constants,
            )  # fmt: skip


aggregate = partial(engine.aggregate, Triton)
