"""The engine's passes and convolutions for CPUs in C (``kernels/native.c``), compiled on first use.

A band of rows at a time is gathered into the core's own cache and multiplied there, so memory holds
no concatenation, neither of activations nor of gradients. Features lie channels-last, raw, as the
convolutions made them.
"""

from __future__ import annotations

import ctypes
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sparsenet.ops import engine
from sparsenet.ops.blocks import Block
from sparsenet.ops.compiler import library
from sparsenet.ops.plan import EPS, MOMENTUM, Operands, Plan

SUFFIXES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
BLOCKS = {"features": Block(), "gradients": Block()}  # kept for the next step
NO_DATA = (
    "implementation 'native': expected tensors with data, found one without; ask for 'reference'"
)


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on *device*, in one clause; ``None`` where they can."""
    if device.type != "cpu":
        return f"it is for CPUs, found {device.type}"
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


def aggregate(plan: Plan, x: Tensor, operands: Operands) -> Tensor:
    """The stage output; ``ValueError`` for features in another precision than fp64, fp32, bf16."""
    if x.dtype not in SUFFIXES:
        raise ValueError(
            f"implementation 'native': expected fp64, fp32 or bf16, found {x.dtype}; "
            f"'shared' and 'reference' take it"
        )
    _address(x)
    return engine.aggregate(Native, plan, x, operands)


class Arguments(ctypes.Structure):
    """``Arguments`` of native.c, in the same order."""

    _integers = (
        "images height width in_channels out_channels kernel sources all_channels "
        "first_channel training"
    )
    _pointers = (
        "columns widths channels adds features scale shift mean rstd weight output moments "
        "d_output x gradient_sums d_scale d_shift d_weight gradient_totals"
    )
    _fields_ = (
        *((name, ctypes.c_int64) for name in _integers.split()),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _pointers.split()),
    )


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(NO_DATA)
    return address


class ReaderTables(NamedTuple):
    """Arrays with an entry for each feature that a reader gathers."""

    columns: ctypes.Array[ctypes.c_int64]  # where it begins in the block of features
    widths: ctypes.Array[ctypes.c_int64]
    channels: ctypes.Array[ctypes.c_int64]  # where it begins among the statistics
    adds: ctypes.Array[ctypes.c_uint8]  # whether its gradient sum has been begun by another reader


@lru_cache(maxsize=1024)
def _reader_tables(plan: Plan, widths: tuple[int, ...]) -> list[ReaderTables]:
    columns, first_channels = plan.columns(widths).first, list(accumulate(widths, initial=0))
    tables = []
    for r, read in enumerate(plan.reads):
        adds = [plan.first_gradient_from[j] != r for j in read]
        integers = ctypes.c_int64 * len(read)
        places = ([values[j] for j in read] for values in (columns, widths, first_channels))
        first, width, channel = (integers(*values) for values in places)
        tables.append(ReaderTables(first, width, channel, (ctypes.c_uint8 * len(read))(*adds)))
    return tables


class Native(engine.Engine):
    """Parameters and statistics are at the precision of sums, fp32 or fp64."""

    @staticmethod
    def choose_layout(x: Tensor) -> torch.memory_format:
        return torch.channels_last

    def cast_weights(self) -> list[Tensor]:
        return []  # the kernels round weights where they need it

    def new_block(self, kind: str) -> Tensor:
        if self.plan.memory == "lean":  # no block stays for the next step
            return super().new_block(kind)
        return BLOCKS[kind].take(self.call.pixels * self.call.columns.total, self.call.dtype)

    @cached_property
    def moments(self) -> Tensor:
        """Mean and biased variance of the batch, of all channels, ``(2, C)``."""
        return torch.empty(2, self.call.first_channels[-1], dtype=torch.float64, device="cpu")

    @cached_property
    def reader_tables(self) -> list[ReaderTables]:
        return _reader_tables(self.plan, self.widths)

    @property
    def convolutions_make_features(self) -> bool:
        """Whether nothing, neither dropout nor a sum, lies between a convolution and a feature."""
        return not self.plan.dropout and not self.plan.terms

    # Calls of native.c

    def run(self, function: str, tensors: dict[str, Tensor], **numbers: int) -> None:
        """Runs a function of native.c. Raises ``MemoryError`` where it has no memory to work in."""
        torch.get_num_threads()  # makes PyTorch set this thread's number of threads
        images, _, height, width = self.call.shape
        arguments = Arguments(
            images, height, width, all_channels=self.call.first_channels[-1], eps=EPS, **numbers
        )
        for name, tensor in tensors.items():
            setattr(arguments, name, _address(tensor))
        arguments.mean, arguments.rstd = map(_address, self.mean_rstd)
        run = getattr(library(), f"{function}_{SUFFIXES[self.call.dtype]}")
        if run(ctypes.byref(arguments)):
            raise MemoryError(
                f"implementation 'native': no memory for what '{function}' works with"
            )

    def run_reader(self, function: str, r: int, tensors: dict[str, Tensor], **numbers: int) -> None:
        """Runs a function on what reader *r* gathers, with its scale and shift."""
        tensors["features"] = self.feature_block
        tensors["scale"], tensors["shift"] = self.wide(self.scales[r]), self.wide(self.shifts[r])
        numbers |= {"in_channels": len(self.scales[r]), "sources": len(self.plan.reads[r])}
        if "weight" in tensors:
            weight = tensors["weight"]
            numbers |= {"out_channels": len(weight), "kernel": weight.shape[-1]}
        else:
            numbers["kernel"] = 1
        tables = self.reader_tables[r]._asdict()
        addresses = {name: ctypes.addressof(table) for name, table in tables.items()}
        self.run(function, tensors, **numbers, **addresses)

    def wide(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.call.sum_dtype).contiguous()

    # Forward

    def use_running_statistics(self) -> None:
        mean, rstd = self.mean_rstd
        mean.copy_(torch.cat([each.mean for each in self.running_statistics]))
        variance = torch.cat([each.var for each in self.running_statistics])
        rstd.copy_((variance.to(torch.float64) + EPS).rsqrt())

    def convolve(self, r: int) -> Tensor:
        j = r + 1
        output = self.features[j]
        if self.plan.last_addition.get(j, j) > j:  # a later sum needs what sum j would overwrite
            output = self.view(self.empty(self.widths[j]), self.widths[j])
        tensors = {"weight": self.wide(self.weights[r]), "output": output}
        if self.takes_statistics and self.convolutions_make_features:
            tensors["moments"] = self.moments
        first_channel = self.call.first_channels[j]
        self.run_reader("convolve", r, tensors, first_channel=first_channel)
        return output

    def store_feature(self, j: int, feature: Tensor) -> None:
        stored = self.features[j]
        if feature.data_ptr() != stored.data_ptr():
            stored.copy_(feature)
        measured = j > 0 and self.convolutions_make_features
        if self.takes_statistics and not measured:
            tensors = {"x": stored, "moments": self.moments}
            first_channel = self.call.first_channels[j]
            self.run("measure", tensors, out_channels=self.widths[j], first_channel=first_channel)
        if self.takes_statistics and self.call.group:
            part = self.channels(j)
            mean, var = self.synchronise(j, *self.moments[:, part])
            self.moments[:, part] = torch.stack([mean, var])
            self.mean_rstd[:, part] = torch.stack([mean, (var + EPS).rsqrt()])

    def write_activation(self, r: int, out: Tensor) -> None:
        self.run_reader("write_activation", r, {"output": out})

    def stage_output(self) -> Tensor:
        if self.takes_statistics:
            self._move_running_statistics()
        return super().stage_output()

    def _move_running_statistics(self) -> None:
        """Moves those of all stored features at once."""
        moments = self.moments.clone()
        moments[1] *= self.pixels / (self.pixels - 1)
        moments = moments.to(self.running_statistics[0].mean.dtype)
        means, variances = (row.split(self.widths) for row in moments)
        stored = [j for j, last in enumerate(self.plan.topology.last_reader) if last]
        running = [self.running_statistics[j] for j in stored]
        torch._foreach_lerp_([each.mean for each in running], [means[j] for j in stored], MOMENTUM)
        torch._foreach_lerp_(
            [each.var for each in running], [variances[j] for j in stored], MOMENTUM
        )

    # Backward

    def backward_activation(self, r: int, d_activated: Tensor) -> tuple[Tensor, Tensor]:
        return self._run_backward("backward_activation", r, d_activated, {})

    def term_gradient(self, j: int) -> Tensor | None:
        """As in ``Engine``; not yet corrected where the next convolution does that itself."""
        is_read = self.plan.first_gradient_from[j] is not None
        if j > 0 and is_read and self.convolutions_make_features:
            return self.gradient_sums[j]
        return super().term_gradient(j)

    def backward_convolution(self, r: int, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.wide(self.weights[r])
        d_weight = torch.empty_like(weight)
        tensors, numbers = {"weight": weight, "d_weight": d_weight}, {}
        if self.convolutions_make_features:  # so d_output is a gradient sum, yet to be corrected
            tensors["x"] = self.features[r + 1]
            numbers["first_channel"] = self.call.first_channels[r + 1]
            numbers["training"] = int(self.call.training)
        d_scale, d_shift = self._run_backward(
            "backward_convolution", r, d_output, tensors, **numbers
        )
        return d_scale, d_shift, d_weight.to(self.weights[r].dtype)

    def _run_backward(
        self, function: str, r: int, d_output: Tensor, tensors: dict[str, Tensor], **numbers: int
    ) -> tuple[Tensor, Tensor]:
        """Adds to the gradient sums and totals; gradients of scale and shift."""
        width = len(self.scales[r])
        d_scale, d_shift = torch.empty(2, width, dtype=self.call.sum_dtype, device="cpu")
        d_output = d_output.to(self.call.dtype).contiguous(memory_format=self.call.layout)
        tensors |= {"d_output": d_output, "d_scale": d_scale, "d_shift": d_shift}
        tensors |= {"gradient_sums": self.gradient_block, "gradient_totals": self.gradient_totals}
        self.run_reader(function, r, tensors, **numbers)
        return d_scale.to(self.scales[r].dtype), d_shift.to(self.shifts[r].dtype)

    def feature_gradient(self, j: int) -> Tensor:
        d_feature = self.view(self.empty(self.widths[j]), self.widths[j])
        tensors = {
            "d_output": self.gradient_sums[j],
            "x": self.features[j],
            "output": d_feature,
            "gradient_totals": self.gradient_totals,
        }
        self.run(
            "feature_gradient",
            tensors,
            out_channels=self.widths[j],
            first_channel=self.call.first_channels[j],
            training=int(self.call.training),
        )
        return d_feature
