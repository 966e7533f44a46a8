"""Decoded images in the user's cache, for data that do not fit into memory.

Each split has a folder, named by a digest of its key: which files its images are of, and how they
are decoded. In it lie *pixels*, an image in each row; *rows*, a line for each image whose pixels
were written, with a checksum of them; and *whole*, which is written last, and says when the two
were. A folder whose *whole* does not fit is gone on with: rows with another checksum are decoded.

All folders together take at most half of what they could: those that were used last stay.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch

from sparsenet.data.dataset import Example, Images, Split
from sparsenet.data.errors import BadImage, DataError, count_images
from sparsenet.data.images import Decoded, read_all, settled_range
from sparsenet.data.pixels import Greys, decode, limits_of_our_own
from sparsenet.data.preprocessing import FULL_RANGE
from sparsenet.data.stored import Kept, PixelFile, StoredImages
from sparsenet.events import Message
from sparsenet.extras import require
from sparsenet.files import cache_folder, file_state, is_ours, read_json, size_text, write_json
from sparsenet.validation import printable

FORMAT = 1  # another where what is decoded to what changes
OURS = re.compile(r"[0-9a-f]{32}")  # names of folders
PATIENCE = 0.1  # seconds between looks at a lock
HELD = ("pixels", "held")  # what is open while a folder is used
LINES = 64  # rows between writes of their lines


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
    shape: tuple[int, ...]
    grey_range: tuple[float, ...] | None
    max_megapixels: float
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


def reading_stored(
    split: Split,
    size: int,
    channels: int,
    skip_corrupt: bool,
    grey_range: tuple[float, ...] | None,
    max_megapixels: float,
) -> Generator[int | Message, None, Decoded]:
    """Does what ``reading_images`` does, with pixels that come to lie in the user's cache.

    What lies there already is not read again. While another process writes the same, it waits, and
    says so. Raises ``DataError`` where there is no room.
    """
    pillow = require("PIL", "train").__version__
    identity = _digest(split)
    key = Key(identity, len(split), (channels, size, size), grey_range, max_megapixels, pillow)
    entry = Entry(key)
    stored = entry.opened()
    if stored is None:
        lock = entry.lock()
        yield from acquired(lock)
        try:
            stored = entry.opened()  # which somebody else may have written meanwhile
            if stored is None:
                yield from _write(entry, split, skip_corrupt)
                stored = entry.opened()
        finally:
            lock.release()
    if stored is None:
        raise DataError(f"{entry.folder}: expected what was written, found it changed")
    file, rows = stored
    _refuse_problems(rows, skip_corrupt)
    labels = torch.from_numpy(_labels(split))
    kept = [row for row in rows if not row.problem]
    places = torch.tensor([row.row for row in kept], dtype=torch.int64)
    greys = [row.grey.without_levels() for row in kept if row.grey]
    settled = settled_range(grey_range, greys)
    return Decoded(
        StoredImages(file, places, labels[places]),
        torch.tensor([row.id for row in kept], dtype=torch.int64),
        places,
        tuple(row.problem for row in rows if row.problem),
        settled,
        sum(grey.exceeds(settled or FULL_RANGE) for grey in greys),
    )


def _labels(split: Split) -> np.ndarray:
    if isinstance(split, Images):
        labels: np.ndarray = split.labels.numpy()
        return labels
    if isinstance(split, Table):
        return split.labels()
    return np.array([example.label for example in split], np.int64)


def _digest(split: Split) -> str:
    digest = hashlib.blake2b(digest_size=16)
    identity = split.identity() if isinstance(split, Table) else None
    for each in map(_identity, split) if identity is None else identity:
        digest.update(f"{each}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _identity(example: Example) -> str:
    source = example.source
    if isinstance(source, Path):
        return file_state(source)
    content = source.tobytes() if isinstance(source, np.ndarray) else source
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def acquired(lock: Any) -> Iterator[int | Message]:
    """Acquires a lock, and yields while another process has it."""
    filelock = require("filelock", "train")
    waits = False
    while True:
        with suppress(filelock.Timeout):
            lock.acquire(timeout=PATIENCE if waits else 0)
            return
        if not waits:
            yield Message(
                "waiting for another process, which is writing the same data into the cache"
            )
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
        return self.key.count * math.prod(self.key.shape)

    def lock(self) -> Any:
        return lock_of(self.folder)

    def rows(self) -> dict[int, Row]:
        """The last line for each image, by its number, without what is no line of this file."""
        decoder, found = msgspec.json.Decoder(Row), {}
        with self.file("rows").open("rb") as lines:
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
            pixels = PixelFile(self.file("pixels"), file, self.key.shape)
            hold(file)
            whole = read_json(self.file("whole"), Whole)
            found = whole.key, whole.pixels, whole.rows
            if found != (self.key, _state(file.fileno()), _state(self.file("rows"))):
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
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours(folder):
        raise DataError(
            f"{folder}: expected a folder that only this user can change, found another; "
            "XDG_CACHE_HOME can name one elsewhere, --cache memory needs none"
        )
    return folder


def lock_of(folder: Path) -> Any:
    # One file for several folders, so that no number of them remains: 256 empty ones at most.
    filelock = require("filelock", "train")
    return filelock.FileLock(str(folder.with_name(f"{folder.name[:2]}.lock")))


def _state(file: Path | int) -> tuple[int, int, int]:
    found = os.stat(file)  # noqa: PTH116 - also of what is open
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _refuse_problems(rows: Iterable[Row], skip_corrupt: bool) -> None:
    problem = next((row.problem for row in rows if row.problem), "")
    if problem and not skip_corrupt:
        raise BadImage(f"{problem}; --skip_corrupt leaves such images out")


def _write(entry: Entry, split: Split, skip_corrupt: bool) -> Generator[int, None, None]:
    """Decodes what is not yet there, and makes the folder of *entry* whole."""
    make_room(entry.folder, entry.nbytes, count_images(entry.key.count))
    entry.folder.mkdir(mode=0o700, exist_ok=True)
    entry.file("whole").unlink(missing_ok=True)
    entry.file("pixels").touch(mode=0o600)
    file = Kept(entry.file("pixels"), "r+b")
    hold(file)
    pixels = PixelFile(entry.file("pixels"), file, entry.key.shape)
    file.truncate(entry.nbytes)
    rows: dict[int, Row] = {}
    yield from _find_intact(entry, pixels, rows)
    _refuse_problems((rows[row] for row in sorted(rows)), skip_corrupt)
    with entry.file("rows").open("ab") as lines:
        lines.write(b"\n")  # after what a kill may have left of a line
        while missing := _missing(entry.key, rows):
            greys = [row.grey for row in rows.values() if row.grey]
            highest = max((grey.highest for grey in greys), default=0.0)
            with closing(_decoded(entry.key, split, missing, pixels, highest)) as decoded:
                for row in decoded:
                    _refuse_problems([row], skip_corrupt)
                    rows[row.row] = row
                    lines.write(msgspec.json.encode(row) + b"\n")
                    if len(rows) % LINES == 0:  # never before the pixels
                        lines.flush()
                    yield len(rows)
        os.fsync(file.fileno())
        lines.flush()
        os.fsync(lines.fileno())
        states = _state(file.fileno()), _state(lines.fileno())
    write_json(entry.file("whole"), Whole(entry.key, *states))


def _find_intact(
    entry: Entry, pixels: PixelFile, rows: dict[int, Row]
) -> Generator[int, None, None]:
    """Puts into *rows* those that were written and are still what they were then."""
    if not entry.file("rows").exists():
        return
    last = entry.rows()
    for place in sorted(last):
        row = last[place]
        found = b"" if row.problem else pixels.read(torch.tensor([place])).numpy().data
        if row.checked(entry.key, found) == row:
            rows[place] = row
            yield len(rows)


def _missing(key: Key, rows: Mapping[int, Row]) -> set[int]:
    """What is to be decoded: what is not there, and then greys that had another black and white.

    How far greys reach is known only when all of them have been seen.
    """
    if len(rows) < key.count:
        return set(range(key.count)) - rows.keys()
    greys = {place: row.grey for place, row in rows.items() if row.grey}
    settled = settled_range(key.grey_range, [grey.without_levels() for grey in greys.values()])
    return {place for place, grey in greys.items() if grey.scale != (settled or FULL_RANGE)}


def _decoded(
    key: Key, split: Split, places: set[int], pixels: PixelFile, highest: float
) -> Generator[Row, None, None]:
    """Decodes the images at *places* into *pixels*, where greys so far reach up to *highest*."""
    decoder = partial(
        decode,
        size=key.shape[1],
        channels=key.shape[0],
        grey_range=key.grey_range,
        max_megapixels=key.max_megapixels,
    )
    examples = _examples(split, places)
    with (
        limits_of_our_own(),
        closing(read_all(examples, decoder, math.prod(key.shape))) as found,
    ):
        for place, (_, image) in zip(sorted(places), found, strict=True):
            if isinstance(image, BadImage):
                yield Row(place, 0, 0, printable(str(image))).checked(key, b"")
                continue
            content, number = image
            grey = None
            if isinstance(content, Greys):
                highest = min(max(highest, content.highest), FULL_RANGE[1])
                usual = content._replace(highest=highest, unusual="")
                scale = settled_range(key.grey_range, [usual]) or FULL_RANGE
                name, levels = printable(content.name), (content.lowest, content.highest)
                grey = Grey(name, *levels, content.unusual, scale)
                content = np.ascontiguousarray(content.pixels(scale, key.shape[0]))
            pixels.write(place, content)
            yield Row(place, number, 0, "", grey).checked(key, content.data)


def _examples(split: Split, places: set[int]) -> Iterator[Example]:
    """Those at *places*; ``DataError`` for a file that the key of a table does not know."""
    by_files = isinstance(split, Table) and split.identity() is not None
    for place, example in enumerate(split):
        if place not in places:
            continue
        if by_files and isinstance(example.source, Path):
            raise DataError(
                f"{example.name}: expected an image as in the first row, where its bytes are, "
                "found the path of one; --cache memory takes both"
            )
        yield example


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
    with suppress(OSError):
        return sum(512 * file.stat().st_blocks for file in folder.rglob("*"))
    return 0


def _last_used(folder: Path) -> float:
    with suppress(OSError):
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return 0.0


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
