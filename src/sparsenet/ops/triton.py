"""The engine's passes as fused kernels for CUDA (``sparsenet.ops.triton_kernels``).

The convolutions are PyTorch's. On a CPU the kernels run in Triton's interpreter, which is slow and
for tests: ``TRITON_INTERPRET=1`` must be in the environment before this module is imported. Nothing
waits for the device and nothing depends on data, so a step can be captured as a CUDA graph once a
first one has made the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property, partial
from itertools import accumulate
from subprocess import SubprocessError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsenet.ops import engine
from sparsenet.ops import triton_kernels as kernels
from sparsenet.ops.plan import EPS, MOMENTUM, Plan
from sparsenet.ops.triton_kernels import tl, triton

INTERPRETED: bool = triton.knobs.runtime.interpret  # fixed when the kernels were defined
PRECISIONS = {torch.float32: tl.float32, torch.float64: tl.float64}
PARTS = 512  # of a sum over pixels, at most: as many as one program adds up without a loop
OLDEST = (8, 0)  # compute capability that Triton supports


def unavailable(device: torch.device) -> str | None:
    if INTERPRETED and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return (
            f"expected a CUDA device, or TRITON_INTERPRET=1 set for a slow trial without one, "
            f"found {device.type}"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        return f"expected a device of compute capability 8.0 or later, found {major}.{minor}"
    return _launcher_problem()


@cache
def _launcher_problem() -> str | None:
    """Why Triton cannot compile the small launcher in C that it makes when first used."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        return f"expected a C compiler with Python's headers, which Triton needs, found: {error}"
    return None


class Pieces(NamedTuple):
    """The pieces that a kernel goes through: see ``.triton_kernels.read_piece``."""

    table: Tensor  # (number, 8) int32
    number: int


class Tables(NamedTuple):
    """All pieces of a stage, made once and kept for good: a captured graph reads them again."""

    features: list[Pieces]
    readers: list[Pieces]
    unit: int  # which divides all numbers of the tables
    width: int  # of a piece, at most

    @classmethod
    @cache
    def of(cls, plan: Plan, widths: tuple[int, ...], device: torch.device) -> Tables:
        width = piece_width(widths)
        lists = [_rows(plan, widths, (j,), None, width) for j in range(len(widths))]
        lists += [_rows(plan, widths, read, r, width) for r, read in enumerate(plan.reads)]
        rows = [row for each in lists for row in each]
        table = torch.tensor(rows, dtype=torch.int32).to(device)
        parts = table.split([len(each) for each in lists])
        pieces = [Pieces(part, len(part)) for part in parts]
        return cls(pieces[: len(widths)], pieces[len(widths) :], math.gcd(8, *widths), width)


def _rows(
    plan: Plan, widths: tuple[int, ...], read: tuple[int, ...], reader: int | None, width: int
) -> list[tuple[int, ...]]:
    """The rows of a table for the features *read*: see ``.triton_kernels.read_piece``."""
    first_columns, first_channels = plan.columns(widths).first, [0, *accumulate(widths)]
    gathered = sum(widths[j] for j in read)
    rows: list[tuple[int, ...]] = []
    column = 0
    for j in read:
        adds = reader is not None and plan.first_gradient_from[j] != reader
        for channel in range(0, widths[j], width):
            count = min(width, widths[j] - channel)
            place = first_columns[j], widths[j], channel, count
            rows.append((*place, column, gathered, first_channels[j] + channel, int(adds)))
            column += count
    return rows


def piece_width(widths: tuple[int, ...]) -> int:
    """Columns of a piece, a power of two that leaves few lanes idle.

    More pieces cost more, too, since each has its addresses: four lanes are counted for them.
    """

    def cost(lanes: int) -> int:
        return sum(math.ceil(width / lanes) * (lanes + 4) for width in widths)

    return min((32, 64, 16), key=cost)


class PixelSplit(NamedTuple):
    """How the pixels are split among programs."""

    rows: int  # that a program takes at a time
    span: int  # that it takes in all, a multiple of those
    parts: int  # programs for one piece

    @classmethod
    def of(
        cls, pixels: int, pieces: int, width: int, processors: int, most: int | None = None
    ) -> PixelSplit:
        """At most *most* parts, in tiles of 2,048 elements, or 512 where processors would idle."""
        rows = 2048 // width
        if pieces * math.ceil(pixels / rows) < processors:
            rows //= 4
        tiles = math.ceil(pixels / rows)
        span = rows * (math.ceil(tiles / most) if most else 1)
        return cls(rows, span, math.ceil(pixels / span))


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class Triton(engine.Engine):
    """Features lie channels-last and raw, as the convolutions made them."""

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        return torch.channels_last

    @cached_property
    def tables(self) -> Tables:
        return Tables.of(self.plan, self.widths, self.call.device)

    def store_feature(self, j: int, feature: Tensor) -> None:
        if not self.takes_statistics:
            self.features[j].copy_(feature)
            return
        pieces = self.tables.features[j]
        feature = feature.contiguous(memory_format=self.call.layout)
        split = self.split(pieces, PARTS)
        partials = self.partials(split, self.widths[j])
        self.launch(kernels.measure, pieces, split, feature, self.feature_block, partials)
        running: Sequence[Tensor] = self.running_statistics[j]
        momentum = MOMENTUM
        if self.call.group:  # those of this process are written to other memory
            running, momentum = self.mean_rstd.new_zeros(2, self.widths[j]).unbind(), 1.0
        constants = {"EPS": EPS, "MOMENTUM": momentum}
        tensors = partials, self.mean_rstd, *running
        self.launch_sum(kernels.finish_statistics, pieces, split, *tensors, **constants)
        if self.call.group:
            pixels = self.call.pixels
            mean, var = self.synchronise(j, running[0], running[1] * ((pixels - 1) / pixels))
            self.move_running_statistics(j, mean, var)
            for to, each in zip(self.mean_and_rstd(j), (mean, (var + EPS).rsqrt()), strict=True):
                to.copy_(each)

    def write_activation(self, r: int, out: Tensor) -> None:
        pieces = self.tables.readers[r]
        tensors = self.feature_block, self.mean_rstd, self.scales[r], self.shifts[r], out
        self.launch(kernels.write_activation, pieces, self.split(pieces), *tensors)

    def backward_activation(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        pieces, scale, shift = self.tables.readers[r], self.scales[r], self.shifts[r]
        d_activated = d_activated.to(self.call.dtype).contiguous(memory_format=self.call.layout)
        split = self.split(pieces, PARTS)
        partials = self.partials(split, len(scale))
        blocks = self.feature_block, self.gradient_block
        given = *blocks, d_activated, self.mean_rstd, scale, shift, partials
        self.launch(kernels.backward_activation, pieces, split, *given)
        d_scale, d_shift = torch.empty_like(scale), torch.empty_like(shift)
        sums = partials, self.mean_rstd, scale, d_scale, d_shift, self.gradient_totals
        self.launch_sum(kernels.finish_gradients, pieces, split, *sums)
        return d_scale, d_shift

    def feature_gradient(self, j: int) -> Tensor:
        pieces, training = self.tables.features[j], self.call.training
        d_feature = self.view(self.empty(self.widths[j]), self.widths[j])
        blocks = self.feature_block, self.gradient_block
        given = *blocks, self.mean_rstd, self.gradient_totals, d_feature
        kernel = kernels.feature_gradient
        self.launch(kernel, pieces, self.split(pieces), *given, TRAINING=training)
        return d_feature

    def split(self, pieces: Pieces, most: int | None = None) -> PixelSplit:
        workers = processors(self.call.device)
        return PixelSplit.of(self.call.pixels, pieces.number, self.tables.width, workers, most)

    def partials(self, split: PixelSplit, columns: int) -> Tensor:
        """Memory for two sums of each part."""
        shape = split.parts, 2, columns
        return torch.empty(shape, dtype=self.call.sum_dtype, device=self.call.device)

    def launch(
        self, kernel: Any, pieces: Pieces, split: PixelSplit, *tensors: Tensor, **constants: Any
    ) -> None:
        """Runs a kernel over the pixels: a program for each part of each piece."""
        constants |= {"span": split.span, "ROWS": split.rows}
        programs = pieces.number * split.parts
        self._launch(kernel, programs, *tensors, pieces.table, pieces.number, **constants)

    def launch_sum(
        self, kernel: Any, pieces: Pieces, split: PixelSplit, *tensors: Tensor, **constants: Any
    ) -> None:
        """Runs a kernel that adds up the parts: a program for each piece."""
        constants |= {"span": split.span, "ROWS": triton.next_power_of_2(split.parts)}
        self._launch(kernel, pieces.number, *tensors, pieces.table, split.parts, **constants)

    def _launch(self, kernel: Any, programs: int, *arguments: Any, ROWS: int, **more: Any) -> None:
        more |= {"pixels": self.call.pixels, "channels": self.call.first_channels[-1]}
        more |= {"UNIT": self.tables.unit, "ROWS": ROWS, "WIDTH": self.tables.width}
        more["PRECISION"] = PRECISIONS[self.call.sum_dtype]
        # A thread takes 16 elements, two 16-byte loads of bf16; a warp has 32 threads.
        warps = min(16, max(1, ROWS * self.tables.width // (16 * 32)))
        with torch.cuda.device_of(self.feature_block):
            kernel[(programs,)](*arguments, **more, num_warps=warps)


aggregate = partial(engine.aggregate, Triton)
