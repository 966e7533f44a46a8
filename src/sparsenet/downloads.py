"""Files fetched over the network."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from functools import partial
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from socket import SHUT_RDWR, create_connection, socket
from threading import Event, Thread
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import (
    AbstractHTTPHandler,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
)

from sparsenet.files import is_special

BLOCK = 1 << 20  # bytes read at a time
PATIENCE = 60.0  # seconds, after each of which enough must have come, as a server may only drip
LEAST_RATE = 1024  # bytes a second that are enough


class DownloadError(Exception):
    """The file did not come whole; the message says what happened or came instead."""


class ChecksumError(DownloadError):
    """The whole file came, and it is another one; it has been deleted."""


def download(
    url: str, target: Path, checksum: str = "", limit: float = math.inf, timeout: float = 30.0
) -> Path:
    """Fetches *url* into *target*, by way of ``target.part``, which a later call resumes.

    *checksum*, ``md5=HEX`` or ``sha256=HEX``, is compared before the file gets its name. *limit* is
    the most bytes to accept, *timeout* the seconds to wait for any bytes; what goes on slower than
    ``LEAST_RATE`` for ``PATIENCE`` seconds ends as well. An https address is never
    left for another kind by a redirection.

    Raises ``DownloadError``, and ``OSError`` where the folder of *target* cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        _fetch(url, part, limit, timeout)
    except (OSError, HTTPException, ValueError, OverflowError) as error:  # no address, or length
        raise DownloadError(str(error) or type(error).__name__) from error
    if checksum:
        algorithm, _, expected = checksum.partition("=")
        new_hash = partial(hashlib.new, algorithm, usedforsecurity=False)
        with part.open("rb") as file:
            actual = hashlib.file_digest(file, new_hash).hexdigest()
        if actual != expected:
            part.unlink()
            expected = f"{algorithm.upper()} {expected}"
            raise ChecksumError(f"expected {expected} of {url}, found {actual}: deleted")
    return part.replace(target)


def _fetch(url: str, part: Path, limit: float, timeout: float) -> None:
    if is_special(part):
        raise OSError(f"a pipe or device at {part}")
    start = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with _Watch() as watch:
            opener = build_opener(
                _Redirections, watch.handler(HTTPHandler), watch.handler(HTTPSHandler)
            )
            with opener.open(request, timeout=timeout) as response:
                _append(response, part, start, limit, watch)
    except HTTPError as error:
        error.close()
        nothing_follows = error.code == 416 and start  # a checksum decides whether that is all
        if not nothing_follows:
            raise


class _Watch:
    """Ends connections over which too little comes, whatever is being waited for meanwhile."""

    def __init__(self) -> None:
        self.received = 0
        self.is_slow = False
        self._ended = Event()
        self._sockets: list[socket] = []
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for each in self._sockets:
            each.close()
        if self.is_slow:  # instead of what the end of the connection looks like
            rate = f"{LEAST_RATE / 1024:g} KiB a second"
            raise OSError(f"less than {rate} in {PATIENCE:g} seconds")

    def _run(self) -> None:
        before, connections = 0, 0
        while not self._ended.wait(PATIENCE):
            is_new = len(self._sockets) != connections  # or there is none yet
            connections = len(self._sockets)
            if connections and not is_new and self.received - before < PATIENCE * LEAST_RATE:
                self.is_slow = True
                for each in self._sockets:
                    with suppress(OSError):  # closed by the server
                        each.shutdown(SHUT_RDWR)
                return
            before = self.received

    def connect(self, *arguments: Any) -> socket:
        """As ``socket.create_connection``."""
        made = create_connection(*arguments)
        if self.is_slow:  # the one before, and nobody watches any more
            made.close()
            raise OSError("a slow connection")
        self._sockets.append(made.dup())  # encryption takes *made* over
        return made

    def handler(self, kind: type[AbstractHTTPHandler]) -> AbstractHTTPHandler:
        """A handler of urllib's whose connections are watched."""
        handler = kind()
        do_open = handler.do_open

        def watched(connection: Any, request: Request, **options: Any) -> HTTPResponse:
            def made(*arguments: Any, **more: Any) -> Any:
                each = connection(*arguments, **more)
                each._create_connection = self.connect
                return each

            return do_open(made, request, **options)

        handler.do_open = watched  # type: ignore[assignment, method-assign]
        return handler


class _Redirections(HTTPRedirectHandler):
    """Follows redirections, but not from https to another kind, and reads no page of theirs."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            raise OSError(f"a redirection to {newurl}, which is not https")
        fp.close()  # urllib reads all that comes otherwise, at once
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _append(response: HTTPResponse, part: Path, start: int, limit: float, watch: _Watch) -> None:
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
        while block := response.read1(BLOCK):
            watch.received += len(block)
            if file.tell() + len(block) > limit:
                raise too_much
            file.write(block)
        size = file.tell()
    if total is not None and size != total:
        raise OSError(f"{size} of {total} bytes")
