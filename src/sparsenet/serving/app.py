"""The addresses of a server: what is asked there and who may ask."""

# Annotations are evaluated, as FastAPI looks at those of functions that are made within another.

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from sparsenet import __version__
from sparsenet.data.pixels import FORMATS
from sparsenet.extras import require
from sparsenet.pictures.figure import render
from sparsenet.serving.limits import MAX_HEADERS, Refused
from sparsenet.serving.measures import Measures
from sparsenet.serving.reading import read_pictures, stated_size
from sparsenet.serving.service import Answer, Service
from sparsenet.texts import one_line, shown

if TYPE_CHECKING:
    from fastapi import FastAPI

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# Before a refusal: clients that ask again at once would take the time of all others.
PAUSE_SECONDS = 0.5
HINTS = {408: {"Connection": "close"}, 503: {"Retry-After": "1"}}  # seconds
PATHS = ("/", "/predict", "/healthz", "/metrics", "/openapi.json")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
# Nothing of it is sent, whatever the environment says.
NO_TELEMETRY: Any = dict.fromkeys(
    ("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False
)


@dataclass(frozen=True)
class Answers:
    """What ``/predict`` answers: one entry for each picture, in order."""

    model: str
    predictions: list[Answer]


@dataclass(frozen=True)
class Failure:
    """What is answered where no picture was: one line."""

    error: str


def create_app(service: Service, hosts: Collection[str] = LOOPBACK) -> "FastAPI":
    """A FastAPI application that answers for *service*, to requests for the names in *hosts*.

    ``*`` in *hosts* stands for any name.
    """
    require("fastapi", "serve")
    require("python_multipart", "serve")
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="SparseNet",
        version=__version__,
        description=f"Classes of pictures, by {service.name}.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(Guard, hosts=hosts, measures=service.measures)
    _add_errors(app)
    _add_addresses(app, service)
    return app


def _add_errors(app: "FastAPI") -> None:
    """Whatever goes wrong is answered with one line."""
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    def failed(status: int, line: str) -> Response:
        headers = HINTS.get(status, {})
        content = msgspec.json.encode(Failure(one_line(line)))
        return Response(content, status, headers, "application/json")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        if error.status == 503:
            await asyncio.sleep(PAUSE_SECONDS)
        return failed(error.status, error.line)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return failed(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return failed(422, f"{first['loc'][-1]}: {first['msg']}, found {shown(first['input'])}")

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # which nobody reads but /metrics

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return failed(500, "a fault of the server, which its log tells")


def _add_addresses(app: "FastAPI", service: Service) -> None:
    from fastapi import Query, Request, Response
    from fastapi.responses import HTMLResponse

    page, policy = _page(service)

    @app.post(
        "/predict",
        response_model=Answers,
        responses={status: {"model": Failure} for status in (400, 403, 408, 413, 415, 422, 503)},
        openapi_extra={"requestBody": {"required": True, "content": _content()}},
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="classes of each picture")] = 5,
        heat_map: Annotated[bool, Query(description="a PNG of what speaks for the class")] = False,
    ) -> Response:
        """Classes of one picture or several, best first."""
        if unknown := sorted(set(request.query_params) - {"top", "heat_map"}):
            raise Refused(422, f"expected the parameters top and heat_map, found {unknown[0]!r}")
        with service.gate.room(1, stated_size(request, service.limits)):
            pictures = await read_pictures(request, service.limits)
            with service.gate.room(len(pictures) - 1, 0):
                answers = await service.answers(pictures, top, heat_map)
        content: dict[str, Any] = {"model": service.name, "predictions": [*map(_entry, answers)]}
        status = 200
        if all(each.error for each in answers):
            status, content["error"] = answers[0].status, answers[0].error
        return Response(msgspec.json.encode(content), status, media_type="application/json")

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        """Whether the server is there."""
        return {"status": "ok", "model": service.name, "version": __version__}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.measures.text(), media_type=service.measures.content_type)

    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def _entry(answer: Answer) -> dict[str, Any]:
    """An answer in JSON, without what it does not have."""
    if answer.error is not None:
        return {"name": answer.name, "error": answer.error}
    names = ("name", "classes", "probabilities")
    entry = {name: getattr(answer, name) for name in names}
    return entry if answer.heat_map is None else entry | {"heat_map": answer.heat_map}


def _content() -> dict[str, Any]:
    """What ``/predict`` takes, in OpenAPI's words."""
    file = {"type": "string", "format": "binary"}
    text = {"type": "string", "format": "byte", "description": "an image file in base64"}
    named = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "data": text},
        "required": ["data"],
        "additionalProperties": False,
    }
    several = {"type": "array", "items": {"anyOf": [text, named]}}
    return {
        "multipart/form-data": {
            "schema": {"type": "object", "additionalProperties": {"type": "array", "items": file}}
        },
        "application/json": {
            "schema": {"type": "object", "properties": {"images": several}, "required": ["images"]}
        },
        "image/*": {"schema": file},
    }


def _page(service: Service) -> tuple[str, str]:
    """The page at ``/``, and what it may do: run its own script and ask its own server."""
    about = service.trained.preprocessing
    page = render(
        "serve.html",
        version=__version__,
        name=service.name,
        classes=service.trained.classes,
        limits=service.limits,
        # Without other kinds in the list, a phone turns its own into a JPEG.
        kinds=",".join(f"image/{kind.lower()}" for kind in FORMATS),
        size=about.size,
    )
    scripts, styles = (
        " ".join(_digest(part) for part in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S))
        for tag in ("script", "style")
    )
    return page, (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


class Guard:
    """Who may ask: no page of another site, and nobody who calls this server by a foreign name.

    A page of another site can make a browser send requests to servers on its user's machine, by
    their address or by a name of its own that leads there. It also counts, and adds headers.
    """

    def __init__(self, app: App, hosts: Collection[str], measures: Measures) -> None:
        self.app, self.hosts, self.measures = app, frozenset(hosts), measures

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            if refused := self._refusal(scope):
                await _send_failure(sending, refused)
            else:
                await self.app(scope, receive, sending)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.measures.requests.labels(path, status).inc()
            self.measures.seconds.labels(path).observe(perf_counter() - began)

    def _refusal(self, scope: MutableMapping[str, Any]) -> Refused | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADERS:  # of which h11 counts only what comes in parts
            return Refused(400, f"headers: expected at most {MAX_HEADERS} bytes, found {size}")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        name = re.sub(r":\d*$", "", host).lower()
        if not {name, "*"} & self.hosts and scope["path"] != "/healthz":
            expected = f"one of {', '.join(sorted(self.hosts))}"
            return Refused(403, f"Host: expected {expected}, found {shown(host)}; --allowed_hosts")
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return Refused(403, f"Origin: expected none or {host}, found {shown(origin)}")
        site = headers.get(b"sec-fetch-site", "none")
        if site not in ("same-origin", "none"):
            return Refused(403, f"Sec-Fetch-Site: expected same-origin, found {shown(site)}")
        return None


async def _send_failure(send: Send, refused: Refused) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    body = msgspec.json.encode(Failure(one_line(refused.line)))
    await send({"type": "http.response.body", "body": body})
