"""A run records what ``auto`` comes to, so that resuming is bit-exact whatever timings say then."""

import json

import pytest
import torch
from conftest import CPU, Call, Found
from test_train import assert_same, finished, outcome, tiny

from sparsenet import arithmetic
from sparsenet.arithmetic import Arithmetic, explain, settle
from sparsenet.config import TrainConfig
from sparsenet.events import Message
from sparsenet.ops import dispatch
from sparsenet.run import Run
from sparsenet.train import train

FAST, SLOW = {"shared": 1.0, "reference": 2.0}, {"shared": 4.0, "reference": 3.0}


@pytest.fixture(autouse=True)
def computes_in_bf16(monkeypatch):
    """The CPU does, or says so."""
    for module in (dispatch, arithmetic):
        monkeypatch.setattr(module, "computes_in_bf16", lambda device: True)


def stopped(folder, config):
    run = Run.create(folder)
    list(train(config, run, should_stop=lambda: "a signal"))
    return run


def recorded(run):
    environment = json.loads((run.path / "environment.json").read_text())
    return environment["precision"], environment["implementation"]


def lines(events):
    return [event.text for event in events if isinstance(event, Message)]


def test_a_resumed_run_computes_as_it_began(found, tmp_path):
    found(SLOW, bf16=FAST)
    whole = finished(tmp_path / "whole", tiny())
    run = stopped(tmp_path / "run", tiny())
    assert recorded(run) == ("bf16", "shared")
    found(SLOW, bf16={"shared": 9.0, "reference": 8.0})  # another precision, another implementation
    other = finished(tmp_path / "other", tiny())
    assert recorded(other) == ("fp32", "reference")
    said = lines(train(tiny(), run, resume=True))
    assert "cpu, bf16, implementation shared, as the run began" in said
    assert recorded(run) == ("bf16", "shared")
    assert_same(outcome(run), outcome(whole))
    with pytest.raises(AssertionError):
        assert_same(outcome(run), outcome(other))


@pytest.mark.parametrize("lost", ["names", "file", "damaged"])
def test_a_run_without_the_record_goes_on_with_what_is_best(lost, found, tmp_path):
    run = stopped(tmp_path / "run", tiny())
    file = run.path / "environment.json"
    file.write_text("{}" if lost == "names" else "[")
    if lost == "file":
        file.unlink()
    found(FAST, bf16=SLOW)
    assert "1.1 times" not in "".join(lines(train(tiny(), run, resume=True)))
    assert recorded(run) == ("fp32", "shared")


def test_a_recorded_implementation_that_cannot_run_here(found, monkeypatch, call: Call, tmp_path):
    found(FAST)
    assert (
        call("train", "--out", "run", "--depth", 7, "--growth_rate", 4, "--max_epoch", 1).code == 0
    )
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"implementation": "triton"}))
    monkeypatch.setattr(
        dispatch, "unavailable", lambda name, device: "no such device" if name == "triton" else None
    )
    outcome = call("train", "--resume", "run", "--max_epoch", 2)
    assert outcome.code == 2
    for word in ("run began with", "'triton'", "no such device", "--implementation shared"):
        assert word in outcome.error
    assert (
        call("train", "--resume", "run", "--max_epoch", 2, "--implementation", "shared").code == 0
    )
    assert recorded(Run(tmp_path / "run"))[1] == "shared"


def test_what_is_asked_for_is_used(found):
    found(FAST, bf16=FAST)
    asked = TrainConfig(precision="fp32", implementation="reference")
    assert settle(asked, {"precision": "bf16", "implementation": "shared"}, CPU) == Arithmetic(
        "fp32", "reference"
    )
    assert settle(TrainConfig(memory="lean"), {}, CPU).implementation == "shared"
    assert settle(TrainConfig(), {}, CPU).dtype == torch.bfloat16
    began = {"precision": "bf16", "implementation": "reference"}
    assert settle(TrainConfig(), began, CPU) == Arithmetic("bf16", "reference", kept=True)
    assert not settle(
        TrainConfig(implementation="shared"), began, CPU
    ).kept  # the user has changed it
    assert not settle(TrainConfig(), {"precision": "bf16"}, CPU).kept
    with pytest.raises(ValueError, match=r"^implementation: 'triton' cannot run here"):
        settle(TrainConfig(implementation="triton"), {}, torch.device("meta"))


def test_the_log_says_which_and_by_how_much(found: Found, monkeypatch):
    def told(**asked):
        config = TrainConfig(**asked)
        return list(explain(settle(config, {}, CPU), config, CPU))

    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)
    found(
        {"native": 1.0, "shared": 1.9, "reference": 3.1},
        bf16={"native": 2.0, "shared": 2.5, "reference": 5.0},
    )
    steps = "training steps of small layers"
    assert told() == [
        f"cpu, fp32, implementation native, 1.9 times shared, 3.1 times reference here, in {steps}",
        f"precision fp32: {steps} take 2.00 of fp32's time in bf16 here",
    ]
    assert told(precision="fp32", implementation="shared") == ["cpu, fp32, implementation shared"]
    assert told(precision="bf16") == [
        f"cpu, bf16, implementation native, 1.2 times shared, 2.5 times reference here, in {steps}"
    ]
