"""Downloads a file: resumed where it stopped, and checked before it gets its name."""

from __future__ import annotations

import hashlib
import shutil
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sparsenet.data.errors import DataError, reason

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def download(url: str, target: Path, md5: str, timeout: float = 30.0) -> Path:
    """Fetches *url* into *target* by way of ``target.part``, from where an earlier call stopped.

    *timeout*: seconds without an answer. A file with another MD5 is deleted. Raises :class:`DataError`.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, timeout)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except (OSError, HTTPException) as error:
        todo = f"run again to resume, or put {target.name} into --dataset_dir"
        raise DataError(f"--download: expected {url}, found {reason(error)}: {todo}") from error
    if found != md5:
        part.unlink()
        raise DataError(f"--download: expected MD5 {md5} of {url}, found {found}: deleted; run again")
    return part.replace(target)


def _fetch(url: str, part: Path, timeout: float) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=timeout) as response:
            _append(response, part, have)
    except HTTPError as error:
        with error:
            if error.code != 416:  # nothing beyond what is there: the checksum decides
                raise


def _append(response: HTTPResponse, part: Path, have: int) -> None:
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    with part.open("ab" if resumed else "wb") as file:  # a server may send the whole file instead
        before = file.tell()
        shutil.copyfileobj(response, file, 1 << 20)
        received = file.tell() - before
    expected = int(response.headers.get("Content-Length", received))
    if received != expected:
        raise OSError(f"{before + received} of {before + expected} bytes")
