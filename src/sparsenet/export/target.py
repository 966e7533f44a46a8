"""The file that an export writes."""

from __future__ import annotations

from pathlib import Path

from sparsenet.files import write_atomic


def check_target(target: Path) -> None:
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{target}: expected the name of a file in a folder that exists")


def write(target: Path, file: bytes) -> None:
    try:
        write_atomic(target, file)
    except OSError as error:
        raise ValueError(
            f"{target}: expected a file that can be written, found: {error.strerror}"
        ) from None
