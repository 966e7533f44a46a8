"""What is read from a file is right or refused in one line; and the fuzzer sees what is neither."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import Verdict, distinct, judge, run_cases
from hypothesis import given
from hypothesis import strategies as st
from mutators import (
    encode,
    join_tensors,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    split_tensors,
)
from readers import READERS, Base, Case, Wrong, make_case
from safetensors.torch import save

SLOW = {
    "resumed_run": 4,
    "configured_run": 6,
    "used_run": 6,
    "arguments": 8,
    "predicted_files": 10,
    "decoded_images": 12,
}
CASES = 40  # of each other reader
FOUND = {  # seeds of other cases, each of which failed once in a way of its own
    "decoded_images": (11, 216),
    "best_checkpoint": (
        22,
        330,
        382,
        411,
        431,
        575,
        610,
        640,
        729,
        835,
        1368,
        1519,
        1815,
        2474,
        10878,
        11941,
    ),
    "cifar": (144, 166, 20037, 20076, 20611, 22705),
    "configuration": (1, 4, 20, 25, 395, 461, 1223, 1333, 1591, 1814),
    "configured_run": (30041, 30580),
    "downloads": (109,),
    "images": (1, 2, 12, 44, 51, 356, 359, 522),
    "labels_csv": (46, 22520, 23584),
    "last_checkpoint": (
        13,
        14,
        23,
        35,
        48,
        73,
        74,
        80,
        124,
        127,
        278,
        360,
        10033,
        10043,
        10363,
        10725,
        10747,
        11072,
        11549,
        12116,
        30108,
        30380,
        32128,
    ),
    "parquet": (20082,),
    "pickles": (39, 51, 22284, 23970),
    "predicted_files": (78,),
    "records": (70, 160, 211, 409, 560, 667, 771, 774, 1508, 10872, 12337),
    "resumed_run": (30007, 30198, 30210),
    "shipped_weights": (29,),
    "state_dict": (0, 3, 25, 48, 96, 114, 149),
    "timing_cache": (132,),
    "used_run": (30010, 30087, 30269, 30470, 30752),
    "weights_file": (154, 194, 405),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("fuzzing"))


@pytest.mark.parametrize("name", READERS)
def test_any_input_is_read_right_or_refused_in_one_line(
    name: str, base: Base, tmp_path: Path
) -> None:
    (tmp_path / "trial").mkdir()
    make_case(name, 0, base, tmp_path / "trial")  # the base is made here, once
    seeds = sorted({*range(SLOW.get(name, CASES)), *FOUND.get(name, ())})
    found = {}
    for seed, verdict in run_cases(name, seeds, base, tmp_path / "case"):
        if verdict.problem:
            found[f"{name}:{seed}"] = verdict.problem
    assert not found


# --- the fuzzer -----------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES)
def test_json_is_written_as_it_is(value: object) -> None:
    assert json.loads(encode(value)) == json.loads(json.dumps(value))


@given(VALUES, st.integers(0, 2**32), st.binary(max_size=300))
def test_mutations_are_a_function_of_the_seed_and_leave_the_value_alone(
    value: object, seed: int, data: bytes
) -> None:
    before = copy.deepcopy(value)
    first, again = (encode(mutated_json(value, random.Random(seed))) for _ in range(2))
    assert first == again and value == before
    assert mutated_bytes(data, random.Random(seed)) == mutated_bytes(data, random.Random(seed))


def test_the_parts_of_a_safetensors_file_make_the_same_file_and_others_make_others() -> None:
    data = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, {"x": "{}"})
    header, body = split_tensors(data)
    assert split_tensors(join_tensors(header, body)) == (header, body)
    mutated = {mutated_safetensors(data, random.Random(seed)) for seed in range(50)}
    assert len(mutated) > 30


def _raises(error: Exception) -> Callable[[], object]:
    def read() -> object:
        raise error

    return read


def _chained() -> None:
    try:
        raise MemoryError
    except MemoryError as error:
        raise ValueError("a.json: damaged") from error


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda: 1, None),
        (_raises(ValueError("a.json: expected a number")), None),
        (_raises(ValueError("expected a number")), "names no file"),
        (_raises(ValueError("a.json: expected\na number")), "2 lines"),
        (_raises(ValueError("a.json: " + "x" * 2000)), "2,008 characters"),
        (_raises(KeyError("x")), "KeyError"),
        (_raises(Wrong("a negative step")), "wrong value: a negative step"),
        (_chained, "memory"),
        (lambda: np.float32(1e30) * np.float32(1e30), "warning: RuntimeWarning"),
    ],
)
def test_each_kind_of_failure_is_seen(read: Callable[[], object], problem: str | None) -> None:
    verdict = judge(Case(read, ["a.json"]))
    assert verdict.problem is None if problem is None else verdict.problem.startswith(problem)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Verdict]]]:
    """Runs two cases of a reader that does *work*, of which the second is as it should be."""

    def run(work: Callable[[], object], base: Base, folder: Path) -> list[Verdict]:
        def maker(rng: random.Random, base: Base, folder: Path) -> Case:
            return Case(work if rng.random() < 0.5 else lambda: None, [])

        monkeypatch.setitem(READERS, "added", maker)
        seeds = sorted(range(9), key=lambda seed: random.Random(f"added:{seed}").random())
        return [verdict for _, verdict in run_cases("added", [seeds[0], seeds[-1]], base, folder)]

    yield run


def _spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (_spin, "hang at"),
        (lambda: time.sleep(60), "hang of"),
        (lambda: bytearray(1 << 40), "MemoryError"),
        (lambda: os._exit(3), "end of the process (3)"),
    ],
)
def test_a_case_that_never_ends_or_takes_all_memory_ends_no_other(
    work: Callable[[], object],
    problem: str,
    added: Callable[..., list[Verdict]],
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fuzzing.SECONDS", 0.2)
    monkeypatch.setattr("fuzzing.WAIT", 1)
    first, second = added(work, base, tmp_path / "case")
    assert first.problem and first.problem.startswith(problem)
    assert second == Verdict(None, True)


def test_problems_of_one_cause_are_one() -> None:
    pairs = [
        ("12 lines at run.py:1: 'a'", "3,000 lines at run.py:1: 'b'"),
        ("wrong value: 3 rows of 4 epochs", "wrong value: 12 rows of 9 epochs"),
    ]
    for first, second in pairs:
        assert distinct(first) == distinct(second)
    assert distinct("KeyError at run.py:1: 'a'") != distinct("KeyError at run.py:2: 'a'")
