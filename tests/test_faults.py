"""Machines that run out of something: a fault is one line, and nothing that was saved is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, Call
from safetensors.torch import load_file

from sparsenet.data.errors import BadImage, DataError, decoding
from sparsenet.extras import MissingExtra
from sparsenet.memory import shortage, total_memory
from sparsenet.step import TrainingStep

LAST = "last-00000046"  # of the ``trained`` run


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
        "can't start new thread",
        "std::bad_alloc",
        "unable to mmap 80 bytes from file <x>: Cannot allocate memory (12)",
    ):
        assert shortage(RuntimeError(message)) == message
    assert shortage(ImportError("x.so: failed to map segment from shared object"))
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


@pytest.mark.parametrize("flags", [("--growth_rate", 100_000), ("--stem_width", 10**9)])
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
