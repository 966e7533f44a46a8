"""Decodes images into their folder in the cache, which several processes do at the same time.

The images are cut into parts of neighbours. A process takes the first part that nobody has, by a
lock that ends with the process, and marks it when it is done. What a killed process left of a part
is gone on with: images whose pixels do not have their checksum are decoded again.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import torch

from sparsenet.data.cache import (
    LOCK_EVERY,
    WAITS,
    Entry,
    Grey,
    Key,
    Row,
    Table,
    Whole,
    acquired,
    digest_of,
    hold,
    make_room,
    no_writing,
    state_of,
)
from sparsenet.data.dataset import Example, Images, Split
from sparsenet.data.errors import BadImage, DataError, count_images
from sparsenet.data.images import Decoded, read_all, settled_range
from sparsenet.data.pixels import Greys, decode, limits_of_our_own
from sparsenet.data.preprocessing import FULL_RANGE, Form
from sparsenet.data.stored import Kept, PixelFile, StoredImages
from sparsenet.events import Message
from sparsenet.extras import require
from sparsenet.files import write_atomic, write_json
from sparsenet.texts import printable

MOST_PARTS = 64
LEAST_IMAGES = 256  # of a part: at its end threads wait for the last of them
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS
ATTEMPTS = 3  # to find what was filled
LINES = 64  # rows between writes of their lines


def reading_stored(
    split: Split, form: Form, skip_corrupt: bool = False
) -> Generator[int | Message, None, Decoded]:
    """Does what ``reading_images`` does, with pixels that come to lie in the user's cache.

    What lies there already is not read again. Processes that do this at the same time decode a
    part of the images each; one that has to wait for others says so. Raises ``DataError`` where
    there is no room.
    """
    pillow = require("PIL", "train").__version__
    entry = Entry(Key(digest_of(split), len(split), form, pillow))
    stored, attempts = entry.opened(), 0
    while stored is None and attempts < ATTEMPTS:  # another may remove it before it is held
        yield from _fill(entry, split, skip_corrupt)
        stored, attempts = entry.opened(), attempts + 1
    if stored is None:
        raise DataError(f"{entry.folder}: expected what was written, found it changed")
    file, rows = stored
    _refuse_problems(rows, skip_corrupt)
    labels = torch.from_numpy(_labels(split))
    kept = [row for row in rows if not row.problem]
    places = torch.tensor([row.row for row in kept], dtype=torch.int64)
    greys = [row.grey.without_levels() for row in kept if row.grey]
    settled = settled_range(form.grey_range, greys)
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


def _refuse_problems(rows: Iterable[Row], skip_corrupt: bool) -> None:
    problem = next((row.problem for row in rows if row.problem), "")
    if problem and not skip_corrupt:
        raise BadImage(f"{problem}; --skip_corrupt leaves such images out")


def _fill(entry: Entry, split: Split, skip_corrupt: bool) -> Generator[int | Message, None, None]:
    """Decodes what is not there and what nobody else decodes, until the folder is whole."""
    try:
        yield from _fill_together(entry, split, skip_corrupt)
    except OSError as error:
        root, file = entry.folder.parent, Path(str(error.filename))
        if error.errno in FULL or root.absolute() in file.absolute().parents:
            raise no_writing(root, error) from error
        raise  # of the data


def _fill_together(
    entry: Entry, split: Split, skip_corrupt: bool
) -> Generator[int | Message, None, None]:
    lock = entry.lock()
    yield from acquired(lock)
    try:
        if entry.opened() is not None:  # which somebody else has written meanwhile
            return
        filling = _Filling(entry, split, skip_corrupt)
    finally:
        lock.release()
    yield from filling.fill_parts()
    yield from acquired(lock)
    try:
        if not filling.is_whole():
            yield from filling.finish()
        filling.remove_parts()
    finally:
        lock.release()


class _Filling:
    """The work of a process in the folder of *entry*, which stays there for as long as this."""

    def __init__(self, entry: Entry, split: Split, skip_corrupt: bool):
        """Makes the folder ready; no other process may do so at the same time."""
        self.entry, self.skip_corrupt = entry, skip_corrupt
        self.examples = _Examples(split)
        make_room(entry.folder, entry.nbytes, count_images(entry.key.count))
        entry.folder.mkdir(mode=0o700, exist_ok=True)
        self.file, self.filled = self._opened("pixels"), self._opened("filled")
        with suppress(OSError):  # others are at it
            hold(self.filled, alone=True)
            for mark in entry.folder.glob("*.done"):  # which processes left that were killed
                mark.unlink()
        entry.file("whole").unlink(missing_ok=True)
        hold(self.file)
        hold(self.filled)
        self.file.truncate(entry.nbytes)
        self.pixels = PixelFile(entry.file("pixels"), self.file, entry.key.form.shape)
        self.known: dict[int, Row] = {}
        for name in ("rows", *sorted(path.name for path in entry.folder.glob("part-*[0-9]"))):
            with suppress(FileNotFoundError):
                self.known |= entry.rows(name)
        count = entry.key.count
        number = min(MOST_PARTS, math.ceil(count / LEAST_IMAGES))
        bounds = pairwise(count * part // number for part in range(number + 1))
        self.parts = {f"part-{part}": range(*bound) for part, bound in enumerate(bounds)}

    def _opened(self, name: str) -> Kept:
        path = self.entry.file(name)
        path.touch(mode=0o600)
        return Kept(path, "r+b")

    def is_whole(self) -> bool:
        return self.entry.file("whole").exists()

    def _is_done(self, part: str) -> bool:
        # In this order: whoever makes the folder whole removes the marks afterwards.
        return self.entry.file(f"{part}.done").exists() or self.is_whole()

    def fill_parts(self) -> Generator[int | Message, None, None]:
        """Decodes parts that nobody else has, until all are done."""
        filelock = require("filelock", "train")
        left, waits = list(self.parts), False
        while left:
            held_by_others = []
            for part in left:
                lock = filelock.FileLock(str(self.entry.file(f"{part}.lock")))
                try:
                    lock.acquire(timeout=0)
                except filelock.Timeout:
                    held_by_others.append(part)
                    continue
                try:
                    if not self._is_done(part):
                        yield from self._fill_part(part)
                        self.entry.file(f"{part}.done").touch(mode=0o600)
                finally:
                    lock.release()
            if len(held_by_others) == len(left):
                if not waits:
                    yield WAITS
                waits = True
                yield self._count()
                time.sleep(LOCK_EVERY)
            left = held_by_others

    def _count(self) -> int:
        """How many images lie in parts that are done."""
        return sum(len(places) for part, places in self.parts.items() if self._is_done(part))

    def _fill_part(self, part: str) -> Generator[int, None, None]:
        before, rows = self._count(), dict[int, Row]()
        known = {place: row for place in self.parts[part] if (row := self.known.get(place))}
        with suppress(FileNotFoundError):
            known |= self.entry.rows(part)  # of a process that was killed meanwhile
        for place, row in known.items():
            found = b"" if row.problem else self.pixels.read(torch.tensor([place])).numpy().data
            if row.checked(self.entry.key, found) == row:
                rows[place] = row
                yield before + len(rows)
        _refuse_problems((rows[row] for row in sorted(rows)), self.skip_corrupt)
        lines = b"".join(map(_line, rows.values()))
        write_atomic(self.entry.file(part), lines)
        with self.entry.file(part).open("ab") as file:
            missing = set(self.parts[part]) - rows.keys()
            for row in self._decode(missing, rows) if missing else ():
                file.write(_line(row))
                if len(rows) % LINES == 0:  # never before the pixels
                    file.flush()
                yield before + len(rows)
            os.fsync(self.file.fileno())
            file.flush()
            os.fsync(file.fileno())

    def _decode(self, places: set[int], rows: dict[int, Row]) -> Generator[Row, None, None]:
        """Decodes the images at *places*, and puts what there is to say of them into *rows*."""
        greys = [row.grey for row in rows.values() if row.grey]
        highest = max((grey.highest for grey in greys), default=0.0)
        examples = self.examples.at(places)
        with closing(_decoded(self.entry.key, examples, places, self.pixels, highest)) as decoded:
            for row in decoded:
                _refuse_problems([row], self.skip_corrupt)
                rows[row.row] = row
                yield row

    def finish(self) -> Generator[int, None, None]:
        """Makes the folder whole when all parts are done; no other process may do so then."""
        key, rows = self.entry.key, dict[int, Row]()
        for part in self.parts:
            rows |= self.entry.rows(part)
        while others := _other_greys(key, rows):
            for _ in self._decode(others, rows):
                yield key.count
        write_atomic(self.entry.file("rows"), b"".join(_line(rows[row]) for row in sorted(rows)))
        os.fsync(self.file.fileno())
        states = state_of(self.file.fileno()), state_of(self.entry.file("rows"))
        write_json(self.entry.file("whole"), Whole(key, *states))

    def remove_parts(self) -> None:
        for path in self.entry.folder.glob("part-*"):
            with suppress(OSError):
                path.unlink()


def _line(row: Row) -> bytes:
    return msgspec.json.encode(row) + b"\n"


class _Examples:
    """The examples of a split by their places, in one pass where these ascend."""

    def __init__(self, split: Split):
        self.split = split
        # A table is known by its files.
        self.by_files = isinstance(split, Table) and split.identity() is not None
        self.rest: Iterator[tuple[int, Example]] = iter(())
        self.next = len(split)  # the place of the first of the rest

    def at(self, places: set[int]) -> Iterator[Example]:
        """Those at *places*; ``DataError`` for a file that the key of a table does not know."""
        last = max(places)
        if self.next > min(places):
            self.rest, self.next = enumerate(self.split), 0
        for place, example in self.rest:
            self.next = place + 1
            if place in places:
                if self.by_files and isinstance(example.source, Path):
                    raise DataError(
                        f"{example.name}: expected an image as in the first row, where its bytes "
                        "are, found the path of one; --cache memory takes both"
                    )
                yield example
            if place == last:
                return


def _other_greys(key: Key, rows: Mapping[int, Row]) -> set[int]:
    """Greys that had another black and white than all of them together now give."""
    greys = {place: row.grey for place, row in rows.items() if row.grey}
    settled = settled_range(key.form.grey_range, [grey.without_levels() for grey in greys.values()])
    return {place for place, grey in greys.items() if grey.scale != (settled or FULL_RANGE)}


def _decoded(
    key: Key, examples: Iterator[Example], places: set[int], pixels: PixelFile, highest: float
) -> Generator[Row, None, None]:
    """Decodes the images at *places* into *pixels*, where greys so far reach up to *highest*."""
    form = key.form
    decoder = partial(decode, form=form)
    with (
        limits_of_our_own(),
        closing(read_all(examples, decoder, math.prod(form.shape))) as found,
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
                scale = settled_range(form.grey_range, [usual]) or FULL_RANGE
                name, levels = printable(content.name), (content.lowest, content.highest)
                grey = Grey(name, *levels, content.unusual, scale)
                content = np.ascontiguousarray(content.pixels(scale, form.channels))
            pixels.write(place, content)
            yield Row(place, number, 0, "", grey).checked(key, content.data)
