"""The C kernels as a library: compiled on first use and kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from sparsenet.files import cache_folder

FOLDER = Path(__file__).with_name("kernels")
SOURCE = FOLDER / "native.c"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
TIME_LIMIT = 120  # seconds for a compiler that takes about three
# What is fast depends on who made the processor: see "What multiplies" in DESIGN.md.
FLAGS_BY_VENDOR = {
    "GenuineIntel": ("-DBYTES=64", "-mprefer-vector-width=512"),
    "AuthenticAMD": ("-DPAIRS",),
}


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises ``RuntimeError`` where there is no compiler or it fails."""
    outcome = _library()
    if isinstance(outcome, str):
        raise RuntimeError(outcome)
    return outcome


@cache  # of a failure too, because every forward pass asks
def _library() -> ctypes.CDLL | str:
    """The library or the reason why there is none."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        return "it needs a C compiler (GCC or Clang, or $CC), found none"
    try:
        kernels = _load(compiler, [])
        if not kernels.matrix_unit():  # compiled for, but the operating system does not grant it
            kernels = _load(compiler, ["-DMATRIX=0"])
    except RuntimeError as error:
        return str(error)
    except OSError as error:
        return f"its kernels could not be compiled and loaded: {error}"
    return kernels


def _load(compiler: str, more_flags: list[str]) -> ctypes.CDLL:
    processor = _processor()
    vendor_flags: tuple[str, ...] = ()
    for vendor, flags_of_vendor in FLAGS_BY_VENDOR.items():
        if any(vendor in line for line in processor):
            vendor_flags = flags_of_vendor
    flags = [*FLAGS, *vendor_flags, *more_flags, *os.environ.get("CFLAGS", "").split()]
    sources = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]"))]
    key = hashlib.sha256(repr((sources, flags, compiler, processor)).encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        target = _cache_file(f"native-{key}.so")
        if target is None:  # a loaded library stays when its file is deleted
            target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "native.so"
        if not target.exists():
            compile_library(shlex.split(compiler), flags, target)
        return ctypes.CDLL(str(target))


def _cache_file(name: str) -> Path | None:
    """A file of the user's cache that exists or can be written; ``None`` where neither is so."""
    try:
        target = cache_folder() / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            tempfile.TemporaryFile(dir=target.parent).close()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return target


def _processor() -> tuple[str, ...]:
    """What ``-march=native`` depends on: a cache shared by machines holds a file for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    relevant = ("vendor_id", "model name", "flags", "Features")
    return tuple(sorted({line for line in lines if line.startswith(relevant)}))


def compile_library(compiler: list[str], flags: list[str], target: Path) -> None:
    """Compiles the kernels to *target*. Raises ``RuntimeError`` in one line where that fails.

    The file is renamed once it is complete, so that no process ever loads half a library.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "native.so"
        # OpenMP's library is not linked: PyTorch has loaded one, and two pools of threads would
        # compete for the cores.
        command = [*compiler, *flags, "-shared", str(SOURCE), "-o", str(built)]
        if problem := run_compiler(command):
            raise RuntimeError(f"its kernels could not be compiled by {compiler[0]}: {problem}")
        built.replace(target)


def run_compiler(command: list[str]) -> str | None:
    """Runs *command*; what went wrong, in one line, or ``None``.

    A compiler that takes too long, or for which nobody waits any more, is killed together with all
    processes that it has started.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, errors="replace", start_new_session=True
        )
    except OSError as error:
        return error.strerror
    with process:
        try:
            _, messages = process.communicate(timeout=TIME_LIMIT)
        except BaseException as error:  # Ctrl-C does not reach a process in a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"nothing after {TIME_LIMIT} s"
            raise
    if process.returncode == 0:
        return None
    errors = [line for line in messages.splitlines() if "error" in line]
    return errors[0] if errors else f"exit {process.returncode}"
