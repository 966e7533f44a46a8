"""The engine's passes and convolutions for CPUs in C (``native.c``), compiled on first use.

A band of rows at a time is gathered into the core's own cache and multiplied there, so no concatenation exists in
memory, neither of activations nor of gradients. Features lie channels-last, raw, as the convolutions made them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet.files import cache_folder
from sparsenet.ops import engine
from sparsenet.ops.plan import EPS, MOMENTUM, Plan, Reader, Statistics

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
SUFFIXES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on *device*, in one clause; ``None`` where they can."""
    if device.type != "cpu":
        return f"it is for CPUs, found {device.type}"
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The compiled kernels, from the user's cache; ``RuntimeError`` where there is no compiler or it fails."""
    found = _library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache  # a failure too: every forward asks
def _library() -> ctypes.CDLL | str:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        return "it needs a C compiler (GCC, or $CC that makes what GCC does), found none"
    flags = [*FLAGS, *os.environ.get("CFLAGS", "").split()]
    key = hashlib.sha256(repr((SOURCE.read_bytes(), flags, compiler, _processor())).encode()).hexdigest()[:16]
    root = cache_folder()
    target = root / f"native-{key}.so"
    try:
        if not target.exists():
            root.mkdir(parents=True, exist_ok=True)
            if trouble := _compile(shlex.split(compiler), flags, target):
                return trouble
        return ctypes.CDLL(str(target))
    except OSError as error:
        return f"its kernels could not be compiled and loaded: {error}"


def _processor() -> tuple[str, ...]:
    """What ``-march=native`` depends on, so that a cache shared between machines holds a file for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    return tuple(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: list[str], flags: list[str], target: Path) -> str | None:
    """Compiles to a file of its own and renames it, so that no process ever loads half a library; what went wrong."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built, code = Path(folder) / "native.so", Path(folder) / "native.o"
        # Linked without OpenMP's library: PyTorch's is loaded already, and two thread pools would fight for the cores.
        for arguments in ([*flags, "-c", str(SOURCE), "-o", str(code)], ["-shared", str(code), "-o", str(built)]):
            found = subprocess.run([*compiler, *arguments], capture_output=True, text=True)
            if found.returncode:
                said = [line for line in found.stderr.splitlines() if "error" in line] or [f"exit {found.returncode}"]
                return f"its kernels could not be compiled by {compiler[0]}: {said[0]}"
        built.replace(target)
    return None


def _argument(value: Tensor | int | ctypes.Structure) -> Any:
    if isinstance(value, Tensor):
        if value.numel() and not value.data_ptr():
            raise ValueError(
                "implementation 'native': expected tensors with data, found one without; ask for 'reference'"
            )
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.byref(value)


class _Reader(ctypes.Structure):
    """``Reader`` of native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "in_", "out", "kernel", "links")),
        *((name, ctypes.c_void_p) for name in ("first", "widths", "statistic")),
    )


class Native(engine.Engine):
    """Features channels-last and raw; parameters and statistics at the precision of the sums, fp32 or fp64."""

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        return torch.channels_last

    @cached_property
    def kept(self) -> tuple[Tensor, ...]:
        return self.empty(self.columns.total), torch.empty(2, sum(self.widths), dtype=self.wide)

    def call(self, function: str, *arguments: Tensor | int | ctypes.Structure) -> None:
        """Runs a function of native.c on tensors, whose memory it is given, and numbers."""
        torch.get_num_threads()  # settles the number for this thread, if that has not been done
        getattr(library(), f"{function}_{SUFFIXES[self.dtype]}")(*map(_argument, arguments))

    def reader(self, r: int) -> _Reader:
        n, _, height, width = self.shape
        read = self.plan.reads[r]
        lists = [
            [self.columns.first[j] for j in read],
            [self.widths[j] for j in read],
            [self.channels[j] for j in read],
        ]
        arrays = [(ctypes.c_int64 * len(read))(*values) for values in lists]
        weight = self.weights[r] if r < len(self.weights) else None
        out, kernel = (0, 1) if weight is None else (weight.shape[0], weight.shape[-1])
        found = _Reader(n, height, width, len(self.scales[r]), out, kernel, len(read), *map(ctypes.addressof, arrays))
        found.arrays = arrays
        return found

    def affine(self, r: int) -> tuple[Tensor, ...]:
        """What a reader's activations are made of: the features, its scale and shift, all means and deviations."""
        mean, rstd = self.kept[1]
        return self.kept[0], self.exact(self.scales[r]), self.exact(self.shifts[r]), mean, rstd

    def exact(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.wide).contiguous()

    def put(self, j: int, made: Tensor, statistics: Statistics | None, training: bool) -> None:
        feature = self.features[j]
        if made.data_ptr() != feature.data_ptr():
            feature.copy_(made)
        if statistics is None:
            return
        mean, rstd = self.mean_and_rstd(j)
        if training:
            found = torch.empty(2, self.widths[j], dtype=torch.float64)
            self.call("measure", feature, self.pixels, self.widths[j], found[0], found[1])
            unbiased = found[1] * (self.pixels / (self.pixels - 1))
            statistics.mean.lerp_(found[0].to(statistics.mean.dtype), MOMENTUM)
            statistics.var.lerp_(unbiased.to(statistics.var.dtype), MOMENTUM)
            mean.copy_(found[0])
            rstd.copy_((found[1] + EPS).rsqrt())
        else:
            mean.copy_(statistics.mean)
            rstd.copy_((statistics.var.to(torch.float64) + EPS).rsqrt())

    def make(self, r: int) -> Tensor:
        made = self.features[r + 1]
        self.call("make", self.reader(r), *self.affine(r), self.exact(self.weights[r]), made)
        return made

    def activate(self, r: int, out: Tensor) -> None:
        self.call("activate", self.reader(r), *self.affine(r), out)

    def collect(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        d_scale, d_shift = self._share_out(r, "collect", d_activated)
        return d_scale, d_shift

    def back(self, r: int, d_made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.exact(self.weights[r])
        d_scale, d_shift, d_weight = self._share_out(r, "back", d_made, weight)
        return d_scale, d_shift, d_weight.to(self.weights[r].dtype)

    def _share_out(self, r: int, function: str, d: Tensor, *weight: Tensor) -> list[Tensor]:
        """Adds to the sums; gradients of scale and shift, and of the weight where one is given."""
        read = self.plan.reads[r]
        begun = torch.tensor([self.plan.sent_first[j] != r for j in read], dtype=torch.uint8)
        *affine, mean, rstd = self.affine(r)
        gradients = [torch.empty_like(t) for t in (affine[1], affine[2], *weight)]
        d = d.to(self.dtype).contiguous(memory_format=self.layout)
        self.call(
            function, self.reader(r), *affine, mean, rstd, *weight, d, self.block_of_sums, begun, *gradients,
            self.totals, self.totals.shape[1],
        )  # fmt: skip
        return [g.to(self.scales[r].dtype) for g in gradients[:2]] + gradients[2:]

    def corrected(self, j: int, training: bool) -> Tensor:
        start = self.channels[j]
        d_made = self.view(self.empty(self.widths[j]), self.widths[j])
        total_h, total_hz = (total[start : start + self.widths[j]] * training for total in self.totals)
        mean, rstd = self.mean_and_rstd(j)
        self.call(
            "correct",
            self.sums[j],
            self.features[j],
            self.pixels,
            self.widths[j],
            mean,
            rstd,
            total_h,
            total_hz,
            d_made,
        )
        return d_made


def aggregate(
    plan: Plan, x: Tensor, readers: Sequence[Reader], statistics: Sequence[Statistics], training: bool
) -> Tensor:
    """The stage output; ``ValueError`` for features in another precision than fp64, fp32 or bf16."""
    if x.dtype not in SUFFIXES:
        raise ValueError(
            f"implementation 'native': expected fp64, fp32 or bf16, found {x.dtype}; 'shared' and 'reference' take it"
        )
    return engine.aggregate(Native, plan, x, readers, statistics, training)
