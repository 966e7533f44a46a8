"""How a training run looks while it goes on: a live bar on a terminal, plain lines elsewhere.

All that the program prints of names and errors goes through ``say`` and ``warn``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from sparsenet.data.errors import count_images
from sparsenet.events import Concluded, EpochDone, Event, Message, Reading, Step, Stopped
from sparsenet.extras import require
from sparsenet.results import likely_range
from sparsenet.run import Run
from sparsenet.texts import one_line, printable

# Columns of a terminal that have room beside the bar for loss and error; and for images/s.
NARROW, WIDE = 60, 84


def say(*lines: str, flush: bool = False) -> None:
    """Prints lines, with escapes for what a terminal would obey."""
    print("\n".join(map(printable, lines)), flush=flush)


def warn(line: str) -> None:
    """Prints a line on stderr, escaped in the same way."""
    print(one_line(line), file=sys.stderr)


def display(events: Iterable[Event], run: Run, quiet: bool = False) -> str | None:
    """Shows the events of a run as they come, unless *quiet*, and writes lines to train.log.

    Returns the reason why the run stopped early, if it did.
    """
    reason = None
    bar = _Bar() if sys.stdout.isatty() and not quiet else None
    with bar.progress if bar else nullcontext():
        for event in events:
            if isinstance(event, Stopped):
                reason = event.reason
            if isinstance(event, Reading | Step):
                if bar:
                    bar.show(event)
                continue
            line = one_line(_line(event))
            if bar:
                bar.print(line)
            elif not quiet:
                say(line)
                sys.stdout.flush()
            if not isinstance(event, Stopped) or event.saved:
                run.log(line)
    return reason


def _line(event: Message | EpochDone | Stopped | Concluded) -> str:
    match event:
        case Message(text):
            return text
        case EpochDone():
            return _epoch_line(event)
        case Stopped(reason, saved):
            return f"{'saved and stopped' if saved else 'stopped before the first step'}: {reason}"
        case Concluded(result):
            # Of five classes every one is among the five most probable.
            remark = result.scores.remark if result.scores else ""
            top5 = f", top-5 {result.top5_error:.2f} %" if len(result.classes) > 5 else ""
            likely = likely_range(result.error, result.images)
            count = f" of {count_images(result.images)}" * bool(likely)
            return (
                f"{result.dataset}: {result.tested_on} error {result.error:.2f} %"
                f"{count}{likely}{top5} "
                f"({result.checkpoint}, epoch {result.epochs})"
                f"{f'; {remark}' * bool(remark)}"
            )


def _epoch_line(event: EpochDone) -> str:
    row = event.metrics
    figures = [
        f"epoch {row.epoch}/{event.epochs}",
        f"lr {row.lr:.4g}",
        f"loss {row.train_loss:.4f}",
        f"error {row.train_error:.2f} %",
        None if row.val_error is None else f"{event.chosen_on} {row.val_error:.2f} %",
        f"{event.tested_on} {row.test_error:.2f} %",
        f"{row.seconds:.1f} s + {row.eval_seconds:.1f} s",
        f"{row.images_per_second:.0f} images/s",
        None if row.peak_memory_mb is None else f"peak {row.peak_memory_mb:.0f} MB",
    ]
    return "  ".join(figure for figure in figures if figure)


class _Bar:
    def __init__(self) -> None:
        rich = require("rich.progress", "train")
        table = require("rich.table", "train")

        def text(form: str) -> Any:
            return rich.TextColumn(form, table_column=table.Column(no_wrap=True))

        self.progress = rich.Progress(
            text("{task.description}"),
            # Takes what the texts leave of the line, up to 40 characters.
            rich.BarColumn(bar_width=None, table_column=table.Column(max_width=40)),
            text("{task.fields[figures]}"),
            text("{task.fields[clock]}"),
            rich.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.tasks: dict[str, Any] = {}  # by what is counted: the split that is read, or steps

    def show(self, event: Reading | Step) -> None:
        if isinstance(event, Reading):
            self._show(event.split, event.done, event.total, f"reading {event.split}", "")
            return
        done = (event.epoch - 1) * event.steps + event.step
        columns = self.progress.console.width
        figures = f"loss {event.loss:.4f}  error {event.error:.2f} %" if columns >= NARROW else ""
        if columns >= WIDE:
            figures += f"  {event.images_per_second:.0f} images/s"
        total = event.epochs * event.steps
        self._show("steps", done, total, f"epoch {event.epoch}/{event.epochs}", figures)

    def _show(self, counted: str, done: int, total: int, text: str, figures: str) -> None:
        if counted not in self.tasks:  # instead of the one before
            for task in self.tasks.values():
                self.progress.update(task, visible=False)
            self.tasks[counted] = self.progress.add_task("", total=total, figures="", clock="")
        clock = "left" if done < total else "took"
        fields = {"description": text, "figures": figures, "clock": clock}
        self.progress.update(self.tasks[counted], completed=done, **fields)

    def print(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
