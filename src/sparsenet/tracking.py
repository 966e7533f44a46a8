"""Following a run elsewhere: TensorBoard, Trackio, Weights & Biases, MLflow.

Trackers see what ``train`` yields. Each works in a thread of its own behind a bounded queue, since
what they do is done by other people's code, files and servers: one that fails or hangs is told in
one line and is off, and the run neither stops nor waits for it.

To add one, write its class and enter it in ``TRACKERS`` and in ``config.TRACKERS``.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module, util
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from sparsenet.events import Concluded, EpochDone, Event, Message, Step, Stopped
from sparsenet.extras import MissingExtra, install_hint, require
from sparsenet.files import read_json
from sparsenet.run import PICTURES, Run
from sparsenet.schedule import OptimConfig, learning_rate
from sparsenet.texts import printable

POINTS = 100  # of an epoch, at most, from its steps
WAITING = 1000  # readings that wait for a tracker; further ones are left out
PATIENCE = 120.0  # seconds for one call, after which a tracker is taken for hung
# Seconds after which it is looked at again: a process that was suspended has waited by itself.
SECOND_LOOK = 5.0
# Seconds for what still waits when the run ends, by how it ends; who was told to stop has few.
AT_THE_END = {"FINISHED": 60.0, "KILLED": 10.0, "FAILED": 10.0}
LONGEST = 500  # characters of a setting, such as a topology that is a table
PROJECT = "sparsenet"
KINDS = 3  # of readings at one step: of the step, of its epoch, of the whole run

Values = dict[str, float]
_threads: list[threading.Thread] = []


class Start(NamedTuple):
    """What a tracker begins with."""

    folder: Path  # its own in the run folder
    name: str
    id: str  # of the run that it goes on with; empty for a new one
    settings: dict[str, bool | int | float | str]  # by names such as ``optim.lr``

    def made(self) -> Path:
        """The folder, once it is there."""
        self.folder.mkdir(exist_ok=True)
        return self.folder


class Tracker(Protocol):
    """What a tracker does, in a thread of its own. All of it may raise anything."""

    id: str  # by which a resumed run finds what was tracked

    def log(self, step: int, values: Values) -> None: ...
    def picture(self, step: int, file: Path) -> None: ...
    def result(self, step: int, values: dict[str, Any]) -> None: ...
    def finish(self, status: str) -> None:
        """*status* is ``FINISHED``, ``KILLED`` (it can be resumed) or ``FAILED``."""


class TensorBoard:
    """Event files in the run folder, written by PyTorch's own writer."""

    def __init__(self, start: Start):
        self.id = start.id or "tensorboard"
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(start.folder))
        if not start.id:
            summary = import_module("torch.utils.tensorboard.summary")
            for each in summary.hparams(start.settings, {"result/error": 0.0}):
                self.writer.file_writer.add_summary(each)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, file: Path) -> None:
        with require("PIL.Image", "train").open(file) as image:
            pixels = require("numpy", "train").asarray(image.convert("RGB"))
        self.writer.add_image(file.stem, pixels, step, dataformats="HWC")

    def result(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(f"result/{name}", value, step)
            else:
                self.writer.add_scalar(f"result/{name}", value, step)

    def finish(self, status: str) -> None:
        self.writer.close()


class Trackio:
    """Trackio's database in the user's cache, or wherever its own variables say."""

    def __init__(self, start: Start):
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self.module = import_module("trackio")
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "trackio":
                vars(module)["print"] = _silent  # not into the lines of the run
        self.id = start.id or f"{start.name}-{secrets.token_hex(3)}"
        given = {"config": start.settings, "resume": "allow", "embed": False}
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False}
        self.run = self.module.init(PROJECT, self.id, **given, **quiet)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step)

    def picture(self, step: int, file: Path) -> None:
        self.log(step, {file.stem: self.module.Image(str(file))})

    def result(self, step: int, values: dict[str, Any]) -> None:
        self.log(step, {f"result/{name}": value for name, value in values.items()})

    def finish(self, status: str) -> None:
        self.run.finish()


class WandB:
    """Weights & Biases: files in the run folder, which ``wandb sync`` sends.

    The user's ``WANDB_MODE=online`` sends them at once.
    """

    def __init__(self, start: Start):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.module = import_module("wandb")
        self.id = start.id or secrets.token_hex(4)
        self.run = self.module.init(
            project=PROJECT,
            id=self.id,
            name=start.name,
            dir=str(start.made()),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            config=None if start.id else start.settings,
            settings=self.module.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, file: Path) -> None:
        self.log(step, {file.stem: self.module.Image(str(file))})

    def result(self, step: int, values: dict[str, Any]) -> None:
        self.run.summary.update({f"result/{name}": value for name, value in values.items()})

    def finish(self, status: str) -> None:
        self.run.finish(exit_code=int(status == "FAILED"))


class MLflow:
    """A database in the run folder, or the server of the user's ``MLFLOW_TRACKING_URI``."""

    def __init__(self, start: Start):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        module = import_module("mlflow")
        for name in ("mlflow", "alembic"):  # which tell how they make a database
            logging.getLogger(name).setLevel(logging.ERROR)
        self.entities = import_module("mlflow.entities")
        place = os.environ.get("MLFLOW_TRACKING_URI")
        files = None if place else (start.folder / "files").absolute().as_uri()
        place = place or f"sqlite:///{start.made().absolute() / 'mlflow.db'}"
        self.client = module.MlflowClient(tracking_uri=place)
        if start.id:
            self.id = start.id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(self._experiment(files), run_name=start.name).info.run_id
        settings = [self.entities.Param(*each) for each in start.settings.items()]
        for first in range(0, len(settings), 100):  # as many as it takes at a time
            self.client.log_batch(self.id, params=settings[first : first + 100])

    def _experiment(self, files: str | None) -> Any:
        for is_last in (False, True):
            if known := self.client.get_experiment_by_name(PROJECT):
                return known.experiment_id
            try:
                return self.client.create_experiment(PROJECT, files)
            except Exception:  # another run that begins now may have made it
                if is_last:
                    raise
        raise AssertionError

    def log(self, step: int, values: Values) -> None:
        now = int(time.time() * 1000)
        pairs = values.items()
        metrics = [self.entities.Metric(name, value, now, step) for name, value in pairs]
        self.client.log_batch(self.id, metrics=metrics)

    def picture(self, step: int, file: Path) -> None:
        self.client.log_artifact(self.id, str(file), "pictures")

    def result(self, step: int, values: dict[str, Any]) -> None:
        numbers = {n: value for n, value in values.items() if not isinstance(value, str)}
        self.log(step, {f"result/{name}": value for name, value in numbers.items()})
        for name in values.keys() - numbers.keys():
            self.client.set_tag(self.id, f"result/{name}", values[name])

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.id, status)


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def _silent(*values: object, **options: object) -> None: ...


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)[:LONGEST]


def require_all(names: Iterable[str]) -> None:
    """Raises ``MissingExtra`` where a tracker is not installed; imports none."""
    for name in names:
        found = name in sys.modules or util.find_spec(name)
        if not found or not getattr(found, "origin", True):  # a folder that a tracker wrote
            hint = install_hint(name)
            raise MissingExtra(f"--track {name}: expected the package {name}, found none: {hint}")


def tracked(
    events: Iterable[Event], run: Run, names: Sequence[str]
) -> Generator[Event, None, None]:
    """Yields *events* as they come, lets the trackers of these *names* see them, and tells of them.

    A run that is resumed goes on where each tracker had come to: what was tracked is not again.
    """
    if not names:
        yield from events
        return
    feeds: list[_Feed] = []
    status, last = "FAILED", (0, 0)
    try:
        for event in events:
            if isinstance(event, Step | EpochDone | Concluded) and not feeds:
                feeds += [_Feed(name, run) for name in names]  # now there is a run folder
                optim = run.config().optim
            if isinstance(event, Stopped):
                status = "KILLED"
            elif isinstance(event, Concluded) and status != "KILLED":  # by the time limit
                status = "FINISHED"
            if isinstance(event, EpochDone) or (isinstance(event, Step) and last != _point(event)):
                last = _point(event) if isinstance(event, Step) else last
                for feed in feeds:
                    feed.put(*_reading(event, optim))
            elif isinstance(event, Concluded):
                for feed in feeds:
                    feed.put_end(event, run)
            yield event
            yield from _told(feeds)
    finally:
        _finish(feeds, status)
    yield from _told(feeds)


def any_hangs() -> bool:
    """Whether a tracker works on that was given up, and may keep the process from ending."""
    return any(thread.is_alive() for thread in _threads)


def _told(feeds: Iterable[_Feed]) -> Iterator[Message]:
    for feed in feeds:
        for line in feed.news():
            yield Message(f"tracking: {feed.name} {line}")


def _finish(feeds: Iterable[_Feed], status: str) -> None:
    end = time.monotonic() + AT_THE_END[status]
    for feed in feeds:
        feed.close(status)
    for feed in feeds:
        feed.wait(end)


def _point(step: Step) -> tuple[int, int]:
    return step.epoch, step.step * POINTS // step.steps


def _reading(event: Step | EpochDone, optim: OptimConfig) -> tuple[int, int, Values]:
    """What is tracked of an event: its step in the whole run, its kind and its values."""
    if isinstance(event, EpochDone):
        row = msgspec.to_builtins(event.metrics)
        step = row.pop("step")
        values = {f"epoch/{name}": value for name, value in row.items() if value is not None}
        return step, 1, values
    before = (event.epoch - 1) * event.steps + event.step - 1
    values = {
        "step/loss": event.loss,
        "step/error": event.error,
        "step/lr": learning_rate(optim, before, event.steps, event.epochs),
        "step/images_per_second": event.images_per_second,
    }
    return before + 1, 0, values


def _settings(run: Run) -> dict[str, bool | int | float | str]:
    """The settings of a run and what it runs on, by names such as ``optim.lr``."""
    about = {"environment": read_json(run.file("environment.json"), dict[str, Any])}
    return {
        f"{component}.{name}": _plain(value)
        for component, values in (run.config().to_dict() | about).items()
        for name, value in values.items()
    }


class _Sent:
    """How far a tracker has come with a run, in a file that is there after any end of it.

    It is written before what it says is sent: after a kill something may be missing, and nothing
    is there twice.
    """

    def __init__(self, file: Path):
        reading, _, self.id = (file.read_text() if file.exists() else "").strip().partition(" ")
        self.reading = int(reading) if reading.isdecimal() else -1
        self.file = file

    def write(self, reading: int) -> None:
        self.reading = reading
        with self.file.open("r+" if self.file.exists() else "w") as file:
            file.write(f"{reading:020d} {self.id}\n")  # over the last one, which is as long
            file.truncate()


class _Feed:
    """A tracker in its thread, and the queue between it and the run."""

    def __init__(self, name: str, run: Run):
        self.name, self.run = name, run
        self.queue: queue.Queue[Callable[[Tracker, _Sent], None] | None] = queue.Queue(WAITING)
        self.since: float | None = time.monotonic()  # when the call that it is in began
        self.late = 0.0, 0.0  # the same of a call that takes too long, and when that was seen
        self.trouble = ""  # why it is off
        self.left_out, self.last_step = 0, 0
        self.status = "FAILED"
        self.lines: list[str] = []
        self.is_off = self.is_closed = False
        self.thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self.thread.start()

    def put(self, step: int, kind: int, values: Values) -> None:
        """Has *values* tracked, unless the tracker is too far behind."""
        self.last_step = step
        self._put(KINDS * step + kind, lambda tracker: tracker.log(step, values))

    def put_end(self, event: Concluded, run: Run) -> None:
        """Has the result and the pictures tracked."""
        step = max([self.last_step, *(row.step or 0 for row in run.metrics()[-1:])])
        values = msgspec.to_builtins(event.result).items()
        plain = {name: value for name, value in values if isinstance(value, int | float | str)}
        pictures = [run.path / name for name in PICTURES]

        def send(tracker: Tracker) -> None:
            tracker.result(step, plain)
            for picture in filter(Path.is_file, pictures):
                tracker.picture(step, picture)

        self._put(KINDS * step + 2, send)

    def _put(self, reading: int, send: Callable[[Tracker], None]) -> None:
        def send_once(tracker: Tracker, sent: _Sent) -> None:
            if reading > sent.reading:
                sent.write(reading)
                send(tracker)

        try:
            self.queue.put_nowait(send_once)
        except queue.Full:
            self.left_out += not self.is_off

    def close(self, status: str) -> None:
        """Has the tracker finish once it has done what waits."""
        self.status, self.is_closed = status, True
        with suppress(queue.Full):  # where it sees that it is closed after what waits
            self.queue.put_nowait(None)

    def wait(self, end: float) -> None:
        if not self.is_off:  # given up long ago
            self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            seconds = AT_THE_END[self.status]
            self.trouble = self.trouble or f"has not finished within {seconds:g} s"
            _threads.append(self.thread)

    def news(self) -> Iterator[str]:
        """What is to be told, once."""
        if self.is_off:
            return
        since, now = self.since, time.monotonic()  # read once: the thread sets it to None
        if not self.trouble and since and now - since > PATIENCE:
            if self.late[0] != since:
                self.late = since, now
            elif now - self.late[1] >= SECOND_LOOK:
                self.trouble = f"has not answered for {PATIENCE:g} s"
        if self.trouble:
            self.is_off = True
            yield f"{self.trouble}; the run does without it"
        elif self.left_out and not self.thread.is_alive():
            yield f"was slower than the run: {self.left_out} readings were left out"

    def _work(self) -> None:
        try:
            folder = self.run.file("tracking")
            folder.mkdir(exist_ok=True)
            sent = _Sent(folder / f"{self.name}.sent")
            name = printable(self.run.path.resolve().name)
            start = Start(folder / self.name, name, sent.id, _settings(self.run))
            tracker = TRACKERS[self.name](start)
            sent.id = tracker.id
            sent.write(sent.reading)
            while not (self.is_closed and self.queue.empty()):
                self.since = None
                send = self.queue.get()
                self.since = time.monotonic()
                if send:
                    send(tracker, sent)
                if self.trouble:  # it was given up
                    return
            tracker.finish(self.status)
            self.since = None
        except BaseException as error:  # noqa: BLE001  somebody else's code can raise anything
            self.trouble = f"failed ({type(error).__name__}: {' '.join(str(error).split())})"
