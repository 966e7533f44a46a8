"""Where a figure was made: versions, hardware and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsenet import __version__
from sparsenet.device import device_name


@dataclass(frozen=True)
class Environment:
    """Versions, hardware and commit; the fields are the keys of environment.json."""

    sparsenet: str
    commit: str | None  # ends in "-dirty" where files were changed; ``None`` outside a repository
    python: str
    torch: str
    platform: str
    device: str
    device_name: str
    driver: dict[str, str | None] | None  # versions of CUDA and HIP, or of PyTorch's plug-ins
    threads: int
    cpus: int | None
    batch_size: int | None = None  # images a step of a run
    precision: str | None = None  # that a run computes in
    implementation: str | None = None  # that a run computes with
    ranks: int = 1  # processes that train together


def environment(
    device: torch.device,
    batch_size: int | None = None,
    precision: str | None = None,
    implementation: str | None = None,
    ranks: int = 1,
) -> Environment:
    """Describes this process on *device*."""
    return Environment(
        sparsenet=__version__,
        commit=_commit(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=platform.platform(),
        device=str(device),
        device_name=device_name(device),
        driver=_driver(device),
        threads=torch.get_num_threads(),
        cpus=os.cpu_count(),
        batch_size=batch_size,
        precision=precision,
        implementation=implementation,
        ranks=ranks,
    )


def _driver(device: torch.device) -> dict[str, str | None] | None:
    if device.type == "cuda":
        return {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type == "cpu":
        return None
    plug_ins = importlib.metadata.entry_points(group="torch.backends")
    versions: dict[str, str | None] = {
        each.dist.name: each.dist.version for each in plug_ins if each.dist
    }
    if cann := getattr(torch.version, "cann", None):  # set by torch_npu: the driver of Ascend's
        versions["cann"] = cann
    return versions or None


def installed() -> list[str]:
    """``name==version`` of every installed package, sorted."""
    packages = set()
    for package in importlib.metadata.distributions():
        about = package.metadata  # parsed anew each time that it is asked for
        if about["Name"]:
            packages.add(f"{about['Name']}=={about['Version']}")
    return sorted(packages, key=str.lower)


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        git = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() if git.returncode == 0 else None
