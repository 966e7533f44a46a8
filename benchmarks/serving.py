"""How much ``sparsenet serve`` answers, how fast, and what it does beyond: over loopback.

    python -m benchmarks.serving --out results/serving

starts a server of its own and asks it from this process, which shares the machine's cores with it.
Clients ask again as soon as they are answered. First 1, 8 and 64 of them in turns, then five times
as many as the server has room for, while its health is asked for ten times a second. Exit codes:
0 done, 1 the server did what it must not.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import msgspec
import torch
from PIL import Image

from benchmarks.bench.record import Spread
from sparsenet.environment import Environment, environment
from sparsenet.files import write_atomic, write_json
from sparsenet.serving.limits import Limits
from sparsenet.summary import markdown_table

CLIENTS = (1, 8, 64)
ALLOWED = {200, 503}  # beyond capacity
MORE = 5  # times as many clients as there is room for pictures


class Row(msgspec.Struct):
    """What so many clients saw. Seconds are from the request to the end of the answer."""

    clients: int
    requests: int  # of all rounds
    per_second: Spread  # answers of 200, of each round
    p50: Spread
    p99: Spread
    memory_mb: float  # of the server, resident, at the end


class Beyond(msgspec.Struct):
    """What the server did beyond its capacity."""

    clients: int
    requests: int
    seconds: float
    statuses: dict[int, int]
    answered_per_second: float
    memory_mb: list[float]  # each second
    health_checks: int
    health_failures: int
    health_p50: float
    health_max: float


class Record(msgspec.Struct):
    """All figures, and where they were made."""

    model: str
    picture: str
    rounds: int
    seconds: float  # of a round
    environment: Environment
    limits: Limits
    rows: list[Row]
    memory_over_10_000: list[float]  # MB after each 1,000 of 10,000 requests by 64 clients
    beyond: Beyond


class Client:
    """One keep-alive connection that asks for one thing again and again."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port, self.request = port, request
        self.reader: asyncio.StreamReader | None = None

    async def ask(self) -> tuple[int, bytes]:
        """The status and the body of an answer; status 0 where there is none."""
        try:
            if self.reader is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(self.request)
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            body = await self.reader.readexactly(int(length[1]) if length else 0)
            if b"connection: close" in head.lower():
                self.close()
            return int(head.split()[1]), body
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0, b""

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()
        self.reader = None


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


async def memory_mb(port: int) -> float:
    client = Client(port, get("/metrics"))
    _, text = await client.ask()
    client.close()
    found = re.search(rb"^process_resident_memory_bytes (\S+)", text, re.M)
    return round(float(found[1]) / 1e6, 1) if found else 0.0


Asked = list[tuple[int, float]]  # statuses and seconds


async def load(port: int, clients: int, picture: bytes, seconds: float, most: int = 0) -> Asked:
    """What *clients* are answered within *seconds*, or until there are *most* answers."""
    found: Asked = []
    end = perf_counter() + seconds

    async def work() -> None:
        client = Client(port, post("/predict", picture))
        while perf_counter() < end and not (most and len(found) >= most):
            began = perf_counter()
            status, _ = await client.ask()
            found.append((status, perf_counter() - began))
        client.close()

    await asyncio.gather(*(work() for _ in range(clients)))
    return found


async def rows(port: int, picture: bytes, rounds: int, seconds: float) -> list[Row]:
    """The figures of each number of clients, measured in turns."""
    measured: dict[int, list[Asked]] = {clients: [] for clients in CLIENTS}
    memory = dict.fromkeys(CLIENTS, 0.0)
    await load(port, 64, picture, 2)
    for _ in range(rounds):
        for clients in CLIENTS:
            measured[clients].append(await load(port, clients, picture, seconds))
            memory[clients] = await memory_mb(port)
    found = []
    for clients, each in measured.items():
        assert {status for asked in each for status, _ in asked} == {200}
        cuts = [quantiles([took for _, took in asked], n=100) for asked in each]
        found.append(
            Row(
                clients,
                sum(map(len, each)),
                Spread.of([len(asked) / seconds for asked in each]),
                Spread.of([cut[49] for cut in cuts]),
                Spread.of([cut[98] for cut in cuts]),
                memory[clients],
            )
        )
    return found


async def beyond(port: int, picture: bytes, clients: int, seconds: float) -> Beyond:
    """Asks more than there is room for, and meanwhile for the server's health and memory."""
    memory, health = [], []

    async def look() -> None:
        client = Client(port, get("/healthz"))
        for turn in range(int(seconds * 10)):
            began = perf_counter()
            status, _ = await client.ask()
            health.append((status, perf_counter() - began))
            if turn % 10 == 0:
                memory.append(await memory_mb(port))
            await asyncio.sleep(max(0.0, 0.1 - (perf_counter() - began)))
        client.close()

    looking = asyncio.create_task(look())
    await asyncio.sleep(0.2)
    asked = await load(port, clients, picture, seconds)
    await looking
    statuses = Counter(status for status, _ in asked)
    took = [each for status, each in health if status == 200]
    return Beyond(
        clients,
        len(asked),
        seconds,
        dict(statuses),
        statuses[200] / seconds,
        memory,
        len(health),
        len(health) - len(took),
        quantiles(took, n=2)[0],
        max(took),
    )


async def measure(model: str, port: int, picture: bytes, rounds: int, seconds: float) -> Record:
    limits = Limits()
    found = await rows(port, picture, rounds, seconds)
    memory = [await memory_mb(port)]
    for _ in range(10):
        await load(port, 64, picture, 600, most=1000)
        memory.append(await memory_mb(port))
    most = await beyond(port, picture, MORE * limits.queue, 2 * seconds)
    size = f"JPEG of 32 × 32 pixels, {len(picture)} bytes"
    about = environment(torch.device("cpu"))
    return Record(model, size, rounds, seconds, about, limits, found, memory, most)


@contextmanager
def server(model: str) -> Iterator[int]:
    """The port of a server of its own."""
    command = [sys.executable, "-m", "sparsenet", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        found = re.search(r":(\d+);", process.stdout.readline())
        assert found, "expected the address of the server"
        yield int(found[1])
    finally:
        process.terminate()
        assert process.wait(60) == 0


def picture() -> bytes:
    """A small picture of gradients, as a JPEG."""
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)])
    file = io.BytesIO()
    image.resize((32, 32)).save(file, "JPEG")
    return file.getvalue()


def table(record: Record) -> str:
    cells = [
        {
            "clients": str(row.clients),
            "requests/s": f"{row.per_second.median:.0f}",
            "from, to": f"{row.per_second.min:.0f}, {row.per_second.max:.0f}",
            "p50 ms": f"{1000 * row.p50.median:.1f}",
            "p99 ms": f"{1000 * row.p99.median:.1f}",
            "memory MB": f"{row.memory_mb:.0f}",
        }
        for row in record.rows
    ]
    more = record.beyond
    return "\n".join(
        [
            f"{record.model}, {record.picture}; {record.rounds} rounds of {record.seconds:g} s; "
            f"{record.environment.device_name}, {record.environment.cpus} CPUs, shared with the "
            "clients",
            "",
            markdown_table(cells, {name: name for name in cells[0]}),
            "",
            f"Memory over 10,000 requests of 64 clients: {record.memory_over_10_000[0]:.0f} MB at "
            f"first, {max(record.memory_over_10_000):.0f} MB at most, "
            f"{record.memory_over_10_000[-1]:.0f} MB in the end.",
            "",
            f"{more.clients} clients, {MORE} times as many as there is room for: {more.requests:,} "
            f"requests in {more.seconds:g} s, by status {more.statuses}; "
            f"{more.answered_per_second:.0f} answered a second; memory {more.memory_mb[0]:.0f} to "
            f"{max(more.memory_mb):.0f} MB. Health was asked {more.health_checks} times and failed "
            f"{more.health_failures} times: p50 {1000 * more.health_p50:.0f} ms, at most "
            f"{1000 * more.health_max:.0f} ms.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--model", default="sparsenet_40_12", help="what is served")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of a round")
    parser.add_argument("--out", type=Path, help="a folder for serving.json and serving.md")
    args = parser.parse_args(arguments)
    with server(args.model) as port:
        record = asyncio.run(measure(args.model, port, picture(), args.rounds, args.seconds))
    text = table(record)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "serving.json", record)
        write_atomic(args.out / "serving.md", text + "\n")
    wrong = set(record.beyond.statuses) - ALLOWED or record.beyond.health_failures
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
