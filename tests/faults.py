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
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Fault = Callable[[], object]  # called in the process that is to have it
Job = tuple[str, str, Callable[[Path], Fault], bool]  # name, kind of run, fault, whether it kills

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


def search(folder: Path, what: str, stride: int, shift: int = 0) -> dict[str, Any]:
    """Makes faults at system *calls* or by *limits* in a process of its own.

    Returns their numbers and what was wrong after which.
    """
    environment = os.environ | {
        "LD_PRELOAD": str(compile_faults(folder)),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }
    command = [sys.executable, __file__, what, str(stride), str(shift)]
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
        for name in ("draw_curves", "draw_confusion", "draw_reliability", "draw_samples"):
            setattr(pictures, name, _draw)  # drawing takes a second; writing is the same
        installed = run.installed()
        run.installed = lambda: installed
        self.folder, self.cli, self.faults = folder, cli, ctypes.CDLL(None)
        self.whole, self.half = folder / "whole", folder / "half"
        with contextlib.redirect_stdout(io.StringIO()):
            cli.run(["train", *RUN, "--out", str(self.whole)])  # loads what a run loads
        self.calls = {"new": self.attempt("new", folder / "new", self.armed(folder / "new"))[2]}
        self.attempt("new", self.half, self.armed(self.half, self.calls["new"] * 2 // 3))
        assert list((self.half / "checkpoints").glob("last-*.json"))  # which are there to lose
        count = self.copy("count")
        self.calls["resume"] = self.attempt("resume", count, self.armed(count))[2]

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.half, self.folder / name))

    def armed(self, run: Path, place: int = 0, error: int = KILL, lasting: bool = False) -> Fault:
        """A fault at call number *place*; without one, calls are counted."""
        arguments = os.fsencode(run), ctypes.c_long(place), error, lasting
        return lambda: self.faults.arm(*arguments)

    def attempt(self, kind: str, run: Path, fault: Fault) -> tuple[int, str, int]:
        """Exit code (negative: a signal), stderr, and the number of calls that concern *run*."""
        said, counted = self.folder / "said", self.folder / "calls"
        counted.unlink(missing_ok=True)
        if not (child := os.fork()):
            code = 70
            try:
                output = os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                count = os.open(counted, os.O_RDWR | os.O_CREAT)
                os.dup2(output, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                flag = ("--resume",) if kind == "resume" else (*RUN, "--out")
                fault()
                try:
                    code = self.cli.run(["train", *flag, str(run)])
                finally:
                    calls = self.faults.disarm()
                os.write(count, str(calls).encode())
            except BaseException:  # noqa: BLE001 - as at the end of a process
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        calls = int(counted.read_text() or 0) if counted.exists() else 0
        return os.waitstatus_to_exitcode(status), said.read_text(), calls

    def problem(self, kind: str, fault: Callable[[Path], Fault], killed: bool) -> str | None:
        """What is wrong after this fault, or ``None``."""
        run = self.folder / "faulty"
        shutil.rmtree(run, ignore_errors=True)
        if kind == "resume":
            self.copy("faulty")
        code, said, _ = self.attempt(kind, run, fault(run))
        if not killed and code not in (0, 1, 2):
            return f"exit code {code}: {said}"
        if not killed and len(said.splitlines()) != (code > 0):
            return f"exit code {code}, but said {said}"
        if kind == "resume" and (lost := self._lost(run)):
            return lost
        again = "resume" if (run / "config.json").exists() else "new"
        code, said, _ = self.attempt(again, run, self.armed(run))
        if code:
            return f"stuck: {again} gives {code}: {said}"
        return self._difference(run)

    def _lost(self, run: Path) -> str | None:
        from sparsenet.checkpoints import RunError, restore

        try:
            restore(run / "checkpoints", "last", lambda checkpoint: checkpoint)
        except RunError as error:
            return f"lost: {error}"
        return None

    def _difference(self, run: Path) -> str | None:
        from safetensors.torch import load_file

        from sparsenet.checkpoints import restore

        for kind in ("last", "best"):
            first, second = (
                restore(each / "checkpoints", kind, lambda checkpoint: checkpoint)[0]
                for each in (run, self.whole)
            )
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


def limited(kind: int, limit: int) -> Fault:
    """A limit of the process; one of its address space is beyond what it has already."""

    def limit_process() -> None:
        status = Path("/proc/self/statm").read_text()
        used = int(status.split()[0]) * resource.getpagesize() if kind == resource.RLIMIT_AS else 0
        resource.setrlimit(kind, (used + limit,) * 2)

    return limit_process


def system_calls(laboratory: Laboratory, stride: int, shift: int) -> Iterator[Job]:
    """A kill, and an error that lasts or not, at every *stride*-th call of both kinds of run."""

    def job(kind: str, place: int, error: int, lasting: bool) -> Job:
        name = f"{kind}, call {place}, {errno.errorcode.get(error, 'kill')}, lasting {lasting}"
        return name, kind, lambda run: laboratory.armed(run, place, error, lasting), error == KILL

    for kind, count in laboratory.calls.items():
        for number, place in enumerate(range(1 + shift % stride, count + 1, stride), shift):
            yield job(kind, place, KILL, False)
            yield job(kind, place, ERRORS[number % len(ERRORS)], number % 2 == 0)


def limits(stride: int) -> Iterator[Job]:
    """Files that may not grow, and memory that is not there."""
    sizes = [500, 3000, 10_000, 20_000, 40_000]  # the line that it says has to be written, too
    megabytes = [0, 1, 4, 8, 16, 32, 64, 256]

    def job(kind: str, fault: Fault, name: str) -> Job:
        return f"{kind}, {name}", kind, lambda run: fault, False

    for kind in ("new", "resume"):
        for size in sizes[::stride]:
            yield job(kind, limited(resource.RLIMIT_FSIZE, size), f"files of {size} bytes")
        for size in megabytes[::stride]:
            yield job(kind, limited(resource.RLIMIT_AS, size << 20), f"{size} MiB more memory")


def main(what: str, stride: int = 1, shift: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder))
        counts, problems = {"kills": 0, "errors": 0}, []
        calls = system_calls(laboratory, stride, shift)
        for name, kind, fault, killed in calls if what == "calls" else limits(stride):
            counts["kills" if killed else "errors"] += 1
            if found := laboratory.problem(kind, fault, killed):
                problems.append(f"{name}: {found}")
                print(problems[-1], file=sys.stderr)
        print(json.dumps({"calls": laboratory.calls, **counts, "problems": problems}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
