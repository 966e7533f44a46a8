"""Trackers see each step of a run once, and none of them stops it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import TINY, Call

from sparsenet import cli, config, tracking
from sparsenet.events import Concluded, EpochDone, Event, Message, Step, Stopped
from sparsenet.results import EpochMetrics, TrainingResult
from sparsenet.run import Run
from sparsenet.schedule import learning_rate
from sparsenet.tracking import TRACKERS, tracked

STEPS = 4  # of an epoch
RESULT = TrainingResult(
    "digits", 5.0, 1.0, 0.25, 9, 1.0, 2, "last epoch", ("a", "b"), {"a": 5.0, "b": None}
)


def events(first: int, last: int, epochs: int = 9, ends: bool = True) -> Iterator[Event]:
    """Those of the steps *first* to *last*, and of the end of the run."""
    for step in range(first, last + 1):
        epoch, within = (step - 1) // STEPS + 1, (step - 1) % STEPS + 1
        yield Step(epoch, within, STEPS, epochs, 1 / step, 50.0, 100.0)
        if within == STEPS:
            yield EpochDone(EpochMetrics(epoch, step, 0.5, test_error=10.0 / epoch), epochs)
    yield Concluded(RESULT) if ends else Stopped("SIGTERM")


Sent = list[tuple[Any, ...]]


class Fakes:
    """Modules in the place of the real ones, which keep what they are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.sent: Sent = []
        self.begun: Sent = []
        for name in ("wandb", "trackio", "trackio.run", "mlflow", "mlflow.entities"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name in ("wandb", "trackio"):
            module = sys.modules[name]
            vars(module).update(init=self.init, Image=lambda file: Path(file).name)
            vars(module).update(Settings=lambda **given: given)
        vars(sys.modules["mlflow"]).update(MlflowClient=lambda tracking_uri: self)
        vars(sys.modules["mlflow.entities"]).update(
            Metric=SimpleNamespace, Param=lambda *pair: pair
        )
        vars(sys.modules["mlflow.entities"]).update(Metric=self.metric)
        self.create_experiment = lambda *given: "1"

    # Weights & Biases, and Trackio
    def init(self, *given: object, **named: Any) -> Fakes:
        self.begun.append((named.get("id") or given[1], named["config"]))
        self.named = named
        return self

    @property
    def summary(self) -> Fakes:
        return self

    def update(self, values: dict[str, Any]) -> None:
        self.sent.append(("result", values))

    def log(self, values: dict[str, Any], step: int) -> None:
        kind = "result" if "result/error" in values else "log"
        self.sent.append((kind, step, values) if kind == "log" else (kind, values))

    def finish(self, exit_code: int = 0) -> None:
        self.sent.append(("finish", exit_code))

    # MLflow
    def metric(self, name: str, value: float, time: int, step: int) -> tuple[str, float, int]:
        return name, value, step

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.begun.append(("run 7", {}))
        return SimpleNamespace(info=SimpleNamespace(run_id="run 7"))

    def update_run(self, run_id: str, status: str) -> None:
        self.begun.append((run_id, None))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.begun[-1][1].update(params) if params else None
        values = {name: value for name, value, _ in metrics}
        if "result/error" in values:
            self.sent.append(("result", values))
        elif metrics:
            self.sent.append(("log", metrics[0][2], values))

    def log_artifact(self, run_id: str, file: str, folder: str) -> None:
        self.sent.append(("log", 0, {Path(file).stem: Path(file).name}))

    def set_tag(self, run_id: str, name: str, value: str) -> None: ...

    def set_terminated(self, run_id: str, status: str) -> None:
        self.sent.append(("finish", int(status == "FAILED")))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def pictures(sent: Sent) -> list[str]:
    return [
        value
        for kind, *_, values in sent
        if kind == "log"
        for value in values.values()
        if isinstance(value, str)
    ]


def steps(sent: Sent, name: str) -> list[int]:
    return [each[1] for each in sent if each[0] == "log" and name in each[2]]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_resumed_run_goes_on_in_what_was_tracked(fakes: Fakes, copied: Path, name: str) -> None:
    run = Run(copied.rename(copied.with_name("my 1st run")))
    assert list(tracked(events(1, 6, ends=False), run, [name])) == [*events(1, 6, ends=False)]
    assert fakes.sent.pop() == ("finish", 0)
    [*tracked(events(5, 8), run, [name])]  # from a checkpoint before the last step
    assert steps(fakes.sent, "step/loss") == [*range(1, 9)]
    assert steps(fakes.sent, "epoch/test_error") == [4, 8]
    drawn = sorted(path.name for path in run.path.glob("*.png"))
    assert "curves.png" in drawn and sorted(pictures(fakes.sent)) == drawn
    assert fakes.sent[-1] == ("finish", 0)
    (result,) = [values for kind, *_, values in fakes.sent if kind == "result"]
    assert (result["result/error"], result["result/epochs"]) == (5.0, 2)
    sent = len(fakes.sent)
    [*tracked([Concluded(RESULT)], run, [name])]  # there was nothing left to train
    assert len(fakes.sent) == sent + 1
    (first, settings), *rest = fakes.begun
    assert [id for id, _ in rest] == [first, first]
    assert settings["optim.momentum"] == 0.9 and "environment.torch" in settings


def test_the_learning_rate_of_a_step_is_that_of_the_schedule(fakes: Fakes, copied: Path) -> None:
    [*tracked(events(1, 12), Run(copied), ["wandb"])]
    optim = Run(copied).config().optim
    rates = [each[2]["step/lr"] for each in fakes.sent if each[0] == "log" and "step/lr" in each[2]]
    assert rates == [learning_rate(optim, step, STEPS, 9) for step in range(12)]
    assert fakes.named["mode"] == "offline"


def test_an_epoch_of_many_steps_is_thinned_out(fakes: Fakes, copied: Path) -> None:
    many = [Step(1, step, 1000, 1, 1.0, 1.0, 1.0) for step in range(1, 1001)]
    [*tracked(many, Run(copied), ["wandb"])]
    found = steps(fakes.sent, "step/loss")
    assert len(found) == tracking.POINTS + 1 and found[-1] == 1000


def ended_feed(run: Path) -> tracking._Feed:
    """One whose thread no longer changes it."""
    feed = tracking._Feed("wandb", Run(run))
    feed.close("FINISHED")
    feed.thread.join()
    return feed


def test_a_call_that_ends_while_its_time_is_looked_at(
    fakes: Fakes, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = ended_feed(copied)

    def ends() -> float:
        feed.since = None
        return 10 * tracking.PATIENCE

    monkeypatch.setattr(tracking.time, "monotonic", ends)
    feed.since = 1.0
    assert list(feed.news()) == []


def test_a_process_that_was_suspended_keeps_its_tracker(
    fakes: Fakes, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = ended_feed(copied)
    late, second = 1 + 2 * tracking.PATIENCE, tracking.SECOND_LOOK
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    feed.since, now = 1.0, late
    assert list(feed.news()) == []
    feed.since, now = late + 1, late + 2 + second  # it had waited itself, and another call began
    assert list(feed.news()) == []
    feed.since, now = 1.0, late
    assert list(feed.news()) == []
    now = late + second
    assert list(feed.news()) == ["has not answered for 120 s; the run does without it"]


def test_runs_that_begin_together_share_an_experiment(fakes: Fakes, copied: Path) -> None:
    there: list[SimpleNamespace] = []

    def taken(*given: object) -> str:  # by the other one, since it was looked for
        there.append(SimpleNamespace(experiment_id="2"))
        raise RuntimeError("RESOURCE_ALREADY_EXISTS")

    fakes.create_experiment = taken
    vars(fakes)["get_experiment_by_name"] = lambda name: there[0] if there else None
    assert lines([*tracked(events(1, 8), Run(copied), ["mlflow"])]) == []
    there.clear()
    shutil.rmtree(copied / "tracking")
    vars(fakes)["get_experiment_by_name"] = lambda name: None
    (line,) = lines([*tracked(events(1, 8), Run(copied), ["mlflow"])])
    assert "mlflow failed (RuntimeError: RESOURCE_ALREADY_EXISTS)" in line


def lines(found: list[Event]) -> list[str]:
    return [event.text for event in found if isinstance(event, Message)]


@pytest.mark.parametrize("broken", ["init", "log", "summary", "finish", "Image", "Settings"])
def test_a_tracker_that_fails_is_told_once_and_is_off(
    fakes: Fakes, copied: Path, broken: str
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise SystemExit("gone\nfor good")

    if broken == "summary":
        fakes.update = fail  # type: ignore[method-assign]
    for owner in (fakes, sys.modules["wandb"]):
        if hasattr(owner, broken) and broken != "summary":
            setattr(owner, broken, fail)
    found = list(tracked(events(1, 8), Run(copied), ["wandb"]))
    expected = "tracking: wandb failed (SystemExit: gone for good); the run does without it"
    assert lines(found) == [expected]
    assert [event for event in found if not isinstance(event, Message)] == [*events(1, 8)]


def test_a_tracker_that_hangs_is_left_behind(
    fakes: Fakes, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(fakes, "log", lambda *given, **named: released.wait())
    monkeypatch.setattr(tracking, "AT_THE_END", dict.fromkeys(tracking.AT_THE_END, 0.05))
    monkeypatch.setattr(tracking, "WAITING", 2)
    given = [*events(1, 8)]
    found = list(tracked(given, Run(copied), ["wandb"]))
    told = "tracking: wandb has not finished within 0.05 s; the run does without it"
    assert found == [*given, Message(told)]
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)
    monkeypatch.setattr(tracking, "SECOND_LOOK", 0.0)

    def slowly() -> Iterator[Event]:
        for event in given:
            time.sleep(0.01)  # so that its thread comes to hang
            yield event

    shutil.rmtree(copied / "tracking")
    found = list(tracked(slowly(), Run(copied), ["wandb"]))
    told = "tracking: wandb has not answered for 0 s; the run does without it"
    assert lines(found) == [told]
    # What hangs may keep Python from ending, so the program does not let it.
    ended: list[int] = []
    monkeypatch.setattr(cli, "run", lambda arguments: 7)
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    for name in ("disable", "freeze"):
        monkeypatch.setattr(cli.gc, name, lambda: None)
    monkeypatch.setattr(cli, "_open_streams", lambda: True)
    monkeypatch.setattr(cli.signal, "signal", lambda *given: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert ended == [7]
    released.set()
    for thread in tracking._threads:
        thread.join()
    ended.clear()
    with pytest.raises(SystemExit):
        cli.main()
    assert not ended


def test_a_slow_tracker_leaves_out_and_says_so(
    fakes: Fakes, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "WAITING", 2)
    may_begin = threading.Event()
    original = fakes.init

    def slow(*given: object, **named: Any) -> Fakes:
        may_begin.wait()
        return original(*given, **named)

    monkeypatch.setattr(sys.modules["wandb"], "init", slow)

    def watched() -> Iterator[Event]:
        yield from events(1, 8)
        may_begin.set()

    found = list(tracked(watched(), Run(copied), ["wandb"]))
    assert lines(found) == ["tracking: wandb was slower than the run: 9 readings were left out"]
    assert steps(fakes.sent, "step/loss") == [1, 2]
    assert fakes.sent[-1] == ("finish", 0)


def test_an_error_of_the_run_is_told_to_its_tracker(fakes: Fakes, copied: Path) -> None:
    def breaking() -> Iterator[Event]:
        yield from events(1, 2, ends=False)
        raise ValueError("broken")

    def train(make: Callable[[], Iterator[Event]]) -> None:
        [*tracked(make(), Run(copied), ["wandb"])]

    with pytest.raises(ValueError, match="broken"):
        train(breaking)
    assert fakes.sent[-1] == ("finish", 0)  # it was stopped before, and can be resumed
    shutil.rmtree(copied / "tracking")

    def failing() -> Iterator[Event]:
        yield next(events(1, 2))
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train(failing)
    assert fakes.sent[-1] == ("finish", 1)


def test_what_is_asked_for_must_be_there_and_nothing_else_is_imported(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(TRACKERS) == set(config.TRACKERS)
    for name in (*TRACKERS, "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(tracking, "util", SimpleNamespace(find_spec=lambda name: None))
    outcome = call("train", *TINY, "--track", "wandb", "--out", "run")
    assert outcome.code == 2 and "--track wandb: expected the package wandb" in outcome.error
    assert "pip install" in outcome.error
    assert not Path("run").exists()
    folder = SimpleNamespace(origin=None)  # as of one that is named wandb and lies here
    monkeypatch.setattr(tracking, "util", SimpleNamespace(find_spec=lambda name: folder))
    assert call("train", *TINY, "--track", "wandb", "--out", "run") == outcome
    outcome = call("train", *TINY, "--track", "wandb,tensorbord", "--out", "run")
    assert outcome.code == 2 and "track: expected none, or with commas some of" in outcome.error
    for name in (*TRACKERS, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing one would fail
    outcome = call("train", *TINY, "--max_epoch", 1, "--out", "run")
    assert outcome.code == 0 and "track" not in outcome.out
    assert not Path("run/tracking").exists()


def test_a_run_with_a_broken_and_a_hanging_tracker_ends_well(
    call: Call, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no")

    vars(sys.modules["wandb"]).update(init=fail)
    vars(sys.modules["mlflow"]).update(MlflowClient=lambda tracking_uri: released.wait())
    ends = dict.fromkeys(tracking.AT_THE_END, 0.05)
    monkeypatch.setattr(tracking, "AT_THE_END", ends)
    outcome = call("train", *TINY, "--max_epoch", 1, "--track", "wandb,mlflow", "--out", "run")
    released.set()
    assert outcome.code == 0 and outcome.lines[-1] == "run"
    told = [line.split(" ", 2)[:2] for line in outcome.lines if line.startswith("tracking:")]
    assert sorted(told) == [["tracking:", "mlflow"], ["tracking:", "wandb"]]
    assert "tracking: wandb failed (RuntimeError: no)" in Path("run/train.log").read_text()


def test_tensorboard_reads_back_what_was_measured(call: Call) -> None:
    pytest.importorskip("tensorboard")
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = (*TINY, "--max_epoch", 2, "--track", "tensorboard", "--out", "run")
    assert call("train", *arguments, "--time_limit", 1e-6).code == 0  # one step
    outcome = call("train", "--resume", "run", "--time_limit", 0)  # where it is tracked is kept
    assert outcome.code == 0, outcome
    rows = Run(Path("run")).metrics()
    found = events_of.EventAccumulator("run/tracking/tensorboard")
    found.Reload()
    assert [each.step for each in found.Scalars("step/loss")] == [*range(1, 47)]
    assert found.Scalars("step/error")[-1].value == pytest.approx(rows[-1].train_error)
    for column in ("lr", "train_loss", "test_error", "images_per_second"):
        points = found.Scalars(f"epoch/{column}")
        assert [each.step for each in points] == [row.step for row in rows]
        expected = [dataclasses.asdict(row)[column] for row in rows]
        assert [each.value for each in points] == pytest.approx(expected)
    assert found.Scalars("result/error")[-1].value == pytest.approx(rows[-1].test_error)
    assert {"curves", "confusion", "samples"} <= set(found.Tags()["images"])
