"""How a training run looks while it goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from sparsenet.events import Concluded, EpochDone, Event, Message, Step, Stopped
from sparsenet.extras import require
from sparsenet.run import Run


def display(events: Iterable[Event], run: Run) -> str | None:
    """Shows the events of a run as they come and keeps their lines in train.log; why it stopped early, if so."""
    reason = None
    with _bar() as bar:
        for event in events:
            if isinstance(event, Step):
                bar.show(event)
            elif isinstance(event, Stopped):
                reason = event.reason
            if line := _line(event):
                bar.print(line)
                run.log(line)
    return reason


def _line(event: Event) -> str | None:
    match event:
        case Message(text):
            return text
        case EpochDone(row, epochs):
            return _epoch_line(row, epochs)
        case Stopped(reason):
            return f"saved and stopped: {reason}"
        case Concluded(result):
            return (
                f"{result['dataset']}: test error {result['error']:.2f} %, top-5 {result['top5_error']:.2f} % "
                f"({result['checkpoint']}, epoch {result['epochs']})"
            )
    return None


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    peak = "" if row["peak_memory_mb"] is None else f"  peak {row['peak_memory_mb']:.0f} MB"
    held = "" if row["val_error"] is None else f"  validation {row['val_error']:.2f} %"
    return (
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}  "
        f"error {row['train_error']:.2f} %{held}  test {row['test_error']:.2f} %  "
        f"{row['seconds']:.1f} s + {row['eval_seconds']:.1f} s  {row['images_per_second']:.0f} images/s{peak}"
    )


def _bar() -> Any:
    return _Bar() if sys.stdout.isatty() else _Plain()


class _Plain:
    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *error: object) -> None: ...

    def show(self, step: Step) -> None: ...

    def print(self, line: str) -> None:
        print(line, flush=True)


class _Bar:
    def __init__(self) -> None:
        progress = require("rich.progress", "train")
        self.progress = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.task: Any = None

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, step: Step) -> None:
        done = (step.epoch - 1) * step.steps + step.step
        figures = (
            f"loss {step.loss:.4f}  error {step.error:.2f} %  {step.images_per_second:.0f} images/s"
        )
        shown = {"completed": done, "epoch": f"{step.epoch}/{step.epochs}", "figures": figures}
        if self.task is None:
            self.task = self.progress.add_task("", total=step.epochs * step.steps, **shown)
        self.progress.update(self.task, **shown)

    def print(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
