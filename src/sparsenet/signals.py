"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

ASKING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Signals:
    """Ctrl-C, SIGTERM and a terminal that goes ask the run to save and end.

    A second one ends it at once, but for the terminal's, of which shells send another. One that
    was ignored before, as by nohup, still is.
    """

    def __init__(self, ends_program: bool = True) -> None:
        """With *ends_program* the second signal ends the process, else it does what it did."""
        self.ends_program = ends_program
        self.number: int | None = None
        self.terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> Signals:
        # Python gives signals to the main thread alone.
        asking = ASKING if threading.current_thread() is threading.main_thread() else []
        self.before: dict[int, Any] = {}
        for number in asking:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self.before[number] = before  # first, as a signal may come at once
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        last = number in (signal.SIGINT, signal.SIGTERM)
        second = signal.SIG_DFL if self.ends_program else self.before[number]
        signal.signal(number, second if last else signal.SIG_IGN)
        for terminal in self.terminals:
            if not os.isatty(terminal):  # it has gone, and what is printed would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    def received(self) -> str | None:
        """The name of the signal that was received, if one was."""
        return None if self.number is None else signal.Signals(self.number).name
