"""Files fetched over the network: resumed where they stopped, and never by a redirection from https to http."""

from __future__ import annotations

import math
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener


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
            if (
                error.code != 416
            ):  # nothing beyond what is there: whether that is all, a checksum decides
                raise


class _StaysSecure(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            raise OSError(f"a redirection to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _append(response: HTTPResponse, file: Path, have: int, limit: float) -> None:
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(
        f"bytes {have}-"
    )
    with file.open("ab" if resumed else "wb") as out:  # a server may send the whole file instead
        before = out.tell()
        expected = int(response.headers.get("Content-Length", -1))
        while (
            before + expected <= limit and out.tell() <= limit and (block := response.read(1 << 20))
        ):
            out.write(block)
        total = out.tell()
    if max(total, before + expected) > limit:
        raise OSError(f"more than {limit / 2**20:.0f} MiB")
    if expected >= 0 and total != before + expected:
        raise OSError(f"{total} of {before + expected} bytes")
