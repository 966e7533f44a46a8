"""A server process: its socket, the time that clients have, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from sparsenet.extras import require
from sparsenet.serving.limits import MAX_HEADERS, Limits

if TYPE_CHECKING:
    import uvicorn

IDLE_SECONDS = 5  # that a connection may wait for its next request
GRACE_SECONDS = 1  # for the answer 408
# In which a client that still sends what was refused may read why.
LINGER_SECONDS = 5
MOST_REFUSED = 100  # connections that are kept until their client has read why
BACKLOG = 1024
FULL_BODY = b'{"error":"expected fewer open connections; ask again"}'
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(FULL_BODY), FULL_BODY)
)


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound and not open yet. ``ValueError`` where the address is not free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        expected = "--host: expected a name or address of this machine"
        raise ValueError(f"{expected}, found {host!r}: {error.strerror}") from None
    found = socket.socket(family, kind, protocol)  # asyncio has TCP send at once if it is named
    try:
        if os.name == "posix":  # elsewhere it would share the address
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        expected = f"expected an address to listen at, found {host} port {port}"
        raise ValueError(f"--port: {expected}: {error.strerror}; 0 takes a free port") from None
    return found


def address_of(listener: socket.socket) -> tuple[str, bool]:
    """The address to ask at, and whether only this machine can."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
    return f"http://{shown}:{port}", ip_address(host).is_loopback


def serve(
    app: Any,
    listener: socket.socket,
    limits: Limits,
    asked_to_end: Callable[[], object],
    ready: Callable[[], None],
    complain: Callable[[str], None],
) -> None:
    """Answers on *listener* until *asked_to_end* is true, and then what is under way.

    *ready* is called once when it answers, and *complain* with a line for each of its faults.
    """
    uvicorn = require("uvicorn", "serve")
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=limits.drain_seconds,
        h11_max_incomplete_event_size=MAX_HEADERS,
    )
    server = _server(config, limits, asked_to_end, ready)
    with _log_lines(complain):
        server.run(sockets=[listener])


@contextmanager
def _log_lines(complain: Callable[[str], None]) -> Iterator[None]:
    """What the server's library logs goes to *complain*; not what clients do wrong."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info and record.exc_info[1]
            if not isinstance(error, asyncio.CancelledError):  # by the end, which has its own line
                complain(" ".join(self.format(record).split()))

    # Without a handler Python would print what this one says of damaged forms.
    logging.getLogger("python_multipart").addHandler(logging.NullHandler())
    logger, handler = logging.getLogger("uvicorn.error"), Lines()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _refuse(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, lingers: bool) -> None:
    """Answers a connection that is one too many. Closed at once, it may take its answer back."""
    transport.write(FULL)
    if not lingers:
        transport.close()
        return
    transport.write_eof()
    loop.call_later(LINGER_SECONDS, transport.abort)


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
    """A connection that says since when its request or its answer is due."""
    from h11 import SEND_BODY
    from uvicorn.protocols.http.h11_impl import H11Protocol

    refused: set[asyncio.Protocol] = set()

    class Connection(H11Protocol):
        since = 0.0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.since = self.loop.time()
            if len(self.connections) > limits.connections:
                self.connections.discard(self)
                refused.add(self)
                _refuse(transport, self.loop, lingers=len(refused) <= MOST_REFUSED)

        def connection_lost(self, exc: Exception | None) -> None:
            refused.discard(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self in refused:  # and what still arrives is dropped
                return
            was_idle = self.timeout_keep_alive_task is not None
            if was_idle and self.conn.their_state is not SEND_BODY:
                self.since = self.loop.time()
            super().data_received(data)

        def on_response_complete(self) -> None:
            self.since = self.loop.time()
            if self.conn.their_state is SEND_BODY:  # it was answered before it had arrived
                self.since -= limits.receive_seconds - LINGER_SECONDS
            super().on_response_complete()

    return Connection


def _server(
    config: uvicorn.Config,
    limits: Limits,
    asked_to_end: Callable[[], object],
    ready: Callable[[], None],
) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def on_tick(self, counter: int) -> bool:
            self.should_exit |= bool(asked_to_end())
            if counter % 10 == 0:  # once a second
                self._close_slow()
            return await super().on_tick(counter)

        def _close_slow(self) -> None:
            """Ends connections whose client neither sends its request nor reads its answer."""
            now = asyncio.get_running_loop().time()
            connections: set[Any] = self.server_state.connections  # of the kind above
            for connection in list(connections):
                cycle = connection.cycle
                due = limits.receive_seconds + GRACE_SECONDS
                if cycle and not cycle.response_complete:
                    due += limits.answer_seconds
                if now - connection.since > due:
                    connection.transport.abort()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # they are the caller's
            yield

    return Server(config)
