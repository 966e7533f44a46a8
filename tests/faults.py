"""Runs the program again and again, each time with a fault at another system call.

One process loads everything once and forks for each fault, so that a fault costs a tenth of a
second; ``faults.c``, which is loaded before the C library, makes the calls fail. With
``FAULT_STRIDE=1`` the tests go through all calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
KILL = 0
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
RUN = (
    *("--depth", "7", "--growth_rate", "4", "--max_epoch", "1", "--batch_size", "720"),
    *("--save_every", "0", "--implementation", "reference", "--precision", "fp32"),
)


def compile_faults(folder: Path) -> Path:
    """The library of ``faults.c``; ``OSError`` or ``CalledProcessError`` where there is none."""
    library = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def search(folder: Path, stride: int, shift: int = 0) -> dict[str, Any]:
    """Makes faults in a process of its own; returns what it prints."""
    environment = os.environ | {
        "LD_PRELOAD": str(compile_faults(folder)),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }
    command = [sys.executable, __file__, str(stride), str(shift)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _draw(*arguments: object) -> None:
    from sparsenet.files import write_atomic

    write_atomic(next(each for each in arguments if isinstance(each, Path)), bytes(1000))


class Laboratory:
    """Runs of the program in forked processes, below *folder*."""

    def __init__(self, folder: Path):
        import torch

        from sparsenet import cli, device, pictures, run

        torch.set_num_threads(1)
        device.tune_process()
        for name in ("draw_curves", "draw_confusion", "draw_samples"):
            setattr(pictures, name, _draw)  # drawing takes a second; writing is the same
        installed = run.installed()
        run.installed = lambda: installed
        self.folder, self.cli, self.faults = folder, cli, ctypes.CDLL(None)
        self.whole, self.half = folder / "whole", folder / "half"
        with contextlib.redirect_stdout(io.StringIO()):
            cli.run(["train", *RUN, "--out", str(self.whole)])  # loads what a run loads
        self.calls = {"new": self.attempt("new", folder / "new", 0, KILL, False)[2]}
        self.attempt("new", self.half, self.calls["new"] * 2 // 3, KILL, False)
        assert list((self.half / "checkpoints").glob("last-*.json"))  # which are there to lose
        self.calls["resume"] = self.attempt("resume", self.copy("count"), 0, KILL, False)[2]

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.half, self.folder / name))

    def attempt(
        self, kind: str, run: Path, place: int, error: int, lasting: bool
    ) -> tuple[int, str, int]:
        """Exit code (negative: a signal), stderr, and the number of calls that concern *run*."""
        said, counted = self.folder / "said", self.folder / "calls"
        counted.unlink(missing_ok=True)
        if not (child := os.fork()):
            code = 70
            try:
                output = os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                flag = ("--resume",) if kind == "resume" else (*RUN, "--out")
                self.faults.arm(os.fsencode(run), ctypes.c_long(place), error, lasting)
                try:
                    code = self.cli.run(["train", *flag, str(run)])
                finally:
                    calls = self.faults.disarm()
                counted.write_text(str(calls))
            except BaseException:  # noqa: BLE001 - as at the end of a process
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return (
            os.waitstatus_to_exitcode(status),
            said.read_text(),
            int(counted.read_text()) if counted.exists() else 0,
        )

    def problem(self, kind: str, place: int, error: int, lasting: bool) -> str | None:
        """What is wrong after this fault, or ``None``."""
        run = self.folder / "faulty"
        shutil.rmtree(run, ignore_errors=True)
        if kind == "resume":
            self.copy("faulty")
        code, said, _ = self.attempt(kind, run, place, error, lasting)
        if error != KILL and code not in (0, 1, 2):
            return f"exit code {code}: {said}"
        if error != KILL and len(said.splitlines()) != (code > 0):
            return f"exit code {code}, but said {said}"
        if kind == "resume" and (lost := self._lost(run)):
            return lost
        again = "resume" if (run / "config.json").exists() else "new"
        code, said, _ = self.attempt(again, run, 0, KILL, False)
        if code:
            return f"stuck: {again} gives {code}: {said}"
        return self._difference(run)

    def _lost(self, run: Path) -> str | None:
        from sparsenet.checkpoints import RunError, restore

        try:
            restore(run / "checkpoints", "last")
        except RunError as error:
            return f"lost: {error}"
        return None

    def _difference(self, run: Path) -> str | None:
        from safetensors.torch import load_file

        from sparsenet.checkpoints import restore

        for kind in ("last", "best"):
            first, second = (restore(each / "checkpoints", kind)[0] for each in (run, self.whole))
            files = [each.path.with_suffix(".safetensors") for each in (first, second)]
            ours, theirs = map(load_file, files)
            if first.manifest.step != second.manifest.step or ours.keys() != theirs.keys():
                return f"{kind}: of another step or with other tensors"
            if other := [name for name in ours if not ours[name].equal(theirs[name])]:
                return f"{kind}: other numbers in {other[0]}"
        names = [{path.name for path in each.iterdir()} for each in (run, self.whole)]
        if lacking := names[1] - names[0]:
            return f"without {', '.join(sorted(lacking))}"
        return None


def jobs(calls: dict[str, int], stride: int, shift: int) -> Iterator[tuple[str, int, int, bool]]:
    """A kill, and an error that lasts or not, at every *stride*-th call of both kinds of run."""
    for kind, count in calls.items():
        for number, place in enumerate(range(1 + shift % stride, count + 1, stride), shift):
            yield kind, place, KILL, False
            yield kind, place, ERRORS[number % len(ERRORS)], number % 2 == 0


def main(stride: int = 1, shift: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder))
        counts, problems = {"kills": 0, "errors": 0}, []
        for kind, place, error, lasting in jobs(laboratory.calls, stride, shift):
            counts["errors" if error else "kills"] += 1
            if found := laboratory.problem(kind, place, error, lasting):
                name = errno.errorcode.get(error, "kill")
                problems.append(f"{kind}, call {place}, {name}, lasting {lasting}: {found}")
                print(problems[-1], file=sys.stderr)
        print(json.dumps({"calls": laboratory.calls, **counts, "problems": problems}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
