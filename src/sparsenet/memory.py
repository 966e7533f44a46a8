"""How much memory this process and a device use."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Free bytes on an accelerator, ``None`` where it cannot say."""
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else None


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB: an accelerator's allocations, or on the CPU the process's resident memory.

    ``None`` where an accelerator cannot say.
    """
    return _memory_mb(device, "VmHWM", "max_memory_allocated")


def memory_mb(device: torch.device) -> float | None:
    """Memory in use now, in MB, counted as ``peak_memory_mb`` counts it."""
    return _memory_mb(device, "VmRSS", "memory_allocated")


def _memory_mb(device: torch.device, process_field: str, device_function: str) -> float | None:
    if device.type == "cpu":
        return round(_resident_bytes(process_field) / 1e6, 1)
    allocated = getattr(torch.get_device_module(device), device_function, None)
    return round(allocated(device) / 1e6, 1) if allocated else None


def _resident_bytes(field: str) -> int:
    # Not ru_maxrss on Linux: that begins with the peak of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
