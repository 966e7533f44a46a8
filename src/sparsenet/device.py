"""The machine: which device, which precision, how much memory. One interface for every backend of PyTorch."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class DeviceTraits:
    """What this library does differently on one kind of device."""

    weight_layout: torch.memory_format = (
        torch.contiguous_format
    )  # how weights of convolutions lie in memory
    engines: tuple[str, ...] = ()  # implementations that ``auto`` prefers to ``shared`` there
    measured: bool = True  # whether ``auto`` goes by timings; not where work is recorded and replayed, or none is done
    fused_update: bool = False  # whether SGD's update is one kernel, which reads its rate from a tensor on the device
    records: bool = False  # whether a step can be recorded and replayed: see sparsenet.capture


TRAITS = {
    "cpu": DeviceTraits(engines=("native",), fused_update=True),
    "cuda": DeviceTraits(
        torch.channels_last, engines=("triton",), measured=False, fused_update=True, records=True
    ),
    "meta": DeviceTraits(measured=False),
}


def traits(device: torch.device) -> DeviceTraits:
    """Those of the kind of *device*."""
    return TRAITS.get(device.type, DeviceTraits())


def choose_device(name: str) -> torch.device:
    """``auto``: the accelerator PyTorch finds, else the CPU; ``ValueError`` for one that is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1).item()  # a value: the meta device has none
    except (RuntimeError, AssertionError, NotImplementedError):
        found = f"cpu and {accelerator}" if accelerator else "only cpu"
        raise ValueError(
            f"--device: expected a device of this machine ({found}), found {name!r}"
        ) from None
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device itself multiplies in bf16; not on MPS."""
    if device.type == "cpu":
        able: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    if device.type == "mps":
        return False
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda **_: True)
    return bool(supported(including_emulation=False) if device.type == "cuda" else supported())


def place(model: Model, device: torch.device | str) -> Model:
    """Moves *model* to *device*; on CUDA its weights lie as convolutions of channels-last features read them."""
    layout = traits(torch.device(device)).weight_layout
    return model.to(device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return (
            str(module.get_device_name(device))
            if hasattr(module, "get_device_name")
            else device.type
        )
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int | None:
    """Free bytes on an accelerator, ``None`` where it cannot say."""
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else None


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB: an accelerator's allocations, or the process's resident memory on the CPU."""
    if device.type == "cpu":
        return round(_resident("VmHWM") / 1e6, 1)
    return _allocated(device, "max_memory_allocated")


def memory_mb(device: torch.device) -> float | None:
    """Memory in use now, in MB, counted as :func:`peak_memory_mb` counts it."""
    return (
        round(_resident("VmRSS") / 1e6, 1)
        if device.type == "cpu"
        else _allocated(device, "memory_allocated")
    )


def _resident(field: str) -> float:
    """Bytes. Not ``ru_maxrss`` on Linux: that begins with the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _allocated(device: torch.device, name: str) -> float | None:
    module = torch.get_device_module(device)
    return round(getattr(module, name)(device) / 1e6, 1) if hasattr(module, name) else None


def tune_process() -> None:
    """What makes a whole program faster, and is not a library's to decide; called before the first tensor.

    CPU tensors come from huge pages (Linux), because fresh 4 KiB pages cost more than the arithmetic; a value of
    ``THP_MEM_ALLOC_ENABLE`` that the user has set stays. cuDNN times its algorithms for each shape and takes the
    fastest.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.backends.cudnn.benchmark = True
