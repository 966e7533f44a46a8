"""Where a figure was made: versions, hardware and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparsenet import __version__
from sparsenet.device import device_name


def installed() -> list[str]:
    """``name==version`` of every installed package, sorted."""
    found = {
        (d.metadata["Name"], d.version)
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    return sorted((f"{name}=={version}" for name, version in found), key=str.lower)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and commit: what a figure needs beside it."""
    return {
        "sparsenet": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(device),
        "driver": {"cuda": torch.version.cuda, "hip": torch.version.hip}
        if device.type == "cuda"
        else None,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
