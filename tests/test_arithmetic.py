"""A run records what it chose for ``auto``, so that resuming it stays bit-exact."""

import json

import pytest
import torch
from conftest import CPU, Call, Found
from test_train import assert_same, finished, outcome, tiny

from sparsenet import arithmetic
from sparsenet.arithmetic import Arithmetic, choose_arithmetic, describe_choice
from sparsenet.checkpoints import RunError
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


def test_a_run_with_a_damaged_record_is_refused(tmp_path):
    run = stopped(tmp_path / "run", tiny())
    (run.path / "environment.json").write_text("[")
    with pytest.raises(RunError, match=r"environment\.json: .*without that file"):
        lines(train(tiny(), run, resume=True))


@pytest.mark.parametrize("lost", ["names", "file"])
def test_a_run_without_the_record_goes_on_in_its_precision(lost, found, tmp_path):
    found(SLOW, bf16=FAST)
    run = stopped(tmp_path / "run", tiny())
    file = run.path / "environment.json"
    file.write_text("{}")
    if lost == "file":
        file.unlink()
    found(FAST, bf16=FAST)
    assert "1.1 times" not in "".join(lines(train(tiny(), run, resume=True)))
    assert recorded(run) == ("bf16", "shared")


@pytest.mark.parametrize("changed", ["file", "record"])
def test_a_run_goes_on_in_no_other_precision(changed, found, call: Call, tmp_path):
    found(SLOW, bf16=FAST)
    run = stopped(tmp_path / "run", tiny())
    file = run.path / "environment.json"
    if changed == "file":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"bf16"', '"fp32"'))
    found(FAST, bf16=SLOW)
    outcome = call("train", "--resume", "run")
    assert outcome.code == 2
    assert "precision 'bf16' -> 'fp32'; go on with --precision bf16" in outcome.error
    assert call("train", "--resume", "run", "--precision", "bf16").code == 0
    assert recorded(run)[0] == "bf16"


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
    began = Arithmetic("bf16", "shared")
    assert choose_arithmetic(asked, CPU, began) == Arithmetic("fp32", "reference")
    assert choose_arithmetic(TrainConfig(memory="lean"), CPU).implementation == "shared"
    assert choose_arithmetic(TrainConfig(), CPU).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^implementation: 'triton' cannot run here"):
        choose_arithmetic(TrainConfig(implementation="triton"), torch.device("meta"))


@pytest.mark.parametrize(
    ("asked", "previous", "unchanged"),
    [
        ({}, Arithmetic("bf16", "reference"), True),
        ({"implementation": "shared"}, Arithmetic("bf16", "reference"), False),
        ({}, Arithmetic("bf16"), False),
        ({}, Arithmetic(), False),
    ],
)
def test_what_a_resumed_run_had_is_used_and_said(asked, previous, unchanged, found):
    found(FAST, bf16=FAST)
    config = TrainConfig(**asked)
    arithmetic = choose_arithmetic(config, CPU, previous)
    assert (arithmetic == previous) == unchanged
    line = next(describe_choice(arithmetic, config, CPU, previous))
    assert line.endswith(", as the run began") == unchanged


def test_the_log_says_which_and_by_how_much(found: Found, monkeypatch):
    def told(**asked):
        config = TrainConfig(**asked)
        return list(describe_choice(choose_arithmetic(config, CPU), config, CPU))

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


def test_no_fewer_epochs_than_have_begun(call: Call, tmp_path):
    small = ("--depth", 7, "--growth_rate", 4, "--max_epoch", 2)
    assert call("train", "--out", "run", *small).code == 0
    result = (tmp_path / "run" / "result.json").read_text()
    outcome = call("train", "--resume", "run", "--max_epoch", 1)
    assert outcome.code == 2
    assert "expected --max_epoch of at least 2, as many as have begun, found 1" in outcome.error
    assert (tmp_path / "run" / "result.json").read_text() == result
