"""The machine: which device, which precision, how much memory. One interface for every backend of PyTorch."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch


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
        raise ValueError(f"--device: expected a device of this machine ({found}), found {name!r}") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """``auto``: bf16 on an accelerator, fp32 on the CPU and on MPS."""
    if name != "auto":
        return name
    return "fp32" if device.type in ("cpu", "mps") else "bf16"


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
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
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    module = torch.get_device_module(device)
    found = module.max_memory_allocated(device) if hasattr(module, "max_memory_allocated") else None
    return None if found is None else round(found / 1e6, 1)


def use_large_pages() -> None:
    """Asks PyTorch to take CPU tensors from huge pages (Linux): fresh 4 KiB pages cost more than the arithmetic.

    Takes effect if called before the process's first tensor; a value that the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
