"""Each key of each file, missing or with every kind of wrong value: right, or one line."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors

from sparsenet import checkpoints, weights
from sparsenet.checkpoints import RunError
from sparsenet.config import RunConfig, load
from sparsenet.preparation import preparing
from sparsenet.records import read_summaries
from sparsenet.run import Run
from sparsenet.state import new_state, restore
from sparsenet.texts import one_line
from sparsenet.trained import load_trained

MISSING = object()
BRACKETS = "[" * 100_000
NUMBERS = ("1e400", "-1", "0", "0.5", "1e300", str(10**30), "1" * 5000, "NaN", "Infinity")
TEXTS = ('""', json.dumps("x" * 2**20), json.dumps("\x1b[2J\n"), json.dumps("\ud800"))
WRONG = (MISSING, "null", "true", "[]", "{}", "[[1]]", '{"x": 1}', BRACKETS, *NUMBERS, *TEXTS)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value; of a long list the first and the last two."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    if isinstance(value, list):
        for index in sorted({*range(2), *range(len(value) - 2, len(value))} & {*range(len(value))}):
            yield from places(value[index], (*path, index))


def changed(value: Any, path: tuple[Any, ...], text: Any) -> str:
    """*value* as JSON with another *text* at *path*."""
    marked = json.loads(json.dumps(value))
    if not path:
        return "" if text is MISSING else text
    inner = marked
    for key in path[:-1]:
        inner = inner[key]
    if text is MISSING:
        del inner[path[-1]]
        return json.dumps(marked)
    inner[path[-1]] = "@@"
    return json.dumps(marked).replace('"@@"', text)


def variants(value: Any) -> Iterator[str]:
    # Every n-th has all kinds of what is wrong, where n and their number have no common factor.
    for path in places(value):
        for text in WRONG:
            yield changed(value, path, text)


def check_line(error: ValueError, file: Path | str) -> None:
    assert str(file) in str(error)
    message = one_line(str(error))
    assert len(message) < 20_000 and "\n" not in message and "\x1b" not in message


def test_settings(copied: Path) -> None:
    file = copied / "config.json"
    content = json.loads(file.read_text())
    refused = 0
    for text in variants(content):
        file.write_text(text)
        try:
            load(file, RunConfig())
        except ValueError as error:
            check_line(error, copied)
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("name", ["result.json", "environment.json", "graph.json", "config.json"])
def test_what_a_table_and_a_page_show(copied: Path, name: str, tmp_path: Path) -> None:
    file = copied / name
    content = json.loads(file.read_text())
    if name == "graph.json":
        content["nodes"] = content["nodes"][:1]
    refused = 0
    for text in islice(variants(content), 0, None, 4):  # all of one file take ten seconds
        file.write_text(text)
        try:
            read_summaries([copied])
        except ValueError as error:
            check_line(error, copied)
            refused += 1
    assert refused > 20


CELLS = (
    "",
    "x",
    "-1",
    "1e400",
    "nan",
    "inf",
    "0.5",
    "101",
    str(10**30),
    "\0",
    '"',
    "\x1b[2J",
    "9" * 200_000,
)


def test_metrics(copied: Path) -> None:
    file = copied / "metrics.csv"
    header, *lines = file.read_text().splitlines()
    columns, refused = header.split(","), 0
    for column in range(len(columns)):
        for cell in CELLS:
            cells = lines[0].split(",")
            cells[column] = cell
            for text in (f"{header}\n{','.join(cells)}\n", f"{header},{cell}\n{lines[0]},{cell}\n"):
                file.write_text(text)
                try:
                    rows = Run(copied).metrics()
                except RunError as error:
                    check_line(error, file)
                    refused += 1
                else:
                    assert all(row.epoch <= 2**53 for row in rows)
    assert refused > 50


def rewritten(run: Path, kind: str, text: str) -> None:
    """The newest checkpoint with another manifest, and the hash and description that it needs."""
    manifest = checkpoints.saved(run / "checkpoints", kind)[0]
    tensors = manifest.with_suffix(".safetensors")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        manifest.write_text(text)
        return
    if isinstance(told, dict):
        described = {name: told[name] for name in told.keys() - set(checkpoints.IDENTITY)}
        content = parse_tensors(tensors.read_bytes())
        data = serialise_tensors(content, {"sparsenet": json.dumps(described)})
        tensors.write_bytes(data)
        if told.get("sha256"):
            text = json.dumps({**told, "sha256": hashlib.sha256(data).hexdigest()})
    manifest.write_text(text)


@pytest.fixture
def restored(copied: Path) -> Callable[[Path], Any]:
    """Loads the last checkpoint of a run, as ``--resume`` does."""
    config = Run(copied).config()
    work = preparing(config, Run(copied).arithmetic(), Run(copied).images())
    try:
        while True:
            next(work)
    except StopIteration as end:
        setup = end.value

    def restored(run: Path) -> Any:
        state = new_state(setup)
        return state, restore(state, setup, Run(run))

    return restored


def test_a_checkpoint_of_whatever_description_gives_way_to_the_one_before(
    copied: Path, tmp_path: Path, restored: Callable[[Path], Any]
) -> None:
    """Or it is as good as the one that was written: the settings and the images are others."""
    manifests = checkpoints.saved(copied / "checkpoints", "last")
    content = json.loads(manifests[0].read_text())
    steps = [json.loads(path.read_text())["step"] for path in manifests]
    run = tmp_path / "run"
    shutil.copytree(copied, run)
    whole = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    passed_over = 0
    for text in islice(variants(content), 0, None, 13):  # all of them take a minute
        for path, data in whole.items():
            path.write_bytes(data)
        rewritten(run, "last", text)
        try:
            network = load_trained(run, "last")
            state, _ = restored(run)
        except RunError as error:
            check_line(error, run)
            continue
        assert network.step in steps and state.step in steps
        passed_over += state.step == steps[1]
    assert passed_over > 15


def test_a_weights_file(trained: Path, tmp_path: Path) -> None:
    from sparsenet.cli import run as call

    path = tmp_path / "weights.safetensors"
    assert call(["export", str(trained), "--format", "safetensors", "--out", str(path)]) == 0
    tensors, about = weights.parse(path.read_bytes())
    refused = 0
    for text in islice(variants(about), 0, None, 4):
        path.write_bytes(serialise_tensors(tensors, {"sparsenet": text}))
        try:
            load_trained(path)
        except ValueError as error:
            check_line(error, path)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("kind", ["best", "last"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4, dtype=torch.float8_e5m2),
        torch.ones(1),
        torch.ones(4, 1),
        torch.ones(4, dtype=torch.float64),
        torch.ones(0),
        None,
    ],
    ids=lambda tensor: "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_other_tensors(
    copied: Path, restored: Callable[[Path], Any], kind: str, tensor: torch.Tensor | None
) -> None:
    """Each in the place of one that a network, its optimizer or its epoch has, or beside them."""
    newest_one = checkpoints.saved(copied / "checkpoints", kind)[0]
    file = newest_one.with_suffix(".safetensors")
    content, told = parse_tensors(file.read_bytes()), newest_one.read_text()
    first = ("model.", "average.", "optimizer.", "epoch.losses", "epoch.wrongs")
    names = [name for name in content if not name.endswith("num_batches_tracked")]  # may be missing
    present = [next((name for name in names if name.startswith(each)), "") for each in first]
    for name in (
        *filter(None, present),
        "model.new",
        "optimizer.-1",
        "optimizer.99",
        "optimizer.x",
    ):
        others = {**content, name: tensor}
        if tensor is None and others.pop(name) is None and name not in content:
            continue
        file.write_bytes(serialise_tensors(others, {"sparsenet": "null"}))
        rewritten(copied, kind, told)
        if kind == "last":
            try:
                state, lines = restored(copied)
            except RunError as error:  # an epoch of another number of steps is of other batches
                assert name == "epoch.losses" and "steps an epoch, found 23" in str(error)
            else:
                assert state.step == 23 and "damaged" in lines[0]
        elif name.startswith("model."):
            with pytest.raises(RunError) as error:
                load_trained(copied)
            check_line(error.value, copied)


@pytest.mark.parametrize("epoch", [3, 10**15])
def test_a_checkpoint_of_other_epochs_than_its_steps_is_damaged(
    copied: Path, restored: Callable[[Path], Any], epoch: int
) -> None:
    """Also where they are so many that a list of them would fill the memory."""
    manifest = checkpoints.saved(copied / "checkpoints", "last")[0]
    told = json.loads(manifest.read_text())
    rewritten(copied, "last", json.dumps({**told, "epoch": epoch}))
    state, lines = restored(copied)
    assert state.step == 23 and "do not fit together" in lines[0]
