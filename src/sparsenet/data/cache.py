"""Decoded images in the user's cache, for data that do not fit into memory.

Each split has a folder, named by a digest of its key: which files its images are of, and how they
are decoded. In it lie *pixels*, an image in each row; *rows*, a line for each image, with a
checksum of its pixels; and *whole*, which is written last, and says when the two were. A folder
whose *whole* does not fit is gone on with, by ``sparsenet.data.filling``.

All folders together take at most half of what they could: those that were used last stay.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np

from sparsenet.data.dataset import Example, Split
from sparsenet.data.errors import DataError, reason
from sparsenet.data.pixels import Greys
from sparsenet.data.preprocessing import Form
from sparsenet.data.stored import Kept, PixelFile
from sparsenet.events import Message
from sparsenet.extras import require
from sparsenet.files import cache_folder, file_state, is_ours, read_json, size_text

FORMAT = 2  # another where what is decoded to what changes
OURS = re.compile(r"[0-9a-f]{32}")  # names of folders
LOCK_EVERY = 0.1  # seconds between looks at a lock
WAITS = Message("waiting for another process, which is writing the same data into the cache")
HELD = ("pixels", "filled", "held")  # what is open while a folder is used


@runtime_checkable
class Table(Split, Protocol):
    """A split whose images lie in a few files, so that they need not be looked at one by one."""

    def labels(self) -> np.ndarray:
        """int64 ``(N,)``."""

    def names(self) -> Iterable[str]:
        """The name of each example."""

    def identity(self) -> Iterable[str] | None:
        """What changes when an image does; ``None`` where only the images themselves say it.

        Otherwise no image may lie in a file of its own.
        """


class Key(msgspec.Struct, frozen=True):
    """What the pixels of a split are a function of."""

    images: str  # a digest
    count: int
    form: Form
    pillow: str
    version: int = FORMAT


class Grey(NamedTuple):
    """What ``Greys`` says of an image, and the levels that were black and white when written."""

    name: str
    lowest: float
    highest: float
    unusual: str
    scale: tuple[float, ...] = ()

    def without_levels(self) -> Greys:
        return Greys(self.name, np.empty((0, 0), np.float32), *self[1:4])


class Row(NamedTuple):
    """A line: image *row* was written, or has a *problem*. A later line for it counts instead."""

    row: int
    id: int
    check: int
    problem: str = ""
    grey: Grey | None = None

    def checked(self, key: Key, pixels: bytes | memoryview) -> Row:
        """The same with the checksum of *key*, of what it says, and of *pixels*."""
        said = msgspec.json.encode((key, self._replace(check=0)))
        return self._replace(check=zlib.crc32(pixels, zlib.crc32(said)))


class Whole(msgspec.Struct, frozen=True):
    """When a folder became whole: sizes of its files, and when they were written and changed."""

    key: Key
    pixels: tuple[int, int, int]
    rows: tuple[int, int, int]


def digest_of(split: Split) -> str:
    digest = hashlib.blake2b(digest_size=16)
    identity = split.identity() if isinstance(split, Table) else None
    for each in map(_identity, split) if identity is None else identity:
        digest.update(f"{each}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _identity(example: Example) -> str:
    source = example.source
    if isinstance(source, Path):
        return file_state(source)
    content = source if isinstance(source, bytes) else source.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def acquired(lock: Any) -> Iterator[int | Message]:
    """Acquires a lock, and yields while another process has it."""
    filelock = require("filelock", "train")
    waits = False
    while True:
        with suppress(filelock.Timeout):
            lock.acquire(timeout=LOCK_EVERY if waits else 0)
            return
        if not waits:
            yield WAITS
        waits = True
        yield 0


@dataclass(frozen=True)
class Entry:
    """The folder of a split."""

    key: Key

    @cached_property
    def folder(self) -> Path:
        digest = hashlib.blake2b(msgspec.json.encode(self.key), digest_size=16).hexdigest()
        return root() / digest

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def nbytes(self) -> int:
        return self.key.count * math.prod(self.key.form.shape)

    def lock(self) -> Any:
        return lock_of(self.folder)

    def rows(self, name: str = "rows") -> dict[int, Row]:
        """The last line of a file for each image, by its number, without what is no line of it."""
        decoder, found = msgspec.json.Decoder(Row), {}
        with self.file(name).open("rb") as lines:
            for line in lines:
                with suppress(msgspec.DecodeError):
                    row = decoder.decode(line)
                    if 0 <= row.row < self.key.count:
                        found[row.row] = row
        return found

    def opened(self) -> tuple[PixelFile, list[Row]] | None:
        """The pixels and what is said of them, where all are there; they stay as long as held."""
        try:
            file = Kept(self.file("pixels"))
            pixels = PixelFile(self.file("pixels"), file, self.key.form.shape)
            hold(file)
            whole = read_json(self.file("whole"), Whole)
            found = whole.key, whole.pixels, whole.rows
            if found != (self.key, state_of(file.fileno()), state_of(self.file("rows"))):
                return None
            if os.fstat(file.fileno()).st_size != self.nbytes:
                return None
            last = self.rows()
            with suppress(OSError):  # where it can be read only
                os.utime(self.file("whole"))  # used now
        except (OSError, ValueError):
            return None
        rows = [last[row] for row in sorted(last)]
        return (pixels, rows) if len(rows) == self.key.count else None


def root() -> Path:
    """The folder of all that is decoded, which is this user's alone."""
    folder = cache_folder() / "images"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise no_writing(folder, error) from error
    if not is_ours(folder):
        raise DataError(
            f"{folder}: expected a folder that only this user can change, found another; "
            "XDG_CACHE_HOME can name one elsewhere, --cache memory needs none"
        )
    return folder


def no_writing(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"--cache: expected a folder that can be written, {folder}, found {reason(error)}; "
        "XDG_CACHE_HOME can name one elsewhere, --cache memory needs none"
    )


def lock_of(folder: Path) -> Any:
    # One file for several folders, so that no number of them remains: 256 empty ones at most.
    filelock = require("filelock", "train")
    return filelock.FileLock(str(folder.with_name(f"{folder.name[:2]}.lock")))


def state_of(file: Path | int) -> tuple[int, int, int]:
    found = os.stat(file)  # noqa: PTH116 - also of what is open
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def make_room(folder: Path, nbytes: int, what: str) -> None:
    """Makes room for *nbytes* of *what* in *folder*, by removing what was used longest ago.

    Raises ``DataError`` where that is not enough.
    """
    root = folder.parent
    ours = [each for each in root.iterdir() if OURS.fullmatch(each.name) and each.is_dir()]
    sizes = {each: _taken(each) for each in ours}
    needed, free = nbytes - sizes.get(folder, 0), shutil.disk_usage(root).free
    most = (sum(sizes.values()) + free) // 2
    for each in sorted(sizes.keys() - {folder}, key=_last_used):
        if needed <= free and sum(sizes.values()) + needed <= most:
            return
        if _removed(each):
            free += sizes.pop(each)
    if needed > free:
        raise DataError(
            f"--cache: expected room for the {size_text(nbytes)} of {what} in {root}, found "
            f"{size_text(free)}; XDG_CACHE_HOME can name a folder elsewhere"
        )


def _taken(folder: Path) -> int:
    """The bytes that a folder takes on the disk, holes in its files left out."""
    return sum(512 * found.st_blocks for found in _states(folder.rglob("*")))


def _last_used(folder: Path) -> float:
    return max(
        (found.st_mtime for found in _states(chain((folder,), folder.iterdir()))), default=0.0
    )


def _states(files: Iterator[Path]) -> Iterator[os.stat_result]:
    """What the system says of those *files* that are still there."""
    with suppress(OSError):  # the folder itself
        for file in files:
            with suppress(OSError):
                yield file.stat()


def _removed(folder: Path) -> bool:
    """Removes a folder, unless a process reads or writes what is in it."""
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except require("filelock", "train").Timeout:
        return False
    try:
        with ExitStack() as held:
            for name in HELD:
                if (folder / name).exists():
                    file = held.enter_context(Kept(folder / name, "r+b"))
                    hold(file, alone=True)
            shutil.rmtree(folder)
    except OSError:
        return False
    finally:
        lock.release()
    return True


def hold(file: Kept, alone: bool = False) -> None:
    """Keeps the folder of a file from being removed, or the file from being held, while it is open.

    Raises ``OSError`` where that cannot be at once.
    """
    if os.name == "posix":  # elsewhere an open file cannot be removed
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
