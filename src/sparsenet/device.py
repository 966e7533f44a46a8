"""The machine's devices: one interface for every backend of PyTorch."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

LEAST_SECONDS = 1e-9  # to divide by and compare with, where a clock stands still
SOFT = 1  # omp_pause_soft


@dataclass(frozen=True)
class DeviceTraits:
    """What this library does differently on one kind of device."""

    weight_layout: torch.memory_format = torch.contiguous_format  # of convolutions
    engines: tuple[str, ...] = ()  # implementations that ``auto`` prefers to ``shared``
    measured: bool = True  # whether ``auto`` goes by timings; not where steps are replayed
    fused_update: bool = False  # whether SGD reads its rate from a tensor on the device
    records: bool = False  # whether steps can be recorded and replayed: see sparsenet.capture
    double: bool = False  # whether it computes in float64
    asynchronous: bool = True  # whether calls return before their work is done


TRAITS = {
    "cpu": DeviceTraits(engines=("native",), fused_update=True, double=True, asynchronous=False),
    "cuda": DeviceTraits(
        torch.channels_last,
        engines=("triton",),
        measured=False,
        fused_update=True,
        records=True,
        double=True,
    ),
    "meta": DeviceTraits(measured=False),
}


def traits(device: torch.device) -> DeviceTraits:
    """The traits of the kind of *device*."""
    return TRAITS.get(device.type, DeviceTraits())


def choose_device(name: str) -> torch.device:
    """The device of that *name*; ``auto`` is the accelerator that PyTorch finds, else the CPU.

    Raises ``ValueError`` for one that is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1).item()  # a value: the meta device has none
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        available = f"cpu and {accelerator}" if accelerator else "only cpu"
        hint = "; an Ascend NPU needs torch_npu installed" if name.startswith("npu") else ""
        raise ValueError(
            f"--device: expected a device of this machine ({available}), found {name!r}{hint}"
        ) from None
    return device


def autocast(device: torch.device, precision: str = "fp32") -> AbstractContextManager[object]:
    """Casts weights and features to bf16 where that is the *precision*; else nothing is cast.

    bf16 needs a device that ``casts_to_bf16``.
    """
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    try:
        return torch.autocast(device.type, enabled=False)
    except (RuntimeError, AssertionError):  # of a plug-in that never casts
        return nullcontext()


def casts_to_bf16(device: torch.device) -> bool:
    """Whether ``autocast`` casts on *device*: a plug-in's may raise an error or do nothing."""
    try:
        with autocast(device, "bf16"):
            one = torch.ones(1, 1, device=device)
            return torch.mm(one, one).dtype == torch.bfloat16
    except (RuntimeError, AssertionError):
        return False


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device itself multiplies in bf16; not on MPS."""
    if device.type == "cpu":
        capabilities: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if device.type == "mps":
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return (supported is None or bool(supported())) and casts_to_bf16(device)


def place(model: Model, device: torch.device | str) -> Model:
    """Moves *model* to *device*, its weights in the layout that convolutions read there."""
    layout = traits(torch.device(device)).weight_layout
    return model.to(device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        known = hasattr(module, "get_device_name")
        return str(module.get_device_name(device)) if known else device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def tune_process() -> None:
    """Makes a whole program faster in ways that are not a library's to decide.

    To be called before the first tensor is made. CPU tensors come from huge pages (Linux), because
    fresh 4 KiB pages cost more than the arithmetic; a value of ``THP_MEM_ALLOC_ENABLE`` that the
    user has set stays. cuDNN times its algorithms for each shape and takes the fastest.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.backends.cudnn.benchmark = True


def end_idle_threads() -> None:
    """Ends the threads that have computed with the calling one and now wait for more.

    To be called before another thread computes. Each thread that computes has helpers of its own,
    and GNU's OpenMP counts those that wait as well: where there are more of them than cores, none
    waits awake any more, and small operations take up to five times as long. The next computation
    of the calling thread makes new ones. Nothing happens under a runtime that knows no such call.
    """
    with suppress(AttributeError, OSError, TypeError):  # TypeError: on Windows
        ctypes.CDLL(None).omp_pause_resource_all(SOFT)
