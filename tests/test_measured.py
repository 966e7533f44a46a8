"""``auto`` chooses by timings, which are measured once, kept, and never in anybody's way."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, MEASURE, linked_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops import dispatch, measured, reference

SECONDS = {"native": 1.0, "shared": 2.0, "reference": 3.0}
SMALL = Architecture(depth=7, growth_rate=4)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4))
def test_the_fastest_or_one_that_is_preferred_and_nearly_as_fast(values):
    seconds = {str(place): value for place, value in enumerate(values)}
    taken = measured.fastest(seconds)
    assert seconds[taken] <= measured.MARGIN * min(values)
    assert all(seconds[str(place)] > measured.MARGIN * min(values) for place in range(int(taken)))


def test_by_how_much():
    assert measured.describe_speedup("native", SECONDS) == "2.0 times shared, 3.0 times reference"
    assert (
        measured.describe_speedup("reference", {"native": 6.0, "reference": 4.0})
        == "1.5 times native"
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measured, "BATCHES", ((2, 4),))
    monkeypatch.setattr(measured, "ROUNDS", (1, 1))


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("dtype", dispatch.MEASURED)
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_measuring_gives_seconds_and_disturbs_nothing(quick, around, dtype, busy, monkeypatch):
    monkeypatch.setattr(measured, "_cores_are_busy", lambda: busy)
    torch.set_num_threads(2)
    monkeypatch.setattr(
        measured, "LIMIT", 0 if busy else 9
    )  # no time for more than the first round
    implementations = {name: dispatch._load(name).aggregate for name in dispatch._runnable(CPU)}
    before = torch.get_rng_state()
    with around(), torch.autocast("cpu", torch.float16), torch.device("meta"):
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = MEASURE(CPU, dtype, implementations)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
        assert torch.get_autocast_dtype("cpu") == torch.float16
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert found.busy == busy
    for seconds in (found.training, found.inference):
        assert list(seconds) == list(implementations)
        assert all(0 < each < math.inf for each in seconds.values())


COUNTED = """
import os
import torch
from sparsenet.ops import measured

def threads():
    torch.ones(1 << 20).relu()
    return len(os.listdir("/proc/self/task"))

def count(*_):
    counts.append(threads())
    raise ValueError("counted")

torch.set_num_threads(4)
counts = [threads()]
measured._cores_are_busy = lambda: False
measured.measure(torch.device("cpu"), torch.float32, {"counting": count})
print(*counts)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_no_more_threads_than_cores_wait_while_measuring():
    """Else OpenMP's threads sleep between all operations, and timings are of their waking up."""
    command = [sys.executable, "-c", COUNTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, during = map(int, done.stdout.split())
    assert during == before + 1  # which measures, and has the main thread's number of helpers


@pytest.mark.parametrize("steps", [0.0, -1.0], ids=["stands still", "goes back"])
def test_a_wrong_clock_ends_a_measurement_and_prefers_nothing(quick, steps, monkeypatch):
    ticks = itertools.count(1.0, steps)
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(f"time.{clock}", lambda: next(ticks))
    slow_first = {"shared": dispatch._load("shared").aggregate, "reference": reference.aggregate}
    torch.set_num_threads(2)  # so that it looks for busy cores
    found = MEASURE(CPU, torch.float32, slow_first)
    torch.set_num_threads(1)
    for seconds in (found.training, found.inference):
        assert measured.fastest(seconds) == "shared"
        assert measured.describe_speedup("shared", seconds) == "1.0 times reference"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_a_measurement_without_memory_is_none(quick, error):
    def starved(*_):
        raise error

    with pytest.raises(type(error)):
        MEASURE(CPU, torch.float32, {"other": starved, "reference": reference.aggregate})


@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError])
def test_what_cannot_be_measured_is_left_out(quick, error):
    def refuses(*_):
        raise error("not in this precision")

    found = MEASURE(CPU, torch.float32, {"other": refuses, "reference": reference.aggregate})
    assert list(found.training) == list(found.inference) == ["reference"]
    assert MEASURE(CPU, torch.float32, {"other": refuses}) == measured.Timings({}, {})


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Measurements that are made, in an empty cache; each finds other timings."""
    made = []

    def measure(device, dtype, implementations):
        made.append(dtype)
        seconds = {name: float(len(made)) for name in implementations}
        return measured.Timings(seconds, seconds)

    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def again():
    """As another process would ask."""
    measured._known.clear()
    return dispatch.timings(CPU, torch.float32)


def test_measured_once(counted, tmp_path):
    first = dispatch.timings(CPU, torch.float32)
    assert again() == dispatch.timings(CPU, torch.float32) == first and len(counted) == 1
    assert [path.name.split("-")[0] for path in (tmp_path / "sparsenet").iterdir()] == ["timings"]
    assert dispatch.timings(CPU, torch.bfloat16) != first and len(counted) == 2
    assert dispatch.timings(CPU, torch.float32, anew=True) != first and len(counted) == 3
    assert again() == dispatch.timings(CPU, torch.float32) != first and len(counted) == 3


@pytest.mark.parametrize("what", ["threads", "name", "setting", "able"])
def test_another_machine_is_measured_anew(what, counted, monkeypatch):
    again()
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    elif what == "name":
        monkeypatch.setattr(measured, "device_name", lambda device: "another processor")
    elif what == "setting":
        monkeypatch.setenv("CFLAGS", "-O1")
    else:
        monkeypatch.setattr(
            dispatch, "unavailable", lambda name, device: "no reason" if name == "native" else None
        )
    again()
    assert len(counted) == 2


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]", b"\xff\xfe", b"null", "half", "zero", "nan", "other", "folder"]
)
def test_a_damaged_file_is_measured_again(damage, counted, tmp_path):
    again()
    (file,) = (tmp_path / "sparsenet").iterdir()
    value = json.loads(file.read_text())
    if damage == "half":
        damage = file.read_bytes()[:-20]
    elif damage in ("zero", "nan"):
        value["timings"]["training"]["reference"] = 0 if damage == "zero" else math.nan
    elif damage == "other":
        value["conditions"]["device"] = "another processor"
    if damage == "folder":
        file.unlink()
        (file / "within").mkdir(parents=True)
    else:
        file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(value).encode())
    again()
    assert len(counted) == 2
    again()
    assert len(counted) == 3 if damage == "folder" else len(counted) == 2


@pytest.mark.parametrize("place", ["below a file", "no home"])
def test_where_nothing_can_be_kept(place, counted, monkeypatch, tmp_path):
    if place == "below a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def none():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", none)
    model, images = SparseNet(SMALL), torch.randn(2, 3, 8, 8)
    for _ in range(3):
        model(images)
    assert len(counted) == 1


def test_processes_that_begin_together(tmp_path):
    code = """
import torch
from sparsenet.ops import dispatch, measured
measured.BATCHES, measured.ROUNDS = ((2, 4),), (1, 1)
print(dispatch.timings(torch.device("cpu"), torch.float32) is not None)
"""
    folder = linked_kernels(tmp_path / "cache")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [each.communicate()[0] for each in both] == ["True\n"] * 2
    (file,) = (folder / "sparsenet").glob("timings-*")
    assert set(json.loads(file.read_text())["timings"]) == {"busy", *measured.MODES}
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    assert {path.suffix for path in files} <= {".json", ".so"}  # nothing half done


def used(monkeypatch, act):
    """Implementations that *act* runs."""
    names, load = [], dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda name: names.append(name) or load(name))
    act()
    return set(names)


def test_a_model_says_what_runs(found, monkeypatch):
    found({"shared": 1.0, "reference": 2.0}, shared=2.0, reference=1.0)
    model, images = SparseNet(SMALL), torch.randn(2, 3, 8, 8)
    assert model.implementation == "shared"
    assert used(monkeypatch, lambda: model(images)) == {"shared"}
    with torch.no_grad():
        assert model.implementation == "shared"  # in training
        model.eval()
        assert model.implementation == "reference"
        assert used(monkeypatch, lambda: model(images)) == {"reference"}


def test_a_precision_has_an_implementation_of_its_own(found):
    found({"shared": 1.0, "reference": 2.0}, bf16={"shared": 2.0, "reference": 1.0})
    model = SparseNet(SMALL)
    assert model.implementation == "shared"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.implementation == "reference"
    assert model.bfloat16().implementation == "reference"


def test_lean_memory_is_not_for_the_reference(found):
    found({"native": 3.0, "shared": 2.0, "reference": 1.0})
    assert SparseNet(SMALL).implementation == "reference"
    assert SparseNet(SMALL, memory="lean").implementation == "shared"


def test_nothing_is_measured_for_tensors_without_data(counted):
    with FakeTensorMode():
        assert SparseNet(SMALL)(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    with torch.device("meta"), torch.no_grad():
        assert SparseNet(SMALL).eval()(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert not counted


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(1.0, 1.0, "bf16"), (1.0, 1.1, "fp32"), (1.1, 1.0, "bf16")]
)
def test_bf16_where_it_is_not_slower(fp32, bf16, expected, found, monkeypatch):
    monkeypatch.setattr(dispatch, "computes_in_bf16", lambda device: True)
    found({"shared": 9.0, "reference": fp32}, bf16={"shared": bf16, "reference": 9.0})
    assert dispatch.choose_precision("auto", CPU) == expected
    assert (
        dispatch.choose_precision("auto", CPU, "shared") == "bf16"
    )  # each is compared with itself
    assert dispatch.choose_precision("auto", CPU, "reference") == ("bf16" if fp32 >= 9 else "fp32")
    assert dispatch.choose_precision("fp32", CPU) == "fp32"
    monkeypatch.setattr(dispatch, "computes_in_bf16", lambda device: False)
    assert dispatch.choose_precision("auto", CPU) == "fp32"


def test_what_was_measured_in_two_ways_is_not_compared(counted, monkeypatch):
    """Several threads on a machine left alone, one on a busy one: both are measured again."""
    ways = iter([True, False, True, True])
    seconds = {"native": 1.0, "shared": 2.0, "reference": 3.0}

    def measure(device, dtype, implementations):
        counted.append(dtype)
        return measured.Timings(seconds, seconds, next(ways))

    monkeypatch.setattr(measured, "measure", measure)
    assert dispatch.slowdown(CPU) == 1 and len(counted) == 4
    assert dispatch.slowdown(CPU) == 1 and len(counted) == 4
