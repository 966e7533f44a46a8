"""The program ``sparsenet``: reads the command line, runs a command, says what went wrong in one line.

Exit codes: 0 done, 1 a run failed, 2 a bad call (one line on stderr says what was expected and found),
130 or 143 stopped by Ctrl-C or SIGTERM after saving.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

FAILED, BAD_CALL = 1, 2


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. Only commands load PyTorch: help and wrong flags need none."""
    from importlib import import_module

    from sparsenet import commands, flags
    from sparsenet.extras import MissingExtra

    try:
        args = flags.parser().parse(arguments)
        import_module("sparsenet.device").tune_process()
        code: int = import_module(commands.MODULES[args.command]).run(args)
        return code
    except BrokenPipeError:
        raise
    except (ValueError, MissingExtra) as error:
        code, message = BAD_CALL, str(error)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_expected(error):
            raise
        code, message = FAILED, str(error)
    said = " ".join(message.split()) or "out of memory"  # only a MemoryError says nothing
    print(f"sparsenet: {said}", file=sys.stderr)
    return code


def _is_expected(error: RuntimeError) -> bool:
    """Whether *error* is the end of a run rather than a fault of the program."""
    import torch

    from sparsenet.train import DivergedError

    return isinstance(error, DivergedError | torch.OutOfMemoryError)


def main() -> NoReturn:
    """The program ``sparsenet``."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
