"""Machines that run out of something: a fault is one line, and nothing that was saved is lost."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
import torch
from conftest import ABOUT, TINY, Call, newest
from safetensors.torch import load_file

from sparsenet import checkpoints, weights
from sparsenet.checkpoints import Manifest
from sparsenet.data.errors import BadImage, DataError, decoding
from sparsenet.extras import MissingExtra
from sparsenet.memory import shortage, total_memory
from sparsenet.results import EpochMetrics
from sparsenet.run import Run
from sparsenet.step import TrainingStep

LAST = "last-00000046"  # of the ``trained`` run


# A stride of 1 goes through all of them, which takes minutes.
STRIDE = int(os.environ.get("FAULT_STRIDE", "0"))


# --- system calls ---------------------------------------------------------------------------------


needs_a_laboratory = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"),
    reason="system calls are made to fail on Linux, by a library that a C compiler makes",
)


@needs_a_laboratory
def test_no_fault_at_a_system_call_loses_or_changes_anything(tmp_path: Path) -> None:
    """Killed or failed, a folder is taken or resumed, and comes to the same end."""
    found = faults.search(tmp_path, "calls", STRIDE or 25, shift=7 if not STRIDE else 0)
    assert found["problems"] == []
    assert min(found["kills"], found["errors"]) >= sum(found["calls"].values()) // (STRIDE or 25)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace makes the kernel's calls fail")
@pytest.mark.parametrize(
    "fault",
    [
        "fsync:error=EIO:when=4",  # while the run is described
        "fsync:error=EIO:when=16",  # and while it is
        "fsync:error=ENOSPC:when=26+",  # from the second epoch on
    ],
)
def test_what_the_kernel_refuses_loses_nothing(
    call: Call, trained: Path, tmp_path: Path, fault: str
) -> None:
    """The same as above from outside, for a few calls of a process as users start it."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "sparsenet.cli", "train", *TINY, "--max_epoch", "2"]
    tracing = ["strace", "--seccomp-bpf", "-f", "-qq", "-o", os.devnull]
    name = fault.partition(":")[0]
    done = subprocess.run(
        [*tracing, "-e", f"trace={name}", "-e", f"inject={fault}", *command, "--out", folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode, done.stdout
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    if Run(folder).is_described:
        assert call("train", "--resume", folder).code == 0
    else:
        assert call("train", *TINY, "--max_epoch", 2, "--out", folder).code == 0
    ours, theirs = (
        load_file(path / "checkpoints" / f"{LAST}.safetensors") for path in (folder, trained)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_a_laboratory
def test_no_limit_of_files_or_memory_loses_or_changes_anything(tmp_path: Path) -> None:
    found = faults.search(tmp_path, "limits", STRIDE or 3)
    assert found["problems"] == [] and found["errors"] >= 8


def test_a_disk_that_becomes_full_loses_nothing(call: Call, trained: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(disk)]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False

    if not mount("size=200k"):
        pytest.skip("a small disk is mounted where this user may mount one")
    try:
        # Room for what a run says of itself, and not for all of its checkpoints.
        outcome = call("train", *TINY, "--max_epoch", 2, "--save_every", 0, "--out", disk / "run")
        assert outcome.code == 1 and "No space left on device" in outcome.error
        newest(disk / "run" / "checkpoints", "last")
        assert mount("remount", "size=10m")
        assert call("train", "--resume", disk / "run").code == 0
        name = f"checkpoints/{LAST}.safetensors"
        ours, theirs = load_file(disk / "run" / name), load_file(trained / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # what was read is mapped


def zipped(value: object) -> bytes:
    """As ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# --- bytes ----------------------------------------------------------------------------------------


def damages(content: bytes) -> Iterator[bytes]:
    """*content* cut at every place, and with a bit of every byte the other way round."""
    for place in range(len(content)):
        yield content[:place]
        bit = 1 << place % 8
        yield content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def test_of_a_checkpoint_with_any_damage_the_one_before_is_taken(tmp_path: Path) -> None:
    saved = {}
    for step in (2, 3):
        tensors = {"model.x": torch.full((2, 3), float(step)), "epoch.wrongs": torch.arange(step)}
        manifest = Manifest("last", step, 1, ABOUT, 0.5 * step, 25.0, [EpochMetrics(1)])
        checkpoints.save(tmp_path, manifest, tensors)
        saved[step], warnings = newest(tmp_path, "last")
        assert not warnings
    for kind in ("json", "safetensors"):
        file = tmp_path / f"last-00000003.{kind}"
        content = file.read_bytes()
        for damaged in damages(content):
            file.write_bytes(damaged)
            found, warnings = newest(tmp_path, "last")
            # White space at the end of a manifest may be cut off or another one.
            step = found.manifest.step if kind == "json" else 2
            assert found.manifest == saved[step].manifest and len(warnings) == (step == 2), damaged
            assert found.tensors.keys() == saved[step].tensors.keys()
            assert all(
                found.tensors[name].equal(saved[step].tensors[name]) for name in found.tensors
            )
        file.write_bytes(content)


def test_weights_with_any_damage_are_refused_or_differ_in_one_tensor(
    call: Call, trained: Path
) -> None:
    assert call("export", trained, "--format", "safetensors", "--out", "whole").code == 0
    about = weights.load("whole").about
    tensors = {"x": torch.rand(2, 3).half(), "y.running_var": torch.rand(3)}
    content, file, loaded = weights.pack(tensors, about), Path("damaged"), 0
    header = 8 + int.from_bytes(content[:8], "little")
    for place, damaged in enumerate(damages(content)):
        file.write_bytes(damaged)
        try:
            found = weights.load(file)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("damaged: ")
            continue
        loaded += 1
        same = [
            name
            for name in tensors
            if found.tensors.get(name, torch.empty(0)).equal(tensors[name].float())
        ]
        assert place % 2 == 1, "cut"
        assert place // 2 < header or (len(same) == 1 and found.about == about)
    assert loaded


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("called"),)


def test_no_pickle_is_read_but_by_the_reader_that_calls_nothing() -> None:
    """As checkpoints, weights and settings are read: ``test_a_malicious_pickle_...`` has data.

    And by PyTorch's reader of tensors alone, of other libraries' files: test_finetune.py.
    """
    unsafe = re.compile(
        r"\b(import|from) (pickle|marshal|shelve|dill|joblib)|torch\.load|allow_pickle"
    )
    safe = re.compile(r"torch\.load\([^()]*, weights_only=True\)|import pickle\b")
    package = Path(faults.__file__).parents[1] / "src" / "sparsenet"
    found = []
    for path in package.rglob("*.py"):
        text = path.read_text()
        other = path.relative_to(package).as_posix() == "adoption/files.py"
        if unsafe.search(safe.sub("", text) if other else text):
            found.append(path.name)
        assert "pickle.load" not in text or path.name == "unpickle.py"
    assert found == ["unpickle.py"]


@pytest.mark.parametrize("write", [pickle.dumps, zipped])
def test_a_hostile_pickle_is_refused_and_not_called(
    call: Call, copied: Path, write: Callable[[object], bytes]
) -> None:
    hostile = write(Hostile())
    Path("weights.pt").write_bytes(hostile)
    assert "expected a safetensors file" in call("eval", "weights.pt").error
    for name in (f"checkpoints/{LAST}.safetensors", f"checkpoints/{LAST}.json"):
        (copied / name).write_bytes(hostile)
    assert "resumed at step 23" in call("train", "--resume", copied).out
    (copied / "images.safetensors").write_bytes(hostile)
    assert call("train", "--resume", copied).code == 2
    (copied / "config.json").write_bytes(hostile)
    assert "expected JSON" in call("train", "--resume", copied).error
    assert not Path("called").exists()


# --- memory ---------------------------------------------------------------------------------------


def ask_for_too_much() -> None:
    torch.empty(1 << 55)


def test_a_shortage_of_memory_is_known_whoever_says_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        ask_for_too_much()
    said = shortage(caught.value)
    assert said is not None and said.startswith("can't allocate memory: you tried to allocate")
    assert shortage(MemoryError()) == "out of memory"
    assert shortage(torch.OutOfMemoryError("full")) == "full"
    for message in (
        "could not create a memory object",
        "could not create a primitive",  # but "a primitive descriptor" is one that there is not
        "can't start new thread",
        "std::bad_alloc",
        "unable to mmap 80 bytes from file <x>: Cannot allocate memory (12)",
    ):
        assert shortage(RuntimeError(message)) == message
    assert shortage(ImportError("failed to map segment from shared object: Cannot allocate memory"))
    with pytest.raises(RuntimeError) as wrapped:
        raise RuntimeError("failed to export") from MemoryError()
    assert shortage(wrapped.value) == "out of memory"
    for error in (RuntimeError("shapes differ"), MissingExtra("no x"), ValueError("out of memory")):
        assert shortage(error) is None


def test_a_run_without_memory_ends_in_one_line_and_goes_on(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_step, steps = TrainingStep.__call__, 0

    def failing(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 30:
            ask_for_too_much()
        return make_step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", failing)
        outcome = call("train", *TINY, "--max_epoch", 2, "--out", "run")
    assert outcome.code == 1
    assert outcome.error.startswith("sparsenet: run: the run broke off: can't allocate memory")
    assert "sparsenet train --resume run --memory lean" in outcome.error
    assert call("train", "--resume", "run", "--memory", "lean").code == 0
    name = f"checkpoints/{LAST}.safetensors"
    ours, theirs = load_file(Path("run") / name), load_file(trained / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("flags", [("--growth_rate", 100_000), ("--stem_width", 10**7)])
def test_a_network_that_no_memory_holds_is_refused(call: Call, flags: tuple[object, ...]) -> None:
    outcome = call("train", "--depth", 7, *flags, "--out", "run")
    assert outcome.code == 2 and not Path("run").exists()
    assert f"the {total_memory() / 1e9:.1f} GB of memory" in outcome.error
    assert "parameters" in outcome.error


def test_features_that_no_memory_holds_are_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsenet.preparation.total_memory", lambda: 2 * 10**6)
    outcome = call("train", *TINY, "--batch_size", 1000, "--out", "run")
    assert outcome.code == 2 and "for the features of 1000 images" in outcome.error
    assert call("train", *TINY, "--max_epoch", 1, "--batch_size", 500, "--out", "run").code == 0


def test_an_image_is_not_damaged_because_memory_is_short() -> None:
    """Or it would be left out of the data where that is asked for."""
    for short in (MemoryError, ask_for_too_much):
        with (
            pytest.raises(DataError, match=r"^a\.png: .*or there is too little memory") as caught,
            decoding("a.png", "an image", error=BadImage),
        ):
            short()
            raise MemoryError
        assert not isinstance(caught.value, BadImage)
