"""Files fetched over the network."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

BLOCK = 1 << 20  # bytes read at a time


class DownloadError(Exception):
    """What came is not all of the file; the message says what was received instead."""


class ChecksumError(DownloadError):
    """The whole file came, and it is another one; it has been deleted."""


def download(
    url: str, target: Path, checksum: str = "", limit: float = math.inf, timeout: float = 30.0
) -> Path:
    """Fetches *url* into *target*, by way of ``target.part``, which a later call resumes.

    *checksum*, ``md5=HEX`` or ``sha256=HEX``, is compared before the file gets its name. *limit* is
    the most bytes to accept, *timeout* the seconds to wait for an answer. An https address is never
    left for another kind by a redirection.

    Raises :class:`DownloadError`, and ``OSError`` where *target* cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        _fetch(url, part, limit, timeout)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no address
        raise DownloadError(str(error) or type(error).__name__) from error
    if checksum:
        _compare(part, url, checksum)
    return part.replace(target)


def _compare(part: Path, url: str, checksum: str) -> None:
    algorithm, _, expected = checksum.partition("=")
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, partial(hashlib.new, algorithm, usedforsecurity=False))
    actual = digest.hexdigest()
    if actual != expected:
        part.unlink()
        name = algorithm.upper()
        raise ChecksumError(f"expected {name} {expected} of {url}, found {actual}: deleted")


def _fetch(url: str, part: Path, limit: float, timeout: float) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with build_opener(_StayWithHttps).open(request, timeout=timeout) as response:
            _append(response, part, start, limit)
    except HTTPError as error:
        with error:
            if (
                error.code != 416
            ):  # nothing follows what is there; a checksum decides if that is all
                raise


class _StayWithHttps(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            raise OSError(f"a redirection to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _append(response: HTTPResponse, part: Path, start: int, limit: float) -> None:
    content_range = response.headers.get("Content-Range", "")
    resumed = response.status == 206 and content_range.startswith(f"bytes {start}-")
    if not resumed:  # the server sends the whole file instead
        start = 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    too_much = OSError(f"more than {limit / 2**20:.0f} MiB")
    if total is not None and total > limit:
        raise too_much
    with part.open("ab" if resumed else "wb") as file:
        while block := response.read(BLOCK):
            if file.tell() + len(block) > limit:
                raise too_much
            file.write(block)
        size = file.tell()
    if total is not None and size != total:
        raise OSError(f"{size} of {total} bytes")
