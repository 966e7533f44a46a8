"""The user's cache folder, files written whole, and files fetched over the network."""

from __future__ import annotations

import math
import os
import tempfile
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener


def cache_folder() -> Path:
    """Where this library keeps what it can make or fetch again; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsenet"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename, fsync of the folder."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def fetch(url: str, file: Path, timeout: float = 30.0, limit: float = math.inf) -> None:
    """Fetches *url* into *file*, from where an earlier call stopped if there is something in it.

    *timeout*: seconds without an answer; *limit*: bytes. Raises ``OSError`` or ``http.client.HTTPException``, which
    leaves in *file* what came; a redirection from https to anything else is an error too.
    """
    have = file.stat().st_size if file.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with build_opener(_StaysSecure).open(request, timeout=timeout) as response:
            _append(response, file, have, limit)
    except HTTPError as error:
        with error:
            if error.code != 416:  # nothing beyond what is there: whether that is all, a checksum decides
                raise


class _StaysSecure(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            raise OSError(f"a redirection to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _append(response: HTTPResponse, file: Path, have: int, limit: float) -> None:
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    with file.open("ab" if resumed else "wb") as out:  # a server may send the whole file instead
        before = out.tell()
        expected = int(response.headers.get("Content-Length", -1))
        while before + expected <= limit and out.tell() <= limit and (block := response.read(1 << 20)):
            out.write(block)
        total = out.tell()
    if max(total, before + expected) > limit:
        raise OSError(f"more than {limit / 2**20:.0f} MiB")
    if expected >= 0 and total != before + expected:
        raise OSError(f"{total} of {before + expected} bytes")
