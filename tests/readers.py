"""Everything that the library reads, each with what makes inputs for it (``fuzzing.py``)."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import yaml
from conftest import CPU, TINY, write_classes
from mutators import (
    NUMBERS,
    TEXTS,
    ParquetTable,
    encode,
    join_tensors,
    json_bytes,
    mutated_bytes,
    mutated_csv,
    mutated_image,
    mutated_json,
    mutated_pickle,
    mutated_safetensors,
    mutated_tail,
    mutated_tar,
    mutated_tensors,
    pictures,
    split_tensors,
)
from test_data_archives import KINDS, Cifar
from torch import nn

from sparsenet import checkpoints, cli, config, flags, weights
from sparsenet.adoption import adopt
from sparsenet.adoption import state_dict as adoption
from sparsenet.architecture import Architecture
from sparsenet.data.config import DataConfig
from sparsenet.data.errors import BadImage
from sparsenet.data.identity import differences, in_order, to_tensors
from sparsenet.data.images import drained, read_image
from sparsenet.data.load import load_dataset
from sparsenet.data.preprocessing import Form, channel_statistics
from sparsenet.data.unpickle import load_pickle
from sparsenet.downloads import DownloadError, download
from sparsenet.files import cache_folder, read_json
from sparsenet.model import SparseNet
from sparsenet.ops import compiler, measured
from sparsenet.predict import predict
from sparsenet.preparation import preparing
from sparsenet.records import read_summaries
from sparsenet.report import write_report
from sparsenet.run import Run
from sparsenet.state import new_state, restore
from sparsenet.summary import markdown_table
from sparsenet.texts import printable
from sparsenet.trained import load_trained

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import readme_tables
from benchmarks.bench import tables
from benchmarks.bench.record import Record

LONGEST = 2000  # characters of a message

# --- cases ----------------------------------------------------------------------------------------


class Wrong(Exception):
    """A reader has returned what no right reader returns."""


class Refused(Exception):
    """The program has refused an input in one line, as it should."""


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

        run = Run.open(self.run)
        return drained(preparing(run.config(), run.arithmetic(), run.images()))

    @cached_property
    def cifars(self) -> dict[str, Cifar]:
        return {kind: Cifar(kind) for kind in KINDS}

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Image files of every format and of many modes, by their names."""
        return pictures()

    @cached_property
    def kernels(self) -> Path:
        return cache_folder() / "kernels"

    @cached_property
    def port(self) -> int:
        """That of a server in this process, which children ask."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
        Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    def copy_run(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder / "run"))


def call(arguments: Sequence[str]) -> tuple[str, int]:
    """What the program says on stderr, and its exit code."""

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

    value = found.to_dict()
    _check_finite(value, "a configuration")
    again = config.from_dict(json.loads(json.dumps(value)), "again", config.RunConfig())
    expect(again == found, "a configuration that is read back as another")


@reader
def configuration(rng: random.Random, base: Base, folder: Path) -> Case:
    """config.json, as ``--config`` and ``--resume`` read it."""

    file = folder / "config.json"
    value = _json_of(base.run / "config.json")
    if rng.random() < 0.3:
        value = {"network": value["network"]}
    file.write_bytes(json_bytes(value, rng))
    return Case(lambda: _check_config(config.load(file, config.RunConfig())), [file])


@reader
def yaml_configuration(rng: random.Random, base: Base, folder: Path) -> Case:
    """Settings in YAML, as ``--config`` reads them."""

    file = folder / "settings.yaml"
    value = _json_of(base.run / "config.json")
    if rng.random() < 0.5:
        file.write_bytes(json_bytes(value, rng))
    else:
        data = yaml.safe_dump(value, default_flow_style=rng.choice((None, False))).encode()
        file.write_bytes(mutated_bytes(data, rng))
    return Case(lambda: _check_config(config.load(file, config.RunConfig())), [file])


@reader
def records(rng: random.Random, base: Base, folder: Path) -> Case:
    """The text files of a run folder, as tables and pages read them."""

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
        for key in ("error", "train_seconds", "test_seconds", "duration", "peak_memory_mb", "macs"):
            text = cells[0][key]
            expect("nan" not in text and "inf" not in text, f"a cell {key} like {text[:60]!r}")
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

    (prediction,) = predict(trained, [image])
    if prediction.error is None:
        _check_finite(prediction.to_dict(), "a prediction")
        total = sum(prediction.probabilities)
        expect(all(0 <= p <= 1 for p in prediction.probabilities), "no probabilities")
        expect(len(trained.classes) > 5 or abs(total - 1) < 1e-3, "probabilities without sum 1")


@reader
def best_checkpoint(rng: random.Random, base: Base, folder: Path) -> Case:
    """A checkpoint, as ``eval``, ``predict`` and ``export`` read it."""

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

    setup = base.setup
    manifest = _mutated_checkpoint(rng, base, folder, "last")
    run = Run.open(manifest.parent.parent)

    def read() -> None:
        state = new_state(setup)
        restore(state, setup, run)
        expect(isinstance(state.step, int) and state.step >= 0, "a negative step")
        expect(math.isfinite(state.seconds) and state.seconds >= 0, "no seconds")
        expect(len(state.rows) <= state.epoch, "another number of rows than of epochs")
        expect(state.best is None or math.isfinite(state.best), "a best that is not finite")
        expect(bool(state.losses.isfinite().all()), "losses that are not finite")
        momenta, parameters = state.optimizer.state, list(state.model.parameters())
        expect(len(momenta) in (0, len(parameters)), "momenta of some parameters only")
        run.write_metrics(state.rows)
        expect(run.metrics() == state.rows, "rows that metrics.csv does not give back")

    return Case(read, [run.path])


def _mutated_run(
    rng: random.Random, base: Base, folder: Path, kind: str, names: Sequence[str]
) -> Path:
    """A run folder with another checkpoint of *kind*, or with another of the files *names*."""
    if rng.random() < 0.5:
        return _mutated_checkpoint(rng, base, folder, kind).parent.parent
    run = base.copy_run(folder)
    _mutate_file(run / rng.choice(names), rng)
    return run


@reader
def resumed_run(rng: random.Random, base: Base, folder: Path) -> Case:
    """The program's ``--resume`` of a run folder in which one file is another."""
    names = ("config.json", "environment.json", "metrics.csv", "images.safetensors")
    run = _mutated_run(rng, base, folder, "last", names)
    return Case(lambda: check_call(["train", "--resume", str(run), "--max_epoch", "3"]), [])


@reader
def configured_run(rng: random.Random, base: Base, folder: Path) -> Case:
    """The program's ``--config``: what is accepted trains for an epoch, as the flags say."""
    file = folder / "config.json"
    value = _json_of(base.run / "config.json")
    for component in ("optim", "train", "data"):
        if rng.random() < 0.3:
            value.pop(component)
    file.write_text(encode(mutated_json(value, rng)))
    flags = ["--dataset_dir", str(base.data), "--max_epoch", "1", "--time_limit", "3"]
    return Case(lambda: check_call(["train", "--config", str(file), "--out", "out", *flags]), [])


@reader
def used_run(rng: random.Random, base: Base, folder: Path) -> Case:
    """The other commands on a run folder in which one file is another."""
    run = _mutated_run(rng, base, folder, "best", ("config.json", "images.safetensors"))
    place = str(run)
    data = rng.choice(([], ["--dataset_dir", str(base.data)]))
    call = rng.choice(
        (
            ["eval", place, *data],
            ["eval", place, "--json", "--split", "train"],
            ["predict", place, str(base.image), "--json"],
            ["export", place, "--format", "safetensors", "--out", "x.safetensors", *data],
            ["report", place, "--filters", "--out", "page.html"],
        )
    )
    return Case(lambda: check_call(call), [])


def _mutate_file(path: Path, rng: random.Random) -> None:
    if path.suffix == ".json":
        path.write_bytes(json_bytes(_json_of(path), rng))
    elif path.suffix == ".csv":
        path.write_bytes(mutated_csv(path.read_text(), rng))
    else:
        path.write_bytes(mutated_safetensors(path.read_bytes(), rng))


@reader
def shipped_weights(rng: random.Random, base: Base, folder: Path) -> Case:
    """The index of the weights that come with the package."""
    data = base.weights.read_bytes()
    (folder / "tiny.safetensors").write_bytes(data)
    value = {"tiny": sha256(data).hexdigest(), "other": "0" * 64}
    (folder / "index.json").write_bytes(json_bytes(value, rng))

    def read() -> None:
        before, weights.SHIPPED = weights.SHIPPED, folder
        try:
            weights.load("tiny")
        finally:
            weights.SHIPPED = before

    return Case(read, [folder / "index.json", folder / "tiny.safetensors", "tiny: expected"])


def check_call(arguments: Sequence[str]) -> None:
    said, code = call(arguments)
    expect(code in (0, 1, 2), f"exit code {code}")
    if code == 2:
        expect(
            said.startswith("sparsenet: ") and said.count("\n") == 1,
            f"not one line: {said[:300]!r}",
        )
        longest = LONGEST + len(" ".join(arguments))  # which a message may repeat
        expect(len(said) <= longest, f"a long message: {len(said)} characters, {said[:150]!r}")
        expect(
            printable(said[:-1]) == said[:-1], f"a message that cannot be printed: {said[:100]!r}"
        )
        raise Refused


# --- readers: weights -----------------------------------------------------------------------------


@reader
def weights_file(rng: random.Random, base: Base, folder: Path) -> Case:
    """A weights file, as every command reads it."""

    file = folder / "weights.safetensors"
    file.write_bytes(mutated_safetensors(base.weights.read_bytes(), rng))
    return Case(lambda: _check_predictions(load_trained(file), base.image), [file])


@reader
def hub_folder(rng: random.Random, base: Base, folder: Path) -> Case:
    """A folder as the Hugging Face hub has it, whose parts may say different things."""
    about = json.loads(msgspec.json.encode(load_trained(base.weights).about))
    content = base.weights.read_bytes()
    if rng.random() < 0.2:
        content = mutated_safetensors(content, rng)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_bytes(json_bytes(about, rng))
    return Case(
        lambda: _check_predictions(load_trained(folder), base.image),
        [folder, folder / "config.json"],
    )


# --- readers: data --------------------------------------------------------------------------------


def _check_data(config: DataConfig) -> None:
    """Loads the data; each image has one label, of a class that has a name."""
    data = load_dataset(config)
    expect(len(set(data.classes)) == len(data.classes) >= 2, "no classes of their own")
    parts = {"train": data.train, "val": data.val, "test": data.test}
    for name, part in parts.items():
        if part is not None:
            expect(len(part.pixels) == len(part.labels) == len(data.ids[name]) > 0, "other lengths")
            low, high = int(part.labels.min()), int(part.labels.max())
            expect(0 <= low <= high < len(data.classes), "a label without a class")
            expect(part.pixels.shape[1:] == data.train.pixels.shape[1:], "images of other shapes")
    mean, std = channel_statistics(data.train)
    _check_finite([*mean, *std], "a statistic")


@reader
def parquet(rng: random.Random, base: Base, folder: Path) -> Case:
    """Parquet files in odd layouts, one time in three with other bytes."""
    root = folder / "flowers"
    root.mkdir()
    names = rng.choice(
        (("train",), ("train", "test"), ("train-00000-of-00002", "train-00001-of-00002"))
    )
    table = ParquetTable(rng, base.pictures)
    for name in names:
        path = root / f"{name}.parquet"
        table.write(path, rng)
        if rng.random() < 0.3:
            path.write_bytes(mutated_bytes(path.read_bytes(), rng))
        elif rng.random() < 0.15:
            path.write_bytes(mutated_tail(path.read_bytes(), rng))
    options = {"image_column": "image"} if rng.random() < 0.2 else {}
    options |= {"label_column": "label"} if rng.random() < 0.2 else {}
    config = DataConfig(
        dataset_dir=str(root), skip_corrupt=rng.random() < 0.5, image_size=8, **options
    )
    return Case(
        lambda: _check_data(config), [root, "--dataset_dir", "--image_column", "--label_column"]
    )


@reader
def tar_shards(rng: random.Random, base: Base, folder: Path) -> Case:
    """Tar files of samples, of which some lack a part, half the time with other bytes."""
    root = folder / "flowers"
    root.mkdir()
    pictures = sorted(base.data.rglob("*.png"))
    form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    for name in rng.choice((("train",), ("train-000000", "train-000001"), ("x-train", "x-val"))):
        with tarfile.open(root / f"{name}.tar", "w", format=form) as tar:
            for number in range(rng.randrange(2, 9)):
                key = rng.choice((f"{number}", f"a/{number}", f"{number}" + "é" * 200))
                picture = rng.choice(pictures).read_bytes()
                odd = (b" 1\n", b"ant", b"", b"-1", b"\xff")
                label = rng.choice((b"0", b"1") if rng.random() < 0.95 else odd)
                for suffix, content in (("png", picture), ("cls", label), ("json", b"{}")):
                    if rng.random() < 0.98:
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        if rng.random() < 0.3:
            file = root / f"{name}.tar"
            file.write_bytes(mutated_bytes(file.read_bytes(), rng))
    config = DataConfig(
        dataset="tar", dataset_dir=str(root), skip_corrupt=rng.random() < 0.5, image_size=8
    )
    return Case(lambda: _check_data(config), [root, "--dataset_dir"])


@reader
def labels_csv(rng: random.Random, base: Base, folder: Path) -> Case:
    """A CSV file of labels."""
    columns = rng.choice(
        (("image", "label"), ("id", "class"), ("file", "a", "b"), ("file", "x", "label", "split"))
    )
    lines = [",".join(columns)]
    for index, path in enumerate(sorted(base.data.rglob("*.png"))):
        cells = {"label": path.parent.name, "class": path.parent.name, "x": str(index)}
        cells |= {
            "a": str(int(index < 6)),
            "b": str(int(index >= 6)),
            "split": ("train", "test")[index % 2],
        }
        name = str(path.relative_to(base.data))
        lines.append(",".join(cells.get(column, name) for column in columns))
    file = folder / "labels.csv"
    file.write_bytes(mutated_csv("\n".join(lines), rng))
    config = DataConfig(
        dataset_dir=str(base.data), labels=str(file), skip_corrupt=rng.random() < 0.5, image_size=8
    )
    return Case(lambda: _check_data(config), [file, base.data, "--label_column", "--dataset_dir"])


@reader
def cifar(rng: random.Random, base: Base, folder: Path) -> Case:
    """An archive, packed or unpacked, of pickles or of records."""
    kind = rng.choice(KINDS)
    valid = base.cifars[kind]
    files = dict(valid.files)
    if rng.random() < 0.8:
        name = rng.choice(sorted(files))
        is_pickle = not valid.binary
        files[name] = (mutated_pickle if is_pickle else mutated_bytes)(files[name], rng)
    changed = copy.copy(valid)
    changed.files = files
    if rng.random() < 0.4:
        path = changed.unpack(folder)
    else:
        path = folder / changed.archive
        path.write_bytes(mutated_tar(files, changed.folder, rng))
    config = DataConfig(dataset=changed.dataset, dataset_dir=str(folder))
    return Case(lambda: _check_data(config), [path, "--dataset_dir"])


@reader
def pickles(rng: random.Random, base: Base, folder: Path) -> Case:
    """The reader of pickles alone."""
    values = {b"data": np.zeros((2, 4), np.uint8), b"labels": [0, 1], "names": ("a", {1: 2.0})}
    data = mutated_pickle(pickle.dumps(values, rng.randrange(5)), rng)
    (folder / "data.pickle").write_bytes(data)

    def read() -> None:
        loaded = load_pickle(data, "data.pickle")
        expect(isinstance(loaded, dict), "no dictionary")
        kinds = (int, float, str, bytes, list, tuple, dict, set, frozenset, np.ndarray, type(None))
        for value in loaded.values():
            expect(isinstance(value, kinds), f"a {type(value).__name__}")

    return Case(read, ["data.pickle"])


@reader
def image_files(rng: random.Random, base: Base, folder: Path) -> Case:
    """A folder of classes in which one image is another."""
    root = Path(shutil.copytree(base.data, folder / "insects"))
    name = rng.choice(sorted(base.pictures))
    data = base.pictures[name]
    other = base.pictures[rng.choice(sorted(base.pictures))]
    path = root / "ant" / f"9{Path(name).suffix}"
    path.write_bytes(mutated_image(data, other, rng))
    size, channels = rng.choice((0, 8, 20)), rng.choice((0, 1, 3))
    skip = rng.random() < 0.5
    config = DataConfig(
        dataset_dir=str(root),
        image_size=size,
        in_chans=channels,
        skip_corrupt=skip,
        max_megapixels=4,
    )

    def read() -> None:
        _check_data(config)
        form = Form(size or 8, channels or 3, (0.0, 65535.0), max_megapixels=4)
        first = read_image(path, form)
        again = read_image(path.read_bytes(), form, "x")
        expect(first.shape == form.shape, "another shape")
        expect(bool((first == again).all()), "another picture the second time")

    def tolerant() -> None:
        with contextlib.suppress(BadImage):
            read()
        _check_data(config)  # the other images are there

    return Case(tolerant if skip else read, [path, "--dataset_dir"])


NAMES = (
    "ant", "bee", "train", "test", "val", "Training", "trainset", "data", "a b", "é", "e\u0301",
    "Ant", "x\ny", "\x1b[2J", "\udcff", "#1", "-x", "a'b", "x" * 200, "nul", "[a]", "*", "\u202e",
    "__MACOSX", ".h",
)  # fmt: skip


@reader
def folder_tree(rng: random.Random, base: Base, folder: Path) -> Case:
    """Folders, links, pipes and files of odd names."""
    root = folder / rng.choice(("insects", "x\ny", "[a]", "a b"))
    pictures = sorted(base.data.rglob("*.png"))
    places = [root]
    root.mkdir()
    for _ in range(rng.randrange(2, 12)):
        place = rng.choice(places)
        path = place / rng.choice(NAMES)
        with contextlib.suppress(OSError):
            kind = rng.randrange(10)
            if kind < 6:
                path.mkdir()
                places.append(path)
                for number in range(rng.choice((0, 1, 2, 4))):
                    shutil.copy(rng.choice(pictures), path / f"{number}.png")
            elif kind == 6:
                path.symlink_to(rng.choice((root, place, path, Path("/nowhere"), base.data)))
            elif kind == 7:
                os.mkfifo(path.with_suffix(rng.choice((".png", ".parquet", ".csv", ""))))
            elif kind == 8:
                file = path.with_suffix(rng.choice((".png", ".parquet", ".txt", ".heic", "")))
                with file.open("xb") as stream:
                    begins = (b"", b"x", b"\xff\xd8\xff", b"II*\0" * 5, pictures[0].read_bytes())
                    stream.write(rng.choice(begins))
            else:
                os.link(rng.choice(pictures), path.with_suffix(".png"))
    dataset = rng.choice(("auto", "auto", "folder", "parquet", "c10"))
    config = DataConfig(dataset=dataset, dataset_dir=str(root), skip_corrupt=rng.random() < 0.5)
    shown = " ".join(str(root).splitlines())
    return Case(lambda: _check_data(config), [shown, "--dataset_dir"])


# --- readers: caches and downloads ----------------------------------------------------------------


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    before = os.environ["XDG_CACHE_HOME"]
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ["XDG_CACHE_HOME"] = before


@reader
def timing_cache(rng: random.Random, base: Base, folder: Path) -> Case:
    """A kept measurement; a damaged one is measured anew and nothing else."""
    names = ["native", "shared", "reference"]
    conditions = measured._conditions(CPU, torch.float32, names)
    seconds = {name: 0.1 * place for place, name in enumerate(names, 1)}
    with cache_in(folder):
        file = measured._file(conditions)
        measured._write(conditions, measured.Timings(seconds, dict(seconds)))
        file.write_bytes(json_bytes(_json_of(file), rng))

    def read() -> None:
        with cache_in(folder):
            found = measured._read(conditions)
        if found is not None:
            for each in (found.training, found.inference):
                expect(
                    set(each) <= set(names), "a time of an implementation that was not asked for"
                )
                _check_finite(each, "a time")
                if each:
                    measured.describe_speedup(measured.fastest(each), each)
            expect(bool(found.training) == bool(found.inference), "times of training alone")

    return Case(read, ["no error"])


@reader
def decoded_images(rng: random.Random, base: Base, folder: Path) -> Case:
    """Images that were decoded before; whatever became of their files, they are the same."""
    with cache_in(folder):
        for data in (base.data, base.image.parent.parent):
            load_dataset(DataConfig(dataset_dir=str(data), image_size=8, cache="disk"))
    files = [file for file in folder.rglob("*") if file.name in ("pixels", "rows", "whole")]
    for file in rng.sample(files, rng.randrange(1, 4)):
        times = file.stat()
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))
        if file.name == "whole" or rng.random() < 0.5:
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + rng.randrange(2)))

    def read() -> None:
        found = {}
        for cache in ("memory", "disk"):
            with cache_in(folder):
                config = DataConfig(dataset_dir=str(base.data), image_size=8, cache=cache)
                data = load_dataset(config)
            found[cache] = data.train.pixels, data.train.labels, data.ids["train"]
        expect(all(map(torch.equal, *found.values())), "other images than there are")

    return Case(read, ["no error"])


@reader
def kernel_cache(rng: random.Random, base: Base, folder: Path) -> Case:
    """A kept library that is no longer what its name says is removed, never loaded."""
    place = folder / "sparsenet" / "kernels"
    place.mkdir(parents=True, mode=0o700)
    content = next(base.kernels.glob("native-*.so")).read_bytes()
    path = place / compiler._name("0123456789abcdef", content)
    kind = rng.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(rng.choice((path, Path("/nowhere"), Path("/dev/zero"), place)))
    else:
        path.write_bytes(mutated_bytes(content, rng, b"\x7fELF" + b"\0" * 60) + b"x")

    def read() -> None:
        with cache_in(folder):
            expect(compiler._cached("0123456789abcdef") is None, "a library that is another")

    return Case(read, ["no error"])


@reader
def cached_weights(rng: random.Random, base: Base, folder: Path) -> Case:
    """A kept download whose name has its hash, right half of the time; there is no network."""
    address = "https://127.0.0.1:9/weights.safetensors"
    data = mutated_safetensors(base.weights.read_bytes(), rng)
    digest = sha256(data if rng.random() < 0.5 else b"").hexdigest()
    place = folder / "sparsenet" / "weights"
    place.mkdir(parents=True)
    (place / f"{sha256(address.encode()).hexdigest()[:32]}-{digest}.safetensors").write_bytes(data)

    def read() -> None:
        with cache_in(folder):
            weights.load(address)

    return Case(read, [address])


class _Server(BaseHTTPRequestHandler):
    """Answers as a valid server does, but for what the path says."""

    content = bytes(range(256)) * 40

    def do_GET(self) -> None:
        rng = random.Random(self.path)
        begun = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(begun[1]) if begun else 0
        body = self.content[start:]
        status = rng.choice((200, 206, 206, 206 if start else 200, 404, 416, 500, 302, 204))
        body = self.content if status == 200 else body
        odd = str(rng.choice((*NUMBERS[:25], "", "x", "1,2", "٣", "+5", "1_0")))
        length = rng.choice((str(len(body)),) * 3 + (odd, None))
        content_range = rng.choice(
            (f"bytes {start}-{len(self.content) - 1}/{len(self.content)}",) * 3 + (odd, None)
        )
        location = rng.choice(
            ("http://127.0.0.1:9/", "/elsewhere", "file:///etc/passwd", "ftp://x", "x:" + odd)
        )
        self.send_response_only(status)
        if length is not None:
            self.send_header("Content-Length", length.encode("ascii", "replace").decode())
        if content_range is not None and status == 206:
            self.send_header("Content-Range", content_range.encode("ascii", "replace").decode())
        if status == 302:
            self.send_header("Location", location.encode("ascii", "replace").decode())
        self.end_headers()
        cut = rng.choice((len(body),) * 3 + (rng.randrange(len(body) + 1),))
        with contextlib.suppress(OSError):
            self.wfile.write(body[:cut] + rng.choice((b"", b"", b"", b"more")))

    def log_message(self, *arguments: object) -> None:
        pass


@reader
def downloads(rng: random.Random, base: Base, folder: Path) -> Case:
    """A file from a server that errs, and the ``.part`` of an earlier try."""
    target = folder / "file"
    part = folder / "file.part"
    content = _Server.content
    kind = rng.randrange(7)
    if kind < 3:
        part.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == 3:
        part.write_bytes(rng.randbytes(rng.choice((1, 20_000))))
    elif kind == 4:
        rng.choice((part.mkdir, lambda: os.mkfifo(part), lambda: part.symlink_to(part)))()
    url = f"http://127.0.0.1:{base.port}/{rng.randrange(10**9)}"
    digest = f"sha256={sha256(content).hexdigest()}"

    def read() -> None:
        try:
            found = download(url, target, digest, 1 << 20, 5.0)
        except (DownloadError, OSError):
            return
        expect(found.read_bytes() == content, "another file")

    return Case(read, [])


# --- readers: other libraries' networks -----------------------------------------------------------

DENSE = Architecture(
    "dense",
    blocks=(1, 2),
    growth_rate=4,
    bottleneck=True,
    stem="imagenet",
    stem_width=8,
    num_classes=3,
)


@reader
def state_dict(rng: random.Random, base: Base, folder: Path) -> Case:
    """A state dict of torchvision's DenseNet."""
    model = SparseNet(DENSE, "reference")
    names = adoption.torchvision_names(DENSE)
    tensors: dict[Any, Any] = {
        source: torch.rand(shape) for _, source, shape in adoption._renamed(model, names)
    }
    if rng.random() < 0.7:
        tensors = mutated_tensors(tensors, rng)
    else:
        key = rng.choice(sorted(tensors))
        tensors[key] = rng.choice(
            (
                *(None, 1.0, "x", [1.0], np.ones(3), tensors[key].numpy()),
                *(tensors[key].to("meta"), tensors[key].to_sparse(), nn.Parameter(tensors[key])),
            )
        )
        if rng.random() < 0.3:
            tensors[rng.choice((None, 3, ("a",), ""))] = tensors.pop(key)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def read() -> None:
        try:
            adoption.load_torchvision(model, tensors)
        except ValueError:
            after = model.state_dict()
            expect(
                all(torch.equal(after[name], before[name]) for name in before), "half a state dict"
            )
            raise

    return Case(read, ["torchvision weights"])


@reader
def adopted_module(rng: random.Random, base: Base, folder: Path) -> Case:
    """A module that is nearly a DenseNet."""
    module = densenet(rng.choice((nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2, 1), nn.AvgPool2d(2))))
    places = [name for name, each in module.named_modules() if name and not list(each.children())]
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice([name for name in places if name in dict(module.named_modules())])
        owner, _, last = name.rpartition(".")
        parent, leaf = module.get_submodule(owner), module.get_submodule(name)
        kind = rng.randrange(5)
        if kind == 0:
            replaced = (nn.Identity(), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.Flatten())
            parent._modules[last] = rng.choice(replaced)
        elif kind == 1:
            parent._modules.pop(last, None)
        elif kind == 2:
            attribute = rng.choice(
                ("kernel_size", "stride", "padding", "eps", "momentum", "inplace", "groups")
            )
            setattr(leaf, attribute, rng.choice((0, 1, 2, None, (1, 2), -1, 1e-3, "x", [1], True)))
        elif kind == 3 and getattr(leaf, "weight", None) is not None:
            value = rng.choice(
                (leaf.weight.data[:1], leaf.weight.data.double(), leaf.weight.data * math.nan)
            )
            leaf.weight = nn.Parameter(value)
        elif kind == 4:
            leaf.register_buffer("more", torch.ones(2))

    def read() -> None:
        with warnings.catch_warnings():  # that says what is not quite the same
            warnings.filterwarnings("ignore", "adopt: ")
            adopt(module, "reference")

    return Case(read, ["adopt", "_" * 30] if places else [])


def densenet(pool: nn.Module) -> nn.Module:
    """A DenseNet-BC of two stages as torchvision makes it."""

    class Layer(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm1, self.relu1 = nn.BatchNorm2d(width), nn.ReLU()
            self.conv1 = nn.Conv2d(width, 16, 1, bias=False)
            self.norm2, self.relu2 = nn.BatchNorm2d(16), nn.ReLU()
            self.conv2 = nn.Conv2d(16, 4, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
            return torch.cat([x, new], 1)

    stem = (
        nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )
    transition = (
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1, bias=False),
        nn.AvgPool2d(2, 2),
    )
    head = (nn.BatchNorm2d(14), nn.ReLU(), pool, nn.Flatten(), nn.Linear(14, 3))
    return nn.Sequential(*stem, Layer(8), *transition, Layer(6), Layer(10), *head)


# --- readers: the laboratory and the program ------------------------------------------------------


@reader
def bench_record(rng: random.Random, base: Base, folder: Path) -> Case:
    """A record of the benchmark, as its tables and the README's read it."""
    sources = sorted((Path(__file__).parents[1] / "results" / "bench").rglob("*.json"))
    file = folder / "bench.json"
    file.write_bytes(json_bytes(_json_of(rng.choice(sources)), rng))

    def read() -> None:
        expect(bool(tables.report(read_json(file, Record))), "no line")
        readme_tables.read_steps([folder])

    return Case(read, [file])


@reader
def predicted_files(rng: random.Random, base: Base, folder: Path) -> Case:
    """The program's ``predict`` on files that are nearly images, and names that are none."""
    paths = []
    for number in range(rng.choice((1, 2, 4))):
        name = rng.choice(sorted(base.pictures))
        odd = rng.choice(("", "x\ny", "[a]", "é"))
        path = folder / f"{number}{odd}{Path(name).suffix}"
        path.write_bytes(mutated_image(base.pictures[name], b"", rng))
        paths.append(str(path))
    if rng.random() < 0.3:
        paths.append(
            rng.choice((*TEXTS[1:8], *TEXTS[10:20], "**", "[", "~nobody/x", "x" * 5000, "\0"))
        )
    start = ["predict", str(base.weights), *(["--json"] if rng.random() < 0.5 else [])]

    def read() -> None:
        said, code = call([*start, "--", *paths])
        expect(code in (0, 1, 2), f"exit code {code}")
        for line in said.splitlines():
            expect(line.startswith("sparsenet"), f"a line that is another's: {line[:100]!r}")
            expect(len(line) <= LONGEST + 5000, f"a long message: {len(line)} characters")

    return Case(read, [])


FLAG_TEXTS = (
    "", " ", "0", "-1", "1", "2", "3", "7", "0.5", "-0.5", "1e9", "1e308", "1e400", "-1e400", "nan",
    "inf", "-inf", "10**30", str(10**9), str(2**31), str(2**63), str(10**30), "1" * 5000, "1_000",
    "٣", "²", "½", "0x10", "1,5", "1,2,3", "4,4,4", ",", "1,,2", "true", "yes", "None", "auto", "x",
    "é", "\ud800", "\0", "a\nb", "\x1b[2J", "%s", "{}", "sparse:0", "sparse:2",
    "sparse:1" + "0" * 30, "windowed:1", "dense:3", "x" * 5000, "/nowhere", ".", "~", "fetch.py:f",
    "/dev/zero:f", "cuda", "cuda:99", "cpu:1", "mps", "meta", "-",
)  # fmt: skip


@reader
def arguments(rng: random.Random, base: Base, folder: Path) -> Case:
    """Flags with odd texts. What is accepted trains the smallest network for an epoch."""
    command = rng.choice(
        ("train",) * 6 + ("eval", "predict", "export", "report", "check", "models")
    )
    run = str(base.run)
    common = [*TINY, "--max_epoch", "1", "--batch_size", "4", "--time_limit", "3", "--out", "out"]
    fixed = {
        "train": ["train", "--dataset_dir", str(base.data), *common],
        "eval": ["eval", run],
        "predict": ["predict", run, str(base.image)],
        "export": ["export", run, "--format", "safetensors", "--out", "x.safetensors"],
        "report": ["report", run, "--markdown"],
        "check": ["check"],
        "models": ["models"],
    }[command]
    parser = flags.parser()._subparsers._group_actions[0].choices[command]
    known = sorted(
        name for name in parser._option_string_actions if name not in ("--help", "-h", "--measure")
    )
    added = []
    for _ in range(rng.choice((1, 1, 2))):
        flag = (
            rng.choice(known)
            if rng.random() < 0.95
            else rng.choice(("--x", "-x", "--", "--lr=", "lr=3"))
        )
        text = rng.choice(FLAG_TEXTS if rng.random() < 0.6 else FLAG_TEXTS[2:12])
        added += [f"{flag}={text}"] if rng.random() < 0.7 else [flag, text]
    (folder / "arguments.txt").write_text(repr([*fixed, *added]))
    return Case(lambda: check_call([*fixed, *added]), [])
