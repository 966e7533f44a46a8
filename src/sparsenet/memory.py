"""How much memory this process and a device use. PyTorch is loaded when a device is asked."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Libraries have no exception of their own for it, and often only a message.
SHORTAGE = re.compile(
    r"(out of|allocate) memory|a memory object|a primitive$|start new thread|bad_alloc"
    r"|failed to map segment.*Cannot allocate memory"
)


def shortage(error: BaseException) -> str | None:
    """What *error* or its cause says, if that is that there is no memory left; else ``None``."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    known |= getattr(error, "errno", None) == errno.ENOMEM
    may_be = isinstance(error, RuntimeError | ImportError | OSError)
    if not known and not (may_be and SHORTAGE.search(str(error))):
        return shortage(error.__cause__) if error.__cause__ else None
    said = str(error).rpartition("DefaultCPUAllocator: ")[2]
    return said or "out of memory"


def total_memory() -> int:
    """Bytes that this process can have at most: the machine's, or those that it was limited to."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [physical + _kilobytes("/proc/meminfo", "SwapTotal:"), *_address_limit()]
    return min(limits + [limit for limit, _ in _group_limits()])


def available_memory() -> int:
    """Bytes that this process can still fill before the machine swaps or a limit is reached."""
    if os.name != "posix":
        return sys.maxsize  # nobody says
    found = [_kilobytes("/proc/meminfo", "MemAvailable:") or total_memory()]
    found += [limit - _process_bytes("VmSize") for limit in _address_limit()]
    found += [limit - used for limit, used in _group_limits()]
    return max(min(found), 0)


def _address_limit() -> list[int]:
    import resource  # which Windows does not have

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [limit] if limit != resource.RLIM_INFINITY else []


def _group_limits(folder: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[int, int]]:
    """The bytes that a control group may have, and those that it has beside files it can drop."""
    for limit, used, statistics, dropped in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            lines = (folder / statistics).read_text().splitlines()
            files = sum(int(line.split()[1]) for line in lines if line.split()[0] == dropped)
            yield most, now - files


def _kilobytes(file: str, field: str) -> int:
    """The bytes of a *field* of a file of the kernel's that counts in kB; 0 where there is none."""
    with suppress(OSError):
        lines = Path(file).read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
    return 0


def free_memory(device: torch.device) -> int | None:
    """Free bytes on an accelerator, ``None`` where it cannot say."""
    from torch import get_device_module

    module = get_device_module(device)
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
        return round(_process_bytes(process_field) / 1e6, 1)
    from torch import get_device_module

    allocated = getattr(get_device_module(device), device_function, None)
    return round(allocated(device) / 1e6, 1) if allocated else None


def _process_bytes(field: str) -> int:
    # Not ru_maxrss on Linux: that begins with the peak of the process that started this one.
    if found := _kilobytes("/proc/self/status", f"{field}:"):
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
