"""The program ``sparsenet``: parses the command line, runs a command, reports errors in one line.

Exit codes: 0 done; 1 a run failed; 2 a bad call (one line on stderr says what was expected and
found); 130, 143 or 129 stopped by Ctrl-C, SIGTERM or a terminal that goes, after saving.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from sparsenet.memory import shortage
from sparsenet.texts import one_line

FAILED, BAD_CALL = 1, 2
SPINS = 30_000  # of a thread that waits for the others, before it gives its core away


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; help and wrong flags load no PyTorch."""
    from importlib import import_module

    from sparsenet import commands, files, flags
    from sparsenet.extras import MissingExtra

    try:
        args = flags.parser().parse(arguments)
        _limit_spinning()
        import_module("sparsenet.device").tune_process()
        logging.getLogger("PIL").addHandler(logging.NullHandler())  # it says it again by an error
        command = import_module(commands.MODULES[args.command])
        if not gc.isenabled():  # what is loaded now stays
            gc.freeze()
            gc.enable()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code: int = command.run(args)
        return code
    except BrokenPipeError:
        raise
    except (ValueError, MissingExtra) as error:
        code, message = BAD_CALL, str(error)
    except OSError as error:
        code, message = FAILED, files.failure(error)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (known := _end_of_a_run(error)):
            raise
        code, message = FAILED, known
    if not _is_said(message):
        _complain(message)
    return code


def _limit_spinning() -> None:
    """Has threads of GNU's OpenMP give their cores away sooner; to be called before PyTorch loads.

    By default a thread that waits for others keeps its core for about 10 ms (300,000 spins). Where
    another process has one of the cores, they wait for each other most of the time, and a step
    takes several times as long. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def _is_said(message: str) -> bool:
    """Whether another process of a run on several says why it ended."""
    ranks = sys.modules.get("sparsenet.ranks")  # not before there can be several
    return bool(ranks and ranks.is_said(message))


def _leaves_threads() -> bool:
    """Whether threads of others outlive Python's own end, or keep it waiting.

    Those by which PyTorch reaches other processes outlive it now and then, and it aborts; that of a
    tracker that hangs may never end.
    """
    ranks, tracking = (sys.modules.get(f"sparsenet.{name}") for name in ("ranks", "tracking"))
    return bool((ranks and ranks.have_joined()) or (tracking and tracking.any_hangs()))


def _complain(message: str) -> None:
    with suppress(OSError):  # the exit code says it where stderr cannot be written
        print(f"sparsenet: {one_line(' '.join(message.split()))}", file=sys.stderr, flush=True)


def _end_of_a_run(error: Exception) -> str | None:
    """What *error* says, if it is a known end of a run and not a fault of the program."""
    if said := shortage(error):  # before anything that takes memory
        return said
    if "backend extension" in str(error):  # a plug-in of PyTorch, without which it is not loaded
        return f"{error} It said: {error.__cause__}"
    from sparsenet.ranks import LostError
    from sparsenet.train import DivergedError

    return str(error) if isinstance(error, DivergedError | LostError) else None


def main() -> NoReturn:
    """Runs the program on the arguments of the process.

    While it loads its libraries, which may swallow an interrupt or turn it into another error,
    Ctrl-C ends the process at once. There is no garbage to look for then, nor at the end, when all
    that was loaded is given back: looking would take up to a second.
    """
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not _open_streams():
        _complain("expected a standard output, found it closed; > /dev/null drops what is printed")
        sys.exit(BAD_CALL)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # else nobody is left to be told
            _complain(f"expected a standard output that can be written, found: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    gc.freeze()
    if _leaves_threads():  # nothing is left to do but to end
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _open_streams() -> bool:
    """Makes the streams take any character; returns whether there is a standard output."""
    found = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; a file of the run must not get its number, and C code's messages
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the process ends
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return found


if __name__ == "__main__":
    main()
