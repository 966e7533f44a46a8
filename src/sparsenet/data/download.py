"""Downloads a file: resumed where it stopped, and checked before it gets its name."""

from __future__ import annotations

import hashlib
from http.client import HTTPException
from pathlib import Path

from sparsenet.data.errors import DataError, reason
from sparsenet.downloads import fetch

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def download(url: str, target: Path, md5: str, timeout: float = 30.0) -> Path:
    """Fetches *url* into *target* by way of ``target.part``, from where an earlier call stopped.

    *timeout*: seconds without an answer. A file with another MD5 is deleted. Raises :class:`DataError`.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, part, timeout)
        with part.open("rb") as file:
            found = hashlib.file_digest(
                file, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
    except (OSError, HTTPException) as error:
        todo = f"run again to resume, or put {target.name} into --dataset_dir"
        raise DataError(f"--download: expected {url}, found {reason(error)}: {todo}") from error
    if found != md5:
        part.unlink()
        raise DataError(
            f"--download: expected MD5 {md5} of {url}, found {found}: deleted; run again"
        )
    return part.replace(target)
