"""Several processes train as one does: the same batches, sums over all of them, one folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent


def start(
    rank: int, arguments: Sequence[str], port: int, **environment: str
) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **own, **place, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_statistics_in_common_are_those_of_one_process() -> None:
    port = free_port()
    script = str(TESTS / "ranks_laws.py")
    both = [start(rank, [script, "triton"], port, TRITON_INTERPRET="1") for rank in range(2)]
    for rank, process in enumerate(both):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert f"rank {rank} agrees" in said
