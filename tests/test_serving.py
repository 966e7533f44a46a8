"""What is asked over HTTP gets the answer of ``predict`` or one line, and never stops the rest."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call, write_image
from PIL import Image

from sparsenet.architecture import Architecture
from sparsenet.data import pixels
from sparsenet.data.images import read_image
from sparsenet.data.preprocessing import Form, Preprocessing
from sparsenet.explain import heat_maps
from sparsenet.model import SparseNet
from sparsenet.predict import predict
from sparsenet.trained import Trained
from sparsenet.weights import About

httpx = pytest.importorskip("httpx")
for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package)

from sparsenet.commands.serve import leave_a_core  # noqa: E402
from sparsenet.serving import app as app_module  # noqa: E402
from sparsenet.serving import server as serving  # noqa: E402
from sparsenet.serving import service as service_module  # noqa: E402
from sparsenet.serving.app import LOOPBACK, create_app  # noqa: E402
from sparsenet.serving.limits import Limits, Refused  # noqa: E402
from sparsenet.serving.service import Batches, Service  # noqa: E402

CLASSES = ("ant", "bee", "<b>cat</b>", "d\u202eog", "emu", "fox")
QUICK = Limits(drain_seconds=5, receive_seconds=1, answer_seconds=5)
HERE = "http://127.0.0.1"


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "PAUSE_SECONDS", 0)


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    model = SparseNet(Architecture(depth=7, growth_rate=4, num_classes=len(CLASSES))).eval()
    about = About(
        "0.1.0",
        model.architecture.to_dict(),
        Preprocessing(16, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)),
        CLASSES,
        "colours",
        recipe={},
        epoch=1,
    )
    return Trained(Path("tiny"), model, about)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [write_image(tmp_path / f"{seed}.png", seed, size=20 + seed) for seed in range(4)]
    photo = tmp_path / "photo.jpg"
    gradient = Image.linear_gradient("L").resize((60, 40))
    gradient.save(photo)
    turned = Image.Exif()
    turned[274] = 6  # by 90 degrees
    gradient.convert("RGB").save(tmp_path / "t.jpg", exif=turned)
    Image.fromarray(np.full((9, 9, 4), 60, np.uint8)).save(tmp_path / "clear.webp")
    deep = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    return [*paths, photo, tmp_path / "t.jpg", tmp_path / "clear.webp", tmp_path / "deep.tiff"]


Client = Any
Response = Any


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def client_of(service: Service, hosts: tuple[str, ...] = LOOPBACK) -> AsyncIterator[Client]:
    app = create_app(service, hosts)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url=HERE)
    async with app.router.lifespan_context(app), client:
        yield client


def asked(service: Service, *requests: dict[str, Any]) -> list[Response]:
    """The answers to requests that are made one after the other; nothing is left inside."""

    async def scenario() -> list[Response]:
        async with client_of(service) as client:
            return [
                await client.request(**{"method": "POST", "url": "/predict"} | request)
                for request in requests
            ]

    answers = asyncio.run(scenario())
    assert (service.gate.pictures, service.gate.bytes) == (0, 0)
    return answers


def form(*paths: Path) -> dict[str, Any]:
    return {"files": [("image", (path.name, path.read_bytes())) for path in paths]}


def as_json(*images: Any) -> dict[str, Any]:
    return {"json": {"images": list(images)}}


def text_of(path: Path) -> str:
    return b64encode(path.read_bytes()).decode()


def raw(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"content": content, "headers": {"Content-Type": kind}}


def test_answers_are_those_of_predict_however_they_are_asked_for(
    trained: Trained, pictures: list[Path]
) -> None:
    named = [{"name": path.name, "data": text_of(path)} for path in pictures]
    single = [raw(path.read_bytes(), "application/octet-stream") for path in pictures]
    several, several_json, unnamed, *alone = asked(
        Service(trained, Limits(wait_ms=10_000)),  # a request's pictures are one batch
        form(*pictures),
        as_json(*named),
        as_json(*map(text_of, pictures)),
        *single,
    )
    expected = list(predict(trained, pictures, 5))
    assert not any(each.error for each in expected)
    answers = several.json()["predictions"]
    assert several_json.json() == several.json()
    assert several.json()["model"] == "tiny"
    assert [each["name"] for each in answers] == [path.name for path in pictures]
    assert [each["name"] for each in unnamed.json()["predictions"]][:2] == ["image 1", "image 2"]
    alone_answers = [answer.json()["predictions"][0] for answer in alone]
    for found in (answers, unnamed.json()["predictions"], alone_answers):
        for each, right in zip(found, expected, strict=True):
            assert tuple(each["classes"]) == right.classes
            assert each["probabilities"] == pytest.approx(right.probabilities, rel=1e-5)
    one = next(iter(predict(trained, pictures[:1], 5)))
    assert tuple(alone_answers[0]["probabilities"]) == one.probabilities  # to the digit


def test_top_says_how_many_classes_and_all_are_there_at_most(
    trained: Trained, pictures: list[Path]
) -> None:
    requests = [form(*pictures[:2]) | {"params": {"top": top}} for top in (1, 3, 1000)]
    answers = asked(Service(trained, Limits()), *requests)
    for answer, count in zip(answers, (1, 3, len(CLASSES)), strict=True):
        assert [len(each["classes"]) for each in answer.json()["predictions"]] == [count, count]


def test_a_bad_picture_among_several_is_an_error_of_its_own(
    trained: Trained, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:300])
    [answer, alone] = asked(
        Service(trained, Limits()), form(pictures[0], broken, pictures[1]), form(broken)
    )
    assert answer.status_code == 200
    good, bad, other = answer.json()["predictions"]
    assert good["classes"] and other["classes"] and "error" not in good | other
    [expected] = predict(trained, [broken])
    assert expected.error and str(tmp_path) in expected.error
    assert bad == {"name": "broken.png", "error": expected.error.replace(f"{tmp_path}/", "")}
    assert (alone.status_code, alone.json()["error"]) == (422, bad["error"])


def test_a_logit_that_is_no_number_is_an_error_of_that_picture(
    trained: Trained, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trained.model.forward_head

    def head(features: torch.Tensor) -> torch.Tensor:
        logits = real(features)
        logits[1::2] = torch.nan
        return logits

    monkeypatch.setattr(trained.model, "forward_head", head)
    [answer] = asked(
        Service(trained, replace(Limits(), wait_ms=5000)),  # so that they come together
        form(*pictures[:2]) | {"params": {"heat_map": True}},
    )
    found = answer.json()["predictions"]
    assert sorted("error" in each for each in found) == [False, True]
    [error] = [each["error"] for each in found if "error" in each]
    assert re.fullmatch(r"\d.png: expected finite logits, found NaN or infinity", error)


def test_the_heat_map_is_that_of_the_first_class(trained: Trained, pictures: list[Path]) -> None:
    [answer, plain] = asked(
        Service(trained, Limits()),
        form(*pictures) | {"params": {"heat_map": True, "top": 1}},
        form(pictures[0]),
    )
    assert "heat_map" not in plain.json()["predictions"][0]
    about = trained.preprocessing
    for path, found in zip(pictures, answer.json()["predictions"], strict=True):
        pixels = read_image(path, about.form())
        label = torch.tensor([CLASSES.index(found["classes"][0])])
        images = about.normalise(torch.from_numpy(pixels)[None])
        [expected] = heat_maps(trained.model, images, label).detach()
        drawn = Image.open(io.BytesIO(b64decode(found["heat_map"])))
        assert drawn.mode == "RGBA" and drawn.width == drawn.height
        cells = np.asarray(
            drawn.resize((expected.shape[1], expected.shape[0]), Image.Resampling.BOX)
        )
        is_orange = cells[..., 0] > cells[..., 2]
        clear = expected.abs() > 0.5 * expected.abs().max()
        assert torch.equal(torch.from_numpy(is_orange)[clear], (expected > 0)[clear])


def _png_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def _large_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1100, 1000)).save(file, "JPEG", progressive=True)
    return file.getvalue()


NARROW = Limits(max_images=3, max_mb=0.05)
FINE = _png_of(8, 8)
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no body": ({}, 400, "expected a picture, found none"),
    "an empty list": (as_json(), 400, "expected a picture, found none"),
    "text": (raw(b"hello", "text/plain"), 415, "Content-Type: expected .*, found text/plain; curl"),
    "no image": (raw(b"hello"), 422, r"image: expected an image \(BMP, .*\), found none"),
    "SVG": (raw(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), 422, "found none"),
    "EPS": (raw(b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/x-eps"), 422, "found none"),
    "no JSON": (raw(b"{", "application/json"), 400, "expected .*images.*, found: "),
    "no base64": (as_json("*"), 422, "base64.*images"),
    "an address": (as_json({"url": "http://127.0.0.1/a.png"}), 422, "unknown field `url`"),
    "an address as text": (as_json("http://127.0.0.1/a.png"), 422, "base64"),
    "a path": (as_json("/etc/passwd"), 422, "base64|found none"),
    "deep JSON": (raw(b'{"images":' + b"[" * 20_000, "application/json"), 422, "found: "),
    "no form": (raw(b"hello", "multipart/form-data; boundary=b"), 400, "expected a form"),
    "a part of a form": (
        raw(
            b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n%b\r\n--b\r\n'
            % FINE,
            "multipart/form-data; boundary=b",
        ),
        400,
        "a part of one",
    ),
    "no boundary": (raw(b"hello", "multipart/form-data"), 400, "boundary"),
    "a field": ({"files": {"top": (None, "3")}}, 422, r"found the field 'top'"),
    "many fields": (
        {"files": [("a", (None, "3"))] * 200},
        400,
        "Too many fields",
    ),
    "many pictures": (
        {"files": [("a", ("a.png", FINE))] * 4},
        413,
        "expected at most 3 pictures, found 4",
    ),
    "a hundred pictures too many": (
        {"files": [("a", ("a.png", b""))] * 104},
        413,
        "expected at most 3 pictures, found more; send several",
    ),
    "many in JSON": (as_json(*["AAAA"] * 5000), 413, "expected at most 3 pictures, found more"),
    "a few too many in JSON": (as_json(*["AAAA"] * 5), 413, "at most 3 pictures, found 5;"),
    "many bytes": (raw(bytes(50_001)), 413, "expected at most 48.8 KiB, found 50,001 bytes"),
    "top": (raw(FINE) | {"params": {"top": 0}}, 422, "^top: .*found '0'"),
    "no number": (raw(FINE) | {"params": {"top": "\x1b[1m"}}, 422, r"^top: .*\\x1b"),
    "another address": (raw(FINE) | {"url": "/nothing"}, 404, "POST /nothing: Not Found"),
    "another method": ({"method": "GET"}, 405, "GET /predict: Method Not Allowed"),
    "a name of others": (
        raw(FINE) | {"url": "http://rebound.example/predict"},
        403,
        "Host: expected .*found 'rebound.example'",
    ),
    "a page of others": (
        {"content": FINE, "headers": {"Origin": "https://evil.example"}},
        403,
        "Origin: expected none or 127.0.0.1, found 'https://evil.example'",
    ),
    "another port": (
        {"content": FINE, "headers": {"Origin": "http://127.0.0.1:81"}},
        403,
        "Origin: ",
    ),
    "no origin": ({"content": FINE, "headers": {"Origin": "null"}}, 403, "Origin: "),
    "another site": (
        {"content": FINE, "headers": {"Sec-Fetch-Site": "cross-site"}},
        403,
        "Sec-Fetch-Site: ",
    ),
}


@pytest.fixture(scope="module")
def refusals(trained: Trained) -> dict[str, Response]:
    service = Service(trained, NARROW)
    answers = asked(service, *(request for request, _, _ in REFUSED.values()), raw(FINE))
    assert answers.pop().status_code == 200  # it still answers
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line(
    case: str, refusals: dict[str, Response]
) -> None:
    _, status, expected = REFUSED[case]
    answer = refusals[case]
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert re.search(expected, error)
    assert "\n" not in error and error.isprintable() and len(error) < 2000
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_large_pictures_are_decoded_one_at_a_time(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LARGE_MEGAPIXELS", 0.01)
    service = Service(trained, Limits())
    lock = threading.Lock()
    decode, found = service_module._decoded, []

    def watched(picture: Any, form: Form) -> Any:
        if form.max_megapixels < 1:
            return decode(picture, form)
        assert lock.acquire(blocking=False), "two at a time"
        time.sleep(0.01)
        found.append(decode(picture, form))
        lock.release()
        return found[-1]

    monkeypatch.setattr(service_module, "_decoded", watched)
    [answer] = asked(service, {"files": [("a", ("a.png", _png_of(110, 100)))] * 4})
    assert answer.status_code == 200 and len(found) == 4


def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb, jpeg = _png_of(1100, 1000), _large_jpeg()
    # of the network's own limit a JPEG may have 8 times as many in predict, but not here
    answers = asked(Service(trained, Limits(), max_megapixels=1), raw(bomb), raw(jpeg))
    for answer in answers:
        assert answer.status_code == 413
        assert answer.json()["error"].startswith("image: too large: 1.1 megapixels, at most 1")


def test_a_body_that_grows_beyond_the_limit_is_not_read_further(trained: Trained) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 10_000
            yield bytes(10_000)

    for kind in ("image/png", "application/json", "multipart/form-data; boundary=b"):
        read = 0
        headers = {"Content-Type": kind}
        [answer] = asked(Service(trained, NARROW), {"content": body(), "headers": headers})
        assert answer.status_code in ((400, 413) if "form" in kind else (413,))
        assert read <= NARROW.max_bytes + 20_000


def test_names_of_files_are_escaped(trained: Trained, pictures: list[Path]) -> None:
    name = "../\x1b[31m\u202ea<script>" + "x" * 5000
    files = {"image": (name, b"no image")}
    [answer, other] = asked(
        Service(trained, Limits()),
        {"files": files},
        as_json({"name": "a\nb\x00" * 50, "data": text_of(pictures[0])}),
    )
    for text in (answer.json()["error"], other.json()["predictions"][0]["name"]):
        assert text.isprintable() and len(text) < 1300


def test_items_that_arrive_together_are_one_batch() -> None:
    sizes: list[int] = []
    go_on = threading.Event()

    def work(items: Any) -> list[int]:
        sizes.append(len(items))
        assert go_on.wait(10)
        return [2 * item for item in items]

    coming = 0

    async def scenario() -> list[int]:
        nonlocal coming
        batches = Batches(work, 4, 20, lambda: coming)
        running = asyncio.create_task(batches.run())
        first = asyncio.create_task(batches.result(0))
        await until(lambda: sizes == [1])  # nobody else is coming
        others = [asyncio.create_task(batches.result(i)) for i in range(1, 6)]
        await asyncio.sleep(0)
        others[0].cancel()  # whose client has gone
        await asyncio.sleep(0)
        coming = 1
        go_on.set()
        await until(lambda: sizes == [1, 3])
        coming = 0
        others.append(asyncio.create_task(batches.result(6)))
        found = await asyncio.gather(first, *others[1:])
        running.cancel()
        batches.thread.shutdown()
        return found

    assert asyncio.run(scenario()) == [0, 4, 6, 8, 10, 12]
    assert sizes == [1, 3, 2]


def test_what_a_batch_raises_is_told_to_each_of_it_and_the_next_one_works() -> None:
    def work(items: Any) -> Any:
        if 1 in items:
            raise RuntimeError("cannot allocate memory")
        return items

    async def scenario() -> list[Any]:
        batches = Batches(work, 2, 0.001, lambda: 2)
        running = asyncio.create_task(batches.run())
        found = [
            *await asyncio.gather(batches.result(1), batches.result(2), return_exceptions=True),
            await batches.result(3),
        ]
        running.cancel()
        batches.thread.shutdown()
        return found

    first, second, third = asyncio.run(scenario())
    assert isinstance(first, RuntimeError) and first is second and third == 3


@dataclass
class Held:
    """A service whose network waits until it is told to go on."""

    service: Service
    go_on: threading.Event
    batches: list[int]


def held(trained: Trained, limits: Limits) -> Held:
    service = Service(trained, limits)
    found = Held(service, threading.Event(), [])
    look = service.batches.work

    def waiting(items: Any) -> Any:
        found.batches.append(len(items))
        assert found.go_on.wait(20)
        return look(items)

    service.batches.work = waiting
    return found


def test_beyond_the_queue_is_a_refusal_that_says_when_to_ask_again(trained: Trained) -> None:
    network = held(trained, replace(Limits(), max_images=6, queue=6))

    async def scenario() -> None:
        async with client_of(network.service) as client:

            def ask(count: int) -> Awaitable[Response]:
                files = [("image", ("a.png", FINE))] * count
                return asyncio.ensure_future(client.post("/predict", files=files))

            first = ask(1)
            await until(lambda: network.batches == [1])
            others = [ask(1) for _ in range(3)]
            await until(lambda: network.service.gate.pictures == 4)
            for refused in await asyncio.gather(ask(3), *(ask(1) for _ in range(0))):
                assert refused.status_code == 503
                assert refused.headers["retry-after"] == "1"
                assert "ask again" in refused.json()["error"]
            health = await client.get("/healthz")
            assert health.json()["status"] == "ok"
            metrics = (await client.get("/metrics")).text
            assert "sparsenet_pictures_inside 4.0" in metrics
            network.go_on.set()
            answers = await asyncio.gather(first, *others)
            assert [each.status_code for each in answers] == [200] * 4
            assert (await ask(3)).status_code == 200
            metrics = (await client.get("/metrics")).text
            assert 'sparsenet_requests_total{code="503",path="/predict"} 1.0' in metrics
            assert 'sparsenet_requests_total{code="200",path="/predict"} 5.0' in metrics
            assert "sparsenet_pictures_inside 0.0" in metrics
            assert "sparsenet_batch_pictures_count" in metrics and "process_resident" in metrics

    asyncio.run(scenario())
    assert network.batches[:2] == [1, 3]  # those that came meanwhile are one batch


def test_a_client_that_is_refused_waits_while_others_are_answered(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[str] = []

    def busy(line: str) -> Refused:
        refusals.append(line)
        return Refused(503, line)

    monkeypatch.setattr(app_module, "PAUSE_SECONDS", 60)
    monkeypatch.setattr(service_module, "busy", busy)
    service = Service(trained, Limits())

    async def scenario() -> None:
        async with client_of(service) as client:
            with service.gate.room(service.limits.queue, 0):
                refused = asyncio.ensure_future(client.post("/predict", content=FINE))
                await until(lambda: bool(refusals))
                assert (await client.get("/healthz")).status_code == 200
            assert (await client.post("/predict", content=FINE)).status_code == 200
            assert not refused.done() and service.gate.pictures == 0
            refused.cancel()

    asyncio.run(scenario())


def test_bytes_that_are_announced_need_room_before_they_are_read(trained: Trained) -> None:
    service = Service(trained, replace(Limits(), max_mb=0.01))
    most = 8 * service.limits.max_bytes

    async def scenario() -> None:
        async with client_of(service) as client:
            with service.gate.room(1, most - 100):
                refused = await client.post("/predict", content=bytes(101))
                assert refused.status_code == 503
                assert "expected at most 0.08 MB of requests at a time" in refused.text
                assert (await client.post("/predict", content=FINE)).status_code == 200

    asyncio.run(scenario())


def test_what_takes_too_long_is_refused_and_leaves_nothing_behind(trained: Trained) -> None:
    network = held(trained, replace(Limits(), answer_seconds=0.05, receive_seconds=0.05))

    async def slow() -> AsyncIterator[bytes]:
        yield FINE[:20]
        await asyncio.sleep(10)

    async def scenario() -> None:
        async with client_of(network.service) as client:
            late = await client.post("/predict", content=FINE)
            assert late.status_code == 503 and "retry-after" in late.headers
            part = await client.post("/predict", content=slow())
            assert part.status_code == 408
            assert "within 0.05 s" in part.json()["error"]
            network.go_on.set()
            await until(lambda: network.service.gate.pictures == 0)

    asyncio.run(scenario())


def test_a_lack_of_memory_is_a_refusal_and_a_fault_is_told_to_the_log_alone(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, status, line in (
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "memory"),
        (RuntimeError("a secret"), 500, "a fault of the server"),
    ):

        def fail(items: Any, error: Exception = error) -> Any:
            raise error

        service = Service(trained, Limits())
        service.batches.work = fail
        [answer] = asked(service, raw(FINE))
        assert answer.status_code == status and line in answer.json()["error"]
        assert "secret" not in answer.text


def test_a_lack_of_memory_for_a_picture_says_nothing_of_the_picture(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(pixels, "_fit_limit", full)
    [answer] = asked(Service(trained, Limits()), raw(FINE))
    assert answer.status_code == 503 and "memory" in answer.json()["error"]


def test_a_fault_is_one_line_on_stderr_and_the_server_goes_on(trained: Trained) -> None:
    service = Service(trained, QUICK)
    look = service.batches.work

    def fail(items: Any) -> Any:
        service.batches.work = look
        raise RuntimeError("a\nfault")

    service.batches.work = fail
    with server_of(service) as server:
        answers = [httpx.post(f"{server.address}/predict", content=FINE) for _ in range(2)]
        with server.send(POST.format(1000), b"a part"):
            pass  # a client that goes
        slash = httpx.post(f"{server.address}/predict/", content=FINE)
        assert slash.status_code == 404
        deadline = time.monotonic() + 20
        while 'code="499"' not in httpx.get(f"{server.address}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [each.status_code for each in answers] == [500, 200]
    [line] = server.said
    assert "RuntimeError: a fault" in line and "\n" not in line
    assert (service.gate.pictures, service.gate.bytes) == (0, 0)


def test_nothing_is_sent_to_whom_the_environment_names(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    [answer] = asked(Service(trained, Limits()), raw(FINE))
    assert answer.status_code == 200


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script_of_others(
    trained: Trained,
) -> None:
    [answer, description, health] = asked(
        Service(trained, Limits()),
        {"method": "GET", "url": "/"},
        {"method": "GET", "url": "/openapi.json"},
        {"method": "HEAD", "url": "/healthz"},
    )
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not re.search(r"https?:|src=\"|url\(|@import", answer.text)
    assert "&lt;b&gt;cat" in answer.text and "<b>cat" not in answer.text
    assert "\u202e" not in answer.text
    accepted = re.findall(r'accept="([^"]*)"', answer.text)[0]
    assert "image/jpeg" in accepted and "image/webp" in accepted
    operation = description.json()["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {
        "application/json",
        "image/*",
        "multipart/form-data",
    }
    assert {"200", "413", "503"} <= set(operation["responses"])
    assert health.status_code == 200


def test_a_server_for_others_answers_to_any_name_or_to_those_allowed(trained: Trained) -> None:
    async def statuses(*hosts: str) -> list[int]:
        async with client_of(Service(trained, Limits()), hosts) as client:
            names = ("http://photos.example", "https://other.example:8443")
            answers = [
                await client.post(f"{name}/predict", content=FINE, headers={"Origin": name})
                for name in names
            ]
            health = await client.get("http://10.0.0.1/healthz")  # as a container's keeper asks
            return [each.status_code for each in (*answers, health)]

    assert asyncio.run(statuses("*")) == [200, 200, 200]
    assert asyncio.run(statuses("photos.example")) == [200, 403, 200]


@dataclass
class Running:
    """A server on loopback, in a thread."""

    port: int
    end: threading.Event
    thread: threading.Thread
    said: list[str]

    @property
    def address(self) -> str:
        return f"{HERE}:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which a part of a request was sent."""
        connection = self.connect()
        lines = head.replace("\n", "\r\n").encode()
        connection.sendall(lines + body)
        return connection


POST = "POST /predict HTTP/1.1\nHost: 127.0.0.1\nContent-Type: image/png\nContent-Length: {}\n\n"


def answer_on(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    with connection:
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@contextmanager
def server_of(service: Service) -> Iterator[Running]:
    listener = serving.listening("127.0.0.1", 0)
    end, ready, said = threading.Event(), threading.Event(), []
    app = create_app(service)
    arguments = app, listener, service.limits, end.is_set, ready.set, said.append
    thread = threading.Thread(target=serving.serve, args=arguments)
    thread.start()
    assert ready.wait(20)
    try:
        yield Running(listener.getsockname()[1], end, thread, said)
    finally:
        end.set()
        thread.join(30)
        assert not thread.is_alive()


def test_slow_clients_are_cut_off_and_keep_nobody_waiting(trained: Trained) -> None:
    with server_of(Service(trained, QUICK)) as server:
        nothing = server.connect()
        headers = server.send("POST /predict HTTP/1.1\nHost: 127.0.0.1\nX-A:")
        body = server.send(POST.format(1000), b"a part")
        assert httpx.get(f"{server.address}/healthz").status_code == 200
        assert answer_on(body).startswith(b"HTTP/1.1 408")
        for connection in (nothing, headers):
            with pytest.raises(ConnectionResetError):
                raise ConnectionResetError if answer_on(connection) == b"" else AssertionError
    assert server.said == []


def test_a_client_that_sends_what_was_refused_reads_why(trained: Trained) -> None:
    service = Service(trained, replace(QUICK, max_mb=0.1))
    with server_of(service) as server:
        for extra in ({}, {"headers": {"Transfer-Encoding": "chunked"}}):
            content = iter([bytes(1 << 20)] * 20) if extra else bytes(20 << 20)
            answer = httpx.post(f"{server.address}/predict", content=content)
            assert answer.status_code == 413, answer.text
        long = server.send("GET / HTTP/1.1\nHost: 127.0.0.1\nX-Long: " + "a" * 20_000)
        assert answer_on(long).startswith(b"HTTP/1.1 400")
        two = server.send("GET / HTTP/1.1\nHost: 127.0.0.1\nHost: evil.example\n\n")
        assert answer_on(two).startswith(b"HTTP/1.1 400")
    assert server.said == []


def test_beyond_the_connections_is_a_refusal(trained: Trained) -> None:
    with server_of(Service(trained, replace(QUICK, connections=2))) as server:
        first, second = server.connect(), server.connect()
        with pytest.raises(TimeoutError):  # they are being waited for
            second.settimeout(0.2)
            second.recv(1)
        answer = answer_on(server.connect())
        assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in answer
        for _ in range(20):  # also to who asks before it listens
            sending = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            sending.request("POST", "/predict", bytes(100_000))
            assert sending.getresponse().status == 503
            sending.close()
        first.close()
        second.close()
        deadline = time.monotonic() + 20
        while httpx.get(f"{server.address}/healthz").status_code != 200:
            assert time.monotonic() < deadline
    assert server.said == []


def test_what_is_under_way_is_answered_when_the_server_is_to_end(trained: Trained) -> None:
    network = held(trained, QUICK)
    with server_of(network.service) as server:
        idle = httpx.Client(base_url=server.address)
        assert idle.get("/healthz").status_code == 200
        computing = server.send(POST.format(len(FINE)), FINE)
        arriving = server.send(POST.format(len(FINE)), FINE[:10])
        while not network.batches:
            time.sleep(0.005)
        server.end.set()
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):  # new ones are refused
            while time.monotonic() < deadline:
                server.connect().close()
                time.sleep(0.02)
        with pytest.raises(httpx.TransportError):
            idle.get("/healthz")
        arriving.sendall(FINE[10:])
        network.go_on.set()
        for connection in (computing, arriving):
            answer = answer_on(connection)
            assert answer.startswith(b"HTTP/1.1 200") and b'"classes"' in answer
        server.thread.join(20)
        idle.close()
    assert server.said == []


def test_the_end_comes_though_a_client_never_ends(trained: Trained) -> None:
    limits = replace(Limits(), drain_seconds=1)
    with server_of(Service(trained, limits)) as server:
        slow = server.send(POST.format(1000), b"a part")
        httpx.get(f"{server.address}/healthz")
        server.end.set()
        server.thread.join(10)
        assert not server.thread.is_alive()
        slow.close()
    assert server.said == ["Cancel 1 running task(s), timeout graceful shutdown exceeded"]


def test_a_taken_port_is_one_line(call: Call) -> None:
    with serving.listening("127.0.0.1", 0) as free:
        assert free.proto == socket.IPPROTO_TCP  # asyncio turns Nagle's waiting off by that
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = call("serve", "sparsenet_40_12", "--port", port)
    assert outcome.code == 2
    assert (
        f"found 127.0.0.1 port {port}: Address already in use; 0 takes a free port" in outcome.error
    )
    elsewhere = call("serve", "sparsenet_40_12", "--host", "203.0.113.7")
    assert elsewhere.code == 2 and "203.0.113.7" in elsewhere.error
    nowhere = call("serve", "sparsenet_40_12", "--host", "no such host")
    assert nowhere.code == 2 and "--host: expected" in nowhere.error


def test_an_address_of_ip_6_is_written_in_brackets() -> None:
    try:
        listener = serving.listening("::1", 0)
    except ValueError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listener:
        port = listener.getsockname()[1]
        assert serving.address_of(listener) == (f"http://[::1]:{port}", True)
    with serving.listening("0.0.0.0", 0) as listener:
        assert serving.address_of(listener)[1] is False


def test_computing_leaves_a_core_to_receiving(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for threads in (4, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        leave_a_core()
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        leave_a_core()
    assert taken == [3, 1]


@pytest.mark.parametrize(
    ("flag", "value"), [("--port", "65536"), ("--queue", "0"), ("--queue", "3"), ("--max_mb", "-1")]
)
def test_wrong_flags_are_one_line(call: Call, flag: str, value: str) -> None:
    outcome = call("serve", "sparsenet_40_12", flag, value)
    assert outcome.code == 2 and flag in outcome.error and value in outcome.error


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_ends_the_program_with_0(pictures: list[Path], call: Call) -> None:
    command = [sys.executable, "-m", "sparsenet.cli", "serve", "sparsenet_40_12", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout
    line = server.stdout.readline()
    found = re.fullmatch(r"sparsenet_40_12 answers at (http://127.0.0.1:\d+); Ctrl-C .*\n", line)
    assert found, server.communicate()
    answer = httpx.post(f"{found[1]}/predict", content=pictures[0].read_bytes()).json()
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    damaged = httpx.post(f"{found[1]}/predict", content=b"--b\r\n\0", headers=form)
    assert damaged.status_code == 400  # and no line about it below
    server.send_signal(signal.SIGTERM)
    assert server.communicate(timeout=30) == ("", "")
    assert server.returncode == 0
    said = call("predict", "sparsenet_40_12", pictures[0], "--json")
    [expected] = json.loads(said.out)
    assert answer["predictions"][0]["classes"] == expected["classes"]
    assert answer["predictions"][0]["probabilities"] == pytest.approx(
        expected["probabilities"], rel=1e-5
    )
