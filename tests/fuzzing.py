"""Mutated inputs for everything that the library reads.

A reader returns a right value or raises a ``ValueError`` whose message is one line of at most 2,000
characters that names the input. It ends within 10 seconds of work and 1.5 GiB of memory. A case is
a function of the reader's name and a seed: ``python -m tests.fuzzing --reader all --count 200``
runs many, each in a child process with these limits, and says each distinct failure once;
``--replay NAME:SEED`` repeats one with its traceback. ``test_fuzzing.py`` draws from the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import TINY, write_classes
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors

import sparsenet

SOURCES = Path(sparsenet.__file__).parent
SECONDS, WAIT = 10, 120  # of processor time for a case; of time until its process is killed
MEMORY = 3 << 29  # bytes that a case may take
LONGEST = 2000  # characters of a message
HELPERS = ("validation.py", "errors.py")  # whose callers say more

# --- JSON -----------------------------------------------------------------------------------------


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(NamedTuple):
    """An object whose keys may repeat."""

    pairs: list[tuple[str, Any]]


DEEP = 100_000
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 3.0, 0.5, -0.5, 1e308, -1e308, 5e-324, 1e-30, 10**9, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**19, 10**30, 10**400),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e400", "-0", "-0.0", "1" * 5000, "0x10", "1e9")),
)
TEXTS: tuple[Any, ...] = (
    *("", "x", " ", "0", "1", "nan", "None", "auto", "../../x", "/", "\0", "a\0b", "\ud800", "é", "e\u0301"),
    *("a\nb\r\u2028\x85c", "\x1b[2J\x1b]0;x\x07", "\u202eabc", "{}", "%s{0}", "<b>|`$(x)`", "٣", "²"),
    *("x" * 300, "x" * DEEP, "\n" * 5000, "😀" * 3000, Raw("'x'"), Raw('"\\ud83d"'), Raw('"\\x"')),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": 0}, [0] * 300, list(range(DEEP)), ["x"] * 5000),
    *({f"k{i}": i for i in range(5000)}, [[0]] * 5000, [1, "a", None, {}], Raw(""), Raw("[")),
    *(Raw("[" * DEEP), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP)),
    *(Raw("[" * 900 + "]" * 900), Raw('{"a":' * 200 + "1" + "}" * 200)),
)


def encode(value: Any) -> str:
    """JSON text, also of ``Raw`` and ``Pairs``."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        pairs = value.pairs if isinstance(value, Pairs) else value.items()
        return "{" + ", ".join(f"{encode(str(key))}: {encode(each)}" for key, each in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(encode, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**4000 else "1" + "0" * 4000
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below *value* with each of its keys."""
    found = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def mutated_json(value: Any, rng: random.Random) -> Any:
    """*value* with one to three changes, for ``encode``."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not root:
            return Raw("")
        places = [place for place in _places(root) if place[0] is not root]
        if not places or rng.random() < 0.02:
            places = [(root, 0)]
        if len(places) > 40 and rng.random() < 0.5:  # as often what lies on top
            top = [place for place in places if place[0] is root[0]]
            places = top or places
        _change(*rng.choice(places), places, rng)
    return root[0] if root else Raw("")


def _change(owner: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    value = owner[key]
    kind = rng.randrange(14)
    if kind < 3:
        owner[key] = rng.choice(NUMBERS)
    elif kind == 3:
        owner[key] = rng.choice(TEXTS)
    elif kind == 4:
        owner[key] = rng.choice(OTHERS)
    elif kind == 5:
        del owner[key]
    elif kind == 6 and isinstance(owner, dict):
        owner[rng.choice((f"{key}_", key.upper(), *TEXTS[:20])) or "x"] = owner.pop(key)
    elif kind == 7 and isinstance(value, dict):
        pairs = [*value.items(), ("a", 1)]
        pairs.insert(rng.randrange(len(pairs)), rng.choice(pairs))
        owner[key] = Pairs(pairs)
    elif kind == 8:
        owner[key] = _swapped(value)
    elif kind == 9:  # of a likely kind, in another place
        other, place = rng.choice(places)
        owner[key] = copy.deepcopy(other[place])
    elif kind == 10 and isinstance(value, int | float) and not isinstance(value, bool):
        factor = rng.choice((-1, 2, 0.5, 10, 1e6, 1e-6, 1e300, 3))
        owner[key] = type(value)(value * factor) if value and abs(value) < 1e6 else value + 1
    elif kind == 11 and isinstance(value, list):
        owner[key] = rng.choice((value[:-1], value[:1], value * 2, value * 500, value[::-1]))
    elif kind == 12 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(value))
    else:
        owner[key] = rng.choice((str(value), [value], {"a": value}, not value))


def _swapped(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list):
        return {str(index): each for index, each in enumerate(value)}
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else 0
    return float(value) if isinstance(value, int) else {}


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A JSON file near *value*, one time in eight with other bytes."""
    data = encode(mutated_json(value, rng)).encode()
    return mutated_bytes(encode(value).encode(), rng, data) if rng.random() < 0.125 else data


# --- bytes ----------------------------------------------------------------------------------------


def mutated_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """*data* with some bytes changed, cut, put in, repeated or taken from *other*."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(result) + 1)
        if rng.random() < 0.5:  # headers
            place = min(place, rng.randrange(64))
        length = rng.choice((1, 2, 4, 8, rng.randrange(1, 200)))
        kind = rng.randrange(8)
        if kind < 2 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del result[place : place + length]
        elif kind == 3:
            result[place:place] = rng.randbytes(length)
        elif kind == 4:
            result[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
        elif kind == 5:
            result[place:place] = bytes(result[place : place + length]) * rng.choice((1, 2, 50))
        elif kind == 6 and rng.random() < 0.4:
            del result[place:]
        elif kind == 7 and other:
            start = rng.randrange(len(other))
            result[place : place + length] = other[start : start + length]
    return bytes(result)


def mutated_csv(text: str, rng: random.Random) -> bytes:
    """A table with other cells, rows, columns, signs or bytes."""
    rows = list(csv.reader(io.StringIO(text)))
    for _ in range(rng.choice((1, 1, 2, 5))):
        row = rng.choice(rows) if rng.random() < 0.8 else rows[0]
        column = rng.randrange(len(row)) if row else 0
        kind = rng.randrange(10)
        if kind < 4 and row:
            cell = rng.choice((*NUMBERS, *TEXTS, f"{row[column]}0", f" {row[column]} ", "1_000", "1,5"))
            row[column] = str(cell)
        elif kind == 4 and row:
            del row[column]
        elif kind == 5:
            row.insert(column, rng.choice(("", "x", "0", '"')))
        elif kind == 6 and len(rows) > 1:
            rows.remove(row)
        elif kind == 7:
            rows.insert(rng.randrange(len(rows)), list(rng.choice(rows)))
        elif kind == 8:
            rows += [list(row) for _ in range(rng.choice((1, 300)))]
        elif kind == 9:
            for each in rows:
                each[column : column + 1] = rng.choice(([], each[column : column + 1] * 2))
    table = io.StringIO()
    delimiter = rng.choice((",", ",", ",", ";", "\t", "|"))
    csv.writer(table, delimiter=delimiter, lineterminator=rng.choice(("\n", "\r\n", "\r"))).writerows(rows)
    encoding = rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "latin-1"))
    data = table.getvalue().encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    return mutated_bytes(data, rng) if rng.random() < 0.2 else data


# --- safetensors ----------------------------------------------------------------------------------


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_tensors(header: Any, body: bytes) -> bytes:
    text = encode(header).encode()
    return len(text).to_bytes(8, "little") + text + body


DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64", "U32", "U16"),
    *("F8_E4M3", "F8_E5M2", "C64", "F4", "F6_E2M3", "F8_E8M0", "X"),
)


def mutated_header(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Another dtype, shape, place or name of a tensor, mostly such that the bytes still suffice."""
    header = copy.deepcopy(header)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    kind = rng.randrange(8)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:  # as many numbers
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1], [math.prod(entry["shape"])])
        )
    elif kind == 2:
        entry["shape"] = rng.choice(([], [0], [2**62, 4], [2**40, 2**40], [-1], [0, 2**63], [1] * 100))
    elif kind == 3:
        other = rng.choice([each for each in header if each != "__metadata__"])
        entry["data_offsets"] = rng.choice(
            (header[other]["data_offsets"], [end, start], [start, end + 1], [start, 2**63], [-1, end], [0, 0])
        )
    elif kind == 4:
        header[rng.choice(("", "x" * 5000, "a\nb", "model.x", name + ".x"))] = header.pop(name)
    elif kind == 5:
        header["__metadata__"] = rng.choice(({}, {"sparsenet": "null"}, {"sparsenet": ""}, {"a": "b"}))
    elif kind == 6:
        del header[name]
    else:
        return mutated_json(header, rng)
    return header


def mutated_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """A whole file of other tensors."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(9)
    if kind < 3:
        value = rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30, 3e38, -1e-30, 1e5))
        changed = tensor.clone()
        with contextlib.suppress(RuntimeError):
            changed.view(-1)[: rng.choice((1, changed.numel()))] = value
        tensors[name] = changed
    elif kind == 3:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
        more = (torch.complex64, torch.float8_e4m3fn, torch.int32, torch.uint64)
        tensors[name] = tensor.to(rng.choice(kinds + more))
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors[rng.choice((f"{name}.x", "x", "", "optimizer.99", "optimizer.x", "optimizer.-1"))] = tensor
    elif kind == 6:
        tensors[name] = rng.choice((tensor[None], tensor.flatten(), tensor.flatten()[:0], torch.zeros(())))
    elif kind == 7:
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensor
    return {key: each.contiguous().clone() for key, each in tensors.items()}


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A file with another description, header, tensor or other bytes."""
    kind = rng.randrange(10)
    header, body = split_tensors(data)
    metadata = header.get("__metadata__", {})
    if kind < 4 and "sparsenet" in metadata:
        text = encode(mutated_json(json.loads(metadata["sparsenet"]), rng))
        header["__metadata__"] = {**metadata, "sparsenet": text}
        return join_tensors(header, body)
    if kind < 6:
        return join_tensors(mutated_header(header, rng), body)
    if kind < 9:
        with contextlib.suppress(RuntimeError, ValueError, TypeError, KeyError):
            return serialise_tensors(mutated_tensors(parse_tensors(data), rng), metadata)
    return mutated_bytes(data, rng)


# --- cases ----------------------------------------------------------------------------------------


class Wrong(Exception):
    """A reader has returned what no right reader returns."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


class Case(NamedTuple):
    """An input that was written, what reads it, and the names of which a message has one."""

    read: Callable[[], object]
    names: Sequence[object]


class Base:
    """Valid inputs, made once and never changed."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def data(self) -> Path:
        """Two classes of six images of 8 pixels a side."""
        return write_classes(self.folder / "data")

    @cached_property
    def image(self) -> Path:
        return self.data / "ant" / "0.png"

    @cached_property
    def run(self) -> Path:
        """A run of two epochs on ``data``, with averaged weights."""
        out = self.folder / "run"
        flags = (*TINY, "--max_epoch", "2", "--batch_size", "4", "--ema", "0.9")
        arguments = ["train", "--out", str(out), "--dataset_dir", str(self.data), *flags]
        said, code = call([*arguments, "--precision", "fp32", "--implementation", "shared"])
        assert code == 0, said
        return out

    @cached_property
    def weights(self) -> Path:
        """The run as a weights file."""
        out = self.folder / "weights.safetensors"
        said, code = call(["export", str(self.run), "--format", "safetensors", "--out", str(out)])
        assert code == 0, said
        return out

    @cached_property
    def setup(self) -> Any:
        """What a resumed run prepares before it reads its checkpoint."""
        from sparsenet.data.images import drained
        from sparsenet.preparation import preparing
        from sparsenet.run import Run

        run = Run.open(self.run)
        return drained(preparing(run.config(), run.arithmetic(), run.images()))

    def copy_run(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder / "run"))


def call(arguments: Sequence[str]) -> tuple[str, int]:
    """What the program says on stderr, and its exit code."""
    from sparsenet import cli

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.run(arguments)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return said.getvalue(), code


Maker = Callable[[random.Random, Base, Path], Case]
READERS: dict[str, Maker] = {}


def reader(maker: Maker) -> Maker:
    READERS[maker.__name__] = maker
    return maker


def make_case(name: str, seed: int, base: Base, folder: Path) -> Case:
    """Writes the input of a case into *folder*."""
    return READERS[name](random.Random(f"{name}:{seed}"), base, folder)


# --- readers: settings and runs -------------------------------------------------------------------


def _json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def _check_finite(value: Any, what: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise Wrong(f"{what} has a number that is not finite") from None


def _check_config(found: Any) -> None:
    from sparsenet import config

    value = found.to_dict()
    _check_finite(value, "a configuration")
    again = config.from_dict(json.loads(json.dumps(value)), "again", config.RunConfig())
    expect(again == found, "a configuration that is read back as another")


@reader
def configuration(rng: random.Random, base: Base, folder: Path) -> Case:
    """config.json, as ``--config`` and ``--resume`` read it."""
    from sparsenet import config

    file = folder / "config.json"
    value = _json_of(base.run / "config.json")
    if rng.random() < 0.3:
        value = {"network": value["network"]}
    file.write_bytes(json_bytes(value, rng))
    return Case(lambda: _check_config(config.load(file, config.RunConfig())), [file])


@reader
def records(rng: random.Random, base: Base, folder: Path) -> Case:
    """The text files of a run folder, as tables and pages read them."""
    from sparsenet.records import read_summaries
    from sparsenet.report import write_report
    from sparsenet.run import Run
    from sparsenet.summary import markdown_table

    run = folder / "run"
    run.mkdir()
    names = ("config.json", "metrics.csv", "result.json", "environment.json", "graph.json")
    for name in names:
        shutil.copy(base.run / name, run / name)
    name = rng.choice(names)
    source = base.run / name
    if name == "metrics.csv":
        (run / name).write_bytes(mutated_csv(source.read_text(), rng))
    else:
        (run / name).write_bytes(json_bytes(_json_of(source), rng))
    if rng.random() < 0.1:
        (run / rng.choice(names)).unlink()
    draws = rng.random() < 0.15

    def read() -> None:
        rows = read_summaries([run])
        cells = [row.cells() for row in rows]
        for text in cells[0].values():
            expect(not any(word in text for word in ("nan", "inf")), f"a cell like {text[:60]!r}")
        expect(all("\n" not in line for line in markdown_table(cells).split("\n")[:-1]), "lines")
        for metrics in Run(run).metrics():
            _check_finite([*vars(metrics).values()], "metrics.csv")
        Run(run).arithmetic()
        if draws:
            write_report([run], folder / "page.html")

    return Case(read, [run / name, "page.html"])


@reader
def images(rng: random.Random, base: Base, folder: Path) -> Case:
    """images.safetensors, as ``eval`` and ``--resume`` read it."""
    from sparsenet.data.identity import differences, in_order, to_tensors
    from sparsenet.run import Run

    file = folder / "images.safetensors"
    file.write_bytes(mutated_safetensors((base.run / file.name).read_bytes(), rng))
    data = base.setup.data

    def read() -> None:
        before = Run(folder).images()
        in_order(data, before)
        differences(before, to_tensors(data))

    return Case(read, [file])


# --- readers: checkpoints -------------------------------------------------------------------------


def _mutated_checkpoint(rng: random.Random, base: Base, folder: Path, kind: str) -> Path:
    """A run folder with one checkpoint of *kind*, which half of the time agrees with its hash."""
    from sparsenet import checkpoints

    run = base.copy_run(folder)
    manifest = checkpoints.saved(run / "checkpoints", kind)[0]
    for path in (run / "checkpoints").iterdir():
        if path.stem != manifest.stem:
            path.unlink()
    tensors = manifest.with_suffix(".safetensors")
    value, data = _json_of(manifest), tensors.read_bytes()
    if rng.random() < 0.15:
        manifest.write_bytes(json_bytes(value, rng))
        return manifest
    if rng.random() < 0.1:
        tensors.write_bytes(mutated_safetensors(data, rng))
        return manifest
    if rng.random() < 0.6:  # both say the same
        identity = {key: value.pop(key) for key in ("kind", "step", "sha256")}
        value = mutated_json(value, rng)
        if rng.random() < 0.2:
            identity["step"] = rng.choice(NUMBERS)
        header, body = split_tensors(data)
        header["__metadata__"] = {"sparsenet": encode(value)}
        data = join_tensors(header, body)
        if isinstance(value, dict):
            value |= identity
    else:
        data = mutated_safetensors(data, rng)
    tensors.write_bytes(data)
    if isinstance(value, dict):
        value["sha256"] = sha256(data).hexdigest()
    manifest.write_text(encode(value))
    return manifest


def _check_predictions(trained: Any, image: Path) -> None:
    from sparsenet.predict import predict

    (prediction,) = predict(trained, [image])
    if prediction.error is None:
        _check_finite(prediction.to_dict(), "a prediction")
        total = sum(prediction.probabilities)
        expect(all(0 <= p <= 1 for p in prediction.probabilities), "no probabilities")
        expect(len(trained.classes) > 5 or abs(total - 1) < 1e-3, "probabilities without sum 1")


@reader
def best_checkpoint(rng: random.Random, base: Base, folder: Path) -> Case:
    """A checkpoint, as ``eval``, ``predict`` and ``export`` read it."""
    from sparsenet.trained import load_trained

    manifest = _mutated_checkpoint(rng, base, folder, "best")
    run = manifest.parent.parent

    def read() -> None:
        trained = load_trained(run)
        expect(trained.step is not None and trained.step >= 0, "a negative step")
        _check_predictions(trained, base.image)

    return Case(read, [run])


@reader
def last_checkpoint(rng: random.Random, base: Base, folder: Path) -> Case:
    """A checkpoint, as ``--resume`` reads it."""
    from sparsenet.run import Run
    from sparsenet.state import new_state, restore

    setup = base.setup
    manifest = _mutated_checkpoint(rng, base, folder, "last")
    run = Run.open(manifest.parent.parent)

    def read() -> None:
        state = new_state(setup)
        restore(state, setup, run)
        expect(isinstance(state.step, int) and state.step >= 0, "a negative step")
        expect(math.isfinite(state.seconds) and state.seconds >= 0, "no seconds")
        expect(len(state.rows) == state.epoch, f"{len(state.rows)} rows of {state.epoch} epochs")
        expect(state.best is None or math.isfinite(state.best), "a best that is not finite")
        expect(bool(state.losses.isfinite().all()), "losses that are not finite")
        run.write_metrics(state.rows)
        expect(run.metrics() == state.rows, "rows that metrics.csv does not give back")

    return Case(read, [run.path])


@reader
def resumed_run(rng: random.Random, base: Base, folder: Path) -> Case:
    """The program's ``--resume`` of a run folder in which one file is another."""
    if rng.random() < 0.5:
        run = _mutated_checkpoint(rng, base, folder, "last").parent.parent
    else:
        run = base.copy_run(folder)
        name = rng.choice(("config.json", "environment.json", "metrics.csv", "images.safetensors"))
        path = run / name
        if path.suffix == ".json":
            path.write_bytes(json_bytes(_json_of(path), rng))
        elif path.suffix == ".csv":
            path.write_bytes(mutated_csv(path.read_text(), rng))
        else:
            path.write_bytes(mutated_safetensors(path.read_bytes(), rng))
    return Case(lambda: check_call(["train", "--resume", str(run), "--max_epoch", "3"]), [])


def check_call(arguments: Sequence[str]) -> None:
    said, code = call(arguments)
    expect(code in (0, 1, 2), f"exit code {code}")
    if code == 2:
        expect(said.startswith("sparsenet: ") and said.count("\n") == 1, f"not one line: {said[:300]!r}")
        expect(len(said) <= LONGEST, f"a message of {len(said)} characters: {said[:150]!r}")
        expect(said[:-1].isprintable(), f"a message that cannot be printed: {said[:100]!r}")


# --- readers: weights -----------------------------------------------------------------------------


@reader
def weights_file(rng: random.Random, base: Base, folder: Path) -> Case:
    """A weights file, as every command reads it."""
    from sparsenet.trained import load_trained

    file = folder / "weights.safetensors"
    file.write_bytes(mutated_safetensors(base.weights.read_bytes(), rng))
    return Case(lambda: _check_predictions(load_trained(file), base.image), [file])


# --- the program ----------------------------------------------------------------------------------


class Hang(BaseException):
    """A case has used up its time."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def judge(case: Case) -> str | None:
    """Reads a case; what was wrong in a few words, ``None`` where nothing was."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        problem = _judge(case)
    if problem is None and warned:
        return f"warning: {warned[0].category.__name__}: {str(warned[0].message)[:80]}"
    return problem


def _judge(case: Case) -> str | None:
    try:
        case.read()
    except Wrong as wrong:
        return f"wrong value: {wrong}"
    except ValueError as error:
        return _problem_of_message(error, case.names)
    except (Hang, Exception) as error:  # noqa: BLE001 - all of them are findings
        kind = "hang" if isinstance(error, Hang) else f"{type(error).__name__}"
        return f"{kind} at {_own_line(error)}: {_short(error)}"
    return None


def _problem_of_message(error: ValueError, names: Sequence[object]) -> str | None:
    message, place = str(error), _own_line(error)
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) or "allocate memory" in str(chain):
            return f"memory at {_own_line(chain)}: {_short(error)}"
        chain = chain.__cause__ or chain.__context__
    if len(message) > LONGEST:
        return f"{len(message):,} characters at {place}: {_short(error)}"
    if len(message.splitlines()) != 1:
        return f"{len(message.splitlines())} lines at {place}: {_short(error)}"
    if names and not any(str(name) in message for name in names):
        return f"names no file at {place}: {_short(error)}"
    return None


def _short(error: BaseException) -> str:
    return repr(str(error)[:240])


def _own_line(error: BaseException) -> str:
    """The innermost line of the library in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if str(SOURCES) in frame.filename]
    own = [frame for frame in own if Path(frame.filename).name not in HELPERS] or frames[-1:]
    if not own:
        return "?"
    path = Path(own[-1].filename)
    shown = path.relative_to(SOURCES) if path.is_relative_to(SOURCES) else path.name
    return f"{shown}:{own[-1].lineno}"


def distinct(problem: str) -> str:
    """What two problems of one cause have in common."""
    key = problem.partition(": ")[0] if " at " in problem else problem[:90]
    return re.sub(r"^[\d,]+ ", "", key)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _work(name: str, seeds: Sequence[int], base: Base, folder: Path, pipe: int) -> None:
    """Runs cases in this process, which ends with them, and tells each of its pipe."""
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _hang)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for seed in seeds:
        os.write(pipe, f"begin {seed}\n".encode())
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        case = make_case(name, seed, base, folder)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            problem = judge(case)
        except Hang:
            problem = "hang at an end"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        line = json.dumps([seed, problem]).encode()
        os.write(pipe, b"end " + line[:3500] + b"\n")


def run_cases(name: str, seeds: Sequence[int], base: Base, folder: Path) -> Iterator[tuple[int, str | None]]:
    """Each seed with the problem of its case, or ``None``, from child processes."""
    rest = list(seeds)
    while rest:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            try:
                _work(name, rest[:100], base, folder, write_end)
                os._exit(0)
            except BaseException:
                os.write(write_end, b"fault " + traceback.format_exc().encode()[-3000:].replace(b"\n", b"\\n") + b"\n")
                os._exit(70)
        os.close(write_end)
        current, buffer = rest[0], b""
        killed = False
        while True:
            ready, _, _ = select.select([read_end], [], [], WAIT)
            if not ready:
                os.kill(child, signal.SIGKILL)
                killed = True
                break
            data = os.read(read_end, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                word, _, text = line.decode().partition(" ")
                if word == "begin":
                    current = int(text)
                elif word == "fault":
                    print("fault of the fuzzer:", name, current, text.replace("\\n", "\n"), file=sys.stderr)
                else:
                    seed, problem = json.loads(text)
                    rest.remove(seed)
                    current = -1
                    yield seed, problem
        os.close(read_end)
        _, status = os.waitpid(child, 0)
        if status and current in rest:
            rest.remove(current)
            death = "hang" if killed else f"process ended by {status & 127 or status >> 8}"
            yield current, f"{death} at an unknown line"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", default="all", help=f"all, or of {', '.join(READERS)}")
    parser.add_argument("--count", type=int, default=200, help="cases of each reader")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that failed")
    parser.add_argument("--replay", metavar="READER:SEED", help="one case, with its traceback")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as name:
        base = Base(Path(name) / "base")
        base.folder.mkdir()
        if args.replay:
            _replay(args.replay, base, Path(name))
            return
        names = list(READERS) if args.reader == "all" else args.reader.split(",")
        failed = 0
        for each in names:
            failed += _fuzz(each, args, base, Path(name))
    sys.exit(1 if failed else 0)


def _replay(what: str, base: Base, folder: Path) -> None:
    name, _, seed = what.rpartition(":")
    place = folder / "case"
    place.mkdir()
    case = make_case(name, int(seed), base, place)
    print("\n".join(str(path) for path in sorted(place.rglob("*")) if path.is_file()))
    os.chdir(place)
    print(judge(case))
    case.read()


def _fuzz(name: str, args: argparse.Namespace, base: Base, folder: Path) -> int:
    began = time.monotonic()
    trial = folder / "trial"
    trial.mkdir()
    make_case(name, 0, base, trial)  # the base is made here and not in each child
    shutil.rmtree(trial)
    found: Counter[str] = Counter()
    place = folder / "case"
    for seed, problem in run_cases(name, range(args.seed, args.seed + args.count), base, place):
        if problem is None:
            continue
        key = distinct(problem)
        found[key] += 1
        if found[key] == 1:
            print(f"{name}:{seed}: {problem}", flush=True)
            if args.keep:
                kept = args.keep / f"{name}-{seed}"
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir(parents=True)
                make_case(name, seed, base, kept)
    seconds = time.monotonic() - began
    print(f"{name}: {args.count} cases, {len(found)} distinct failures, {seconds:.0f} s", flush=True)
    for key, count in found.most_common():
        print(f"    {count:5d} {key}")
    return len(found)


if __name__ == "__main__":
    main()
