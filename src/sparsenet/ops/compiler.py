"""The C kernels as a library: compiled on first use and kept in the user's cache.

A file of the cache is executed, so it is loaded only if nobody but this user and root can have
written it and its content is what its name says: a digest, so that a name is never that of another
content, whichever of several processes wrote it. What is not so is removed and compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from sparsenet.files import cache_folder, is_ours, write_atomic

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
    compiler = os.environ.get("CC", "").strip() or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        return "it needs a C compiler (GCC or Clang, or $CC), found none"
    try:
        kernels = _load(compiler, [])
        if not kernels.matrix_unit():  # compiled for, but the operating system does not grant it
            kernels = _load(compiler, ["-DMATRIX=0"])
    except RuntimeError as error:
        return str(error)
    except (OSError, ValueError) as error:  # ValueError: $CC with a quote that is not closed
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
    if kernels := _cached(key):
        return kernels
    with tempfile.TemporaryDirectory() as folder:  # a loaded library stays when its file is deleted
        built = Path(folder) / "native.so"
        compile_library(shlex.split(compiler), flags, built)
        if kept := _keep(built.read_bytes(), key):
            with suppress(OSError):  # a file system from which nothing is executed
                return _open(kept)
        return _open(built)


def _cached(key: str) -> ctypes.CDLL | None:
    """The library that an earlier process kept; a file that is not as it should be is removed."""
    try:
        folder = _folder()
        candidates = sorted(folder.glob(f"native-{key}-*.so")) if is_ours(folder) else []
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    for path in candidates:
        with suppress(OSError, RuntimeError):  # RuntimeError: without the functions
            if is_ours(path) and path.name == _name(key, path.read_bytes()):
                return _open(path)
        with suppress(OSError):
            path.unlink()
    return None


def _keep(content: bytes, key: str) -> Path | None:
    """Writes a library into the cache; ``None`` where none can be kept."""
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_ours(folder):
            return None
        path = folder / _name(key, content)
        write_atomic(path, content)
        path.chmod(0o644)  # whatever the umask gives away
    except (OSError, RuntimeError):
        return None
    return path


def _folder() -> Path:
    """One of its own, which the user's umask does not open to others."""
    return cache_folder() / "kernels"


def _name(key: str, content: bytes) -> str:
    return f"native-{key}-{hashlib.sha256(content).hexdigest()}.so"


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library; ``OSError`` where that fails, ``RuntimeError`` for one that lacks some."""
    kernels = ctypes.CDLL(str(path))
    if missing := [name for name in _functions() if not hasattr(kernels, name)]:
        raise RuntimeError(f"its kernels were compiled without {missing[0]}")
    return kernels


@cache
def _functions() -> tuple[str, ...]:
    """The names of the functions that native.py may call, as the sources have them."""
    suffixes = re.findall(r"^#define SUFFIX (\w+)", SOURCE.read_text(), re.MULTILINE)
    passes = (FOLDER / "passes.h").read_text()
    functions = re.findall(r"^int NAME\((\w+)\)", passes, re.MULTILINE)
    return "matrix_unit", *(f"{name}_{suffix}" for name in functions for suffix in suffixes)


def _processor() -> tuple[str, ...]:
    """What ``-march=native`` depends on: a cache shared by machines holds a file for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    relevant = ("vendor_id", "model name", "flags", "Features")
    return tuple(sorted({line for line in lines if line.startswith(relevant)}))


def compile_library(compiler: list[str], flags: list[str], target: Path) -> None:
    """Compiles the kernels to *target*. Raises ``RuntimeError`` in one line where that fails."""
    # OpenMP's library is not linked: PyTorch has loaded one, and two pools of threads would
    # compete for the cores.
    command = [*compiler, *flags, "-shared", str(SOURCE), "-o", str(target)]
    if problem := run_compiler(command):
        raise RuntimeError(f"its kernels could not be compiled by {compiler[0]}: {problem}")


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
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"nothing after {TIME_LIMIT} s"
            raise
    if process.returncode == 0:
        return None
    errors = [line for line in messages.splitlines() if "error" in line]
    return errors[0] if errors else f"exit {process.returncode}"
