"""The engine's passes and convolutions for CPUs in C (``kernels/native.c``), compiled on first use.

A band of rows at a time is gathered into the core's own cache and multiplied there, so no concatenation exists in
memory, neither of activations nor of gradients. Features lie channels-last, raw, as the convolutions made them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from sparsenet.files import cache_folder
from sparsenet.ops import engine
from sparsenet.ops.blocks import Block
from sparsenet.ops.plan import EPS, MOMENTUM, Plan, Reader, Statistics, stands_for_another

FOLDER = Path(__file__).with_name("kernels")
SOURCE = FOLDER / "native.c"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
PATIENCE = 120  # seconds for a compiler that takes about three
SUFFIXES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
FAST = {  # what is fast on processors, by who made them: see "What multiplies" in DESIGN.md
    "GenuineIntel": ("-DBYTES=64", "-mprefer-vector-width=512"),
    "AuthenticAMD": ("-DPAIRS",),
}


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
        return "it needs a C compiler (GCC or Clang, or $CC), found none"
    found = _built(compiler, [])
    if (
        not isinstance(found, str) and not found.matrix_unit()
    ):  # compiled for, but the kernel does not grant it
        found = _built(compiler, ["-DMATRIX=0"])
    return found


def _built(compiler: str, more: list[str]) -> ctypes.CDLL | str:
    """The library, from the cache or compiled; what went wrong."""
    processor = _processor()
    fast = next(
        (flags for maker, flags in FAST.items() if any(maker in line for line in processor)), ()
    )
    flags = [*FLAGS, *fast, *more, *os.environ.get("CFLAGS", "").split()]
    try:
        sources = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]"))]
        key = hashlib.sha256(repr((sources, flags, compiler, processor)).encode()).hexdigest()[:16]
        with contextlib.ExitStack() as stack:
            target = _cached(f"native-{key}.so")
            if (
                target is None
            ):  # compiled for this process alone: what is loaded stays when its file goes
                target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "native.so"
            if not target.exists() and (trouble := _compile(shlex.split(compiler), flags, target)):
                return trouble
            return ctypes.CDLL(str(target))
    except OSError as error:
        return f"its kernels could not be compiled and loaded: {error}"


def _cached(name: str) -> Path | None:
    """A file of the user's cache, there already or to be written; ``None`` where nothing can be kept."""
    try:
        target = cache_folder() / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            tempfile.TemporaryFile(dir=target.parent).close()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return target


def _processor() -> tuple[str, ...]:
    """What ``-march=native`` depends on, so that a cache shared between machines holds a file for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    kept = ("vendor_id", "model name", "flags", "Features")
    return tuple(sorted({line for line in lines if line.startswith(kept)}))


def _compile(compiler: list[str], flags: list[str], target: Path) -> str | None:
    """Compiles to a file of its own and renames it, so that no process ever loads half a library; what went wrong."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "native.so"
        # Linked without OpenMP's library: PyTorch's is loaded already, and two thread pools would fight for the cores.
        command = [*compiler, *flags, "-shared", str(SOURCE), "-o", str(built)]
        if trouble := _run(command):
            return f"its kernels could not be compiled by {compiler[0]}: {trouble}"
        built.replace(target)
    return None


def _run(command: list[str]) -> str | None:
    """What went wrong. One that takes too long, or that nobody waits for, is ended with all that it has started."""
    pipe = subprocess.PIPE
    try:
        started = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, errors="replace", start_new_session=True
        )
    except OSError as error:
        return error.strerror
    with started as running:
        try:
            _, said = running.communicate(timeout=PATIENCE)
        except BaseException as error:  # it has a session of its own, so Ctrl-C does not reach it
            os.killpg(running.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"nothing after {PATIENCE} s"
            raise
    errors = [line for line in said.splitlines() if "error" in line] or [
        f"exit {running.returncode}"
    ]
    return errors[0] if running.returncode else None


FEATURES, SUMS = Block(), Block()


class Pass(ctypes.Structure):
    """``Pass`` of native.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("images", "height", "width", "in_", "out", "kernel", "links")
        ),
        *((name, ctypes.c_int64) for name in ("statistics", "place", "training")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("first", "widths", "statistic", "begun")),
        *(
            (name, ctypes.c_void_p)
            for name in ("block", "scale", "shift", "mean", "rstd", "weight")
        ),
        *((name, ctypes.c_void_p) for name in ("made", "found", "d", "x")),
        *((name, ctypes.c_void_p) for name in ("sums", "d_scale", "d_shift", "d_weight", "totals")),
    )


NO_DATA = (
    "implementation 'native': expected tensors with data, found one without; ask for 'reference'"
)


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(NO_DATA)
    return address


class Native(engine.Engine):
    """Features channels-last and raw; parameters and statistics at the precision of the sums, fp32 or fp64."""

    measured: int | None = None  # the feature that was made last, where it was measured
    # Of the gradient given last, where it is a sum yet to be corrected: its feature, and whether in training.
    uncorrected: tuple[int, bool] | None = None

    def __init__(self, plan: Plan, x: Tensor, parameters: Sequence[Tensor]):
        super().__init__(plan, x, parameters)
        # For each reader, of each feature it reads: first column, width and place; whether its sum has been begun.
        self.links: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        return torch.channels_last

    @cached_property
    def kept(self) -> tuple[Tensor, ...]:
        return self.block(FEATURES), torch.empty(2, sum(self.widths), dtype=self.wide, device="cpu")

    @cached_property
    def block_of_sums(self) -> Tensor:
        return self.block(SUMS)

    def block(self, kept: Block) -> Tensor:
        """Memory for all features; where it is to be lean, nothing is kept for the next step."""
        if self.plan.memory == "lean" or not self.plan.reuse:
            return self.empty(self.columns.total)
        return kept.take(self.pixels * self.columns.total, self.dtype)

    @cached_property
    def found(self) -> Tensor:
        """Mean and variance of all channels, as measured in this pass."""
        return torch.empty(2, sum(self.widths), dtype=torch.float64, device="cpu")

    @cached_property
    def running(self) -> dict[int, Statistics]:
        """Of the features that were measured, what is yet to be moved."""
        return {}

    def call(self, function: str, tensors: dict[str, Tensor], **numbers: int) -> None:
        """Runs a function of native.c on tensors, whose memory it is given, and numbers; ``MemoryError``."""
        torch.get_num_threads()  # settles the number for this thread, if that has not been done
        n, _, height, width = self.shape
        found = Pass(n, height, width, statistics=self.channels[-1], eps=EPS, **numbers)
        for name, tensor in tensors.items():
            setattr(found, name, _address(tensor))
        found.mean, found.rstd = map(_address, self.kept[1])
        if getattr(library(), f"{function}_{SUFFIXES[self.dtype]}")(ctypes.byref(found)):
            raise MemoryError(
                f"implementation 'native': no memory for what '{function}' works with"
            )

    def call_reader(
        self, function: str, r: int, tensors: dict[str, Tensor], **numbers: int
    ) -> None:
        """The same for what reader *r* gathers: the features, its scale and shift, all means and deviations."""
        read = self.plan.reads[r]
        if r not in self.links:
            lists = [
                [values[j] for j in read]
                for values in (self.columns.first, self.widths, self.channels)
            ]
            begun = torch.tensor(
                [self.plan.sent_first[j] != r for j in read], dtype=torch.uint8, device="cpu"
            )
            self.links[r] = torch.tensor(lists, device="cpu"), begun
        places, begun = self.links[r]
        tensors |= {
            "first": places[0], "widths": places[1], "statistic": places[2], "begun": begun, "block": self.kept[0],
            "scale": self.exact(self.scales[r]), "shift": self.exact(self.shifts[r]),
        }  # fmt: skip
        if "weight" in tensors:
            numbers |= {"out": len(tensors["weight"]), "kernel": tensors["weight"].shape[-1]}
        self.call(
            function,
            tensors,
            **{"in_": len(self.scales[r]), "links": len(read), "kernel": 1, **numbers},
        )

    def exact(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.wide).contiguous()

    def put(self, j: int, made: Tensor, statistics: Statistics | None, training: bool) -> None:
        feature, measured, self.measured = self.features[j], self.measured == j, None
        if made.data_ptr() != feature.data_ptr():
            feature.copy_(made)
            measured = False
        if statistics is None or not training:
            return
        if not measured:
            self.call(
                "measure",
                {"x": feature, "found": self.found},
                out=self.widths[j],
                place=self.channels[j],
            )
        self.running[j] = statistics

    def output(self) -> Tensor:
        """Moves the running statistics first, all at once."""
        if self.running:
            features, statistics = list(self.running), list(self.running.values())
            unbiased = self.pixels / (self.pixels - 1)
            found = (self.found * self.found.new_tensor([[1.0], [unbiased]])).to(
                statistics[0].mean.dtype
            )
            means, variances = (row.split(self.widths) for row in found)
            torch._foreach_lerp_(
                [each.mean for each in statistics], [means[j] for j in features], MOMENTUM
            )
            torch._foreach_lerp_(
                [each.var for each in statistics], [variances[j] for j in features], MOMENTUM
            )
        return super().output()

    def recall(self, statistics: Sequence[Statistics]) -> None:
        mean, rstd = self.kept[1]
        mean.copy_(torch.cat([each.mean for each in statistics]))
        rstd.copy_((torch.cat([each.var for each in statistics]).to(torch.float64) + EPS).rsqrt())

    def make(self, r: int) -> Tensor:
        made = self.features[r + 1]
        tensors = {"weight": self.exact(self.weights[r]), "made": made}
        if self.training and not (
            self.plan.dropout or self.plan.terms
        ):  # what is made is the feature
            tensors["found"], self.measured = self.found, r + 1
        self.call_reader("make", r, tensors, place=self.channels[r + 1])
        return made

    def activate(self, r: int, out: Tensor) -> None:
        self.call_reader("activate", r, {"made": out})

    def collect(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        d_scale, d_shift = self._share_out(r, "collect", d_activated, {})
        return d_scale, d_shift

    def gradient(self, j: int, training: bool) -> Tensor | None:
        """As it is to be used by :meth:`back` next, which corrects it on the way where nothing lies between."""
        self.uncorrected = None
        if (
            j
            and not self.plan.terms
            and not self.plan.dropout
            and self.plan.sent_first[j] is not None
        ):
            self.uncorrected = j, training
            return self.sums[j]
        return super().gradient(j, training)

    def back(self, r: int, d_made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tensors, numbers = {"weight": self.exact(self.weights[r])}, {}
        if self.uncorrected:
            j, training = self.uncorrected
            assert j == r + 1, "a gradient is used by the reader that made its feature"
            tensors["x"], numbers = (
                self.features[j],
                {"place": self.channels[j], "training": int(training)},
            )
        d_scale, d_shift, d_weight = self._share_out(r, "back", d_made, tensors, **numbers)
        return d_scale, d_shift, d_weight.to(self.weights[r].dtype)

    def _share_out(
        self, r: int, function: str, d: Tensor, tensors: dict[str, Tensor], **numbers: int
    ) -> list[Tensor]:
        """Adds to the sums; gradients of scale and shift, and of the weight where one is given."""
        d_scale, d_shift = torch.empty(2, len(self.scales[r]), dtype=self.wide, device="cpu")
        tensors |= {
            "d": d.to(self.dtype).contiguous(memory_format=self.layout), "sums": self.block_of_sums,
            "totals": self.totals, "d_scale": d_scale, "d_shift": d_shift,
        }  # fmt: skip
        if "weight" in tensors:
            tensors["d_weight"] = torch.empty_like(tensors["weight"])
        self.call_reader(function, r, tensors, **numbers)
        gradients = [d_scale.to(self.scales[r].dtype), d_shift.to(self.shifts[r].dtype)]
        return [*gradients, tensors["d_weight"]] if "weight" in tensors else gradients

    def corrected(self, j: int, training: bool) -> Tensor:
        d_made = self.view(self.empty(self.widths[j]), self.widths[j])
        tensors = {"d": self.sums[j], "x": self.features[j], "made": d_made, "totals": self.totals}
        self.call(
            "correct", tensors, out=self.widths[j], place=self.channels[j], training=int(training)
        )
        return d_made


def aggregate(
    plan: Plan,
    x: Tensor,
    readers: Sequence[Reader],
    statistics: Sequence[Statistics],
    training: bool,
) -> Tensor:
    """The stage output; ``ValueError`` for features in another precision than fp64, fp32 or bf16."""
    if x.dtype not in SUFFIXES:
        raise ValueError(
            f"implementation 'native': expected fp64, fp32 or bf16, found {x.dtype}; 'shared' and 'reference' take it"
        )
    if stands_for_another(x):
        raise ValueError(NO_DATA)
    _address(x)
    return engine.aggregate(Native, plan, x, readers, statistics, training)
