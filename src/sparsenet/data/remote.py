"""Parquet and tar files at an address that fsspec knows, fetched into the user's cache."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from sparsenet.data.cache import acquired, hold, lock_of, make_room, root
from sparsenet.data.errors import DataError
from sparsenet.data.stored import Kept
from sparsenet.data.tree import is_visible
from sparsenet.events import Message, Reading
from sparsenet.extras import require
from sparsenet.files import read_json, write_json

SUFFIXES = (".parquet", ".tar")
# What the packages behind addresses raise beside what Python has, where they are loaded.
ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
)


def fetching(address: str) -> Generator[Reading | Message, None, tuple[Path, Kept]]:
    """Fetches the parquet and tar files at *address*; returns where they are, and what holds them.

    What was fetched before is taken, unless it has changed since. Raises ``DataError``.
    """
    with _reaching(address):
        system, path = require("fsspec.core", "remote").url_to_fs(address)
        there = dict(_find(system, path))
    if not there:
        why = _why_nothing(system, path)
        if (name := address.partition("?")[0]) != address and name.endswith(SUFFIXES):
            why += f"; it has to end in its name, as {name}"
        raise DataError(f"{address}: expected parquet or tar files, found none{why}")
    folder = root() / hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
    lock = lock_of(folder)
    for event in acquired(lock):
        yield event if isinstance(event, Message) else Reading("files", 0, len(there))
    try:
        total = sum(int(info.get("size") or 0) for info in there.values())
        make_room(folder, total, f"{len(there)} files of {address}")
        name = PurePosixPath(path).name
        inner = folder / (name or "data")
        inner.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "held").touch(mode=0o600)
        held = Kept(folder / "held", "r+b")
        record = folder / "fetched"
        if _other_files(there, inner, _fetched(record)):
            _hold_alone(held, address)
        hold(held)
        with _reaching(address):
            yield from _fetch(system, there, inner, record)
    finally:
        lock.release()
    is_file = any(info["name"] == path for info in there.values())
    return inner / name if is_file else inner, held


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    loaded = [(sys.modules[module], name) for module, name in ERRORS if module in sys.modules]
    kinds = tuple(getattr(module, name) for module, name in loaded)
    try:
        yield
    except DataError:
        raise
    except ImportError as error:  # of the package for this kind of address
        raise DataError(f"{address}: expected a package that reads it, found: {error}") from error
    except (OSError, ValueError, RuntimeError, *kinds) as error:
        raise DataError(f"{address}: expected data that can be read, found: {error}") from error


def _find(system: Any, path: str) -> Iterator[tuple[PurePosixPath, dict[str, Any]]]:
    """What there is of the kinds that are read, by their places in the folder *path*."""
    for name in sorted(system.find(path)):
        inner = PurePosixPath(name).relative_to(path) if name != path else PurePosixPath()
        place = inner if inner.parts else PurePosixPath(PurePosixPath(path).name)
        if place.suffix.lower() in SUFFIXES and all(map(is_visible, place.parts)):
            yield place, system.info(name)  # a listing may say less


def _why_nothing(system: Any, path: str) -> str:
    """What keeps *path* from being looked at, where that is known, such as a server's silence."""
    try:
        system.info(path)
    except (OSError, RuntimeError, ValueError) as error:
        return f" ({error.__cause__})" if error.__cause__ else ""
    return ""


def _fetched(record: Path) -> dict[str, str]:
    """The state of each file that was fetched, as a *record* says."""
    try:
        return read_json(record, dict[str, str])
    except ValueError:
        return {}


def _state(info: Mapping[str, Any]) -> str:
    # Not the system's own key, which for https is the address alone.
    return hashlib.sha256(str(info).encode()).hexdigest()


def _other_files(
    there: Mapping[PurePosixPath, dict[str, Any]], folder: Path, fetched: Mapping[str, str]
) -> list[Path]:
    """The files in *folder* that are not, or no longer, what is *there*."""
    states = {folder / place: (str(place), _state(info)) for place, info in there.items()}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [file for file in files if file not in states or states[file] not in fetched.items()]


def _hold_alone(held: Kept, address: str) -> None:
    try:
        hold(held, alone=True)
    except OSError:
        expected = "the files as they were, since another process reads them"
        raise DataError(
            f"{address}: expected {expected}, found others; wait until it ends"
        ) from None


def _fetch(
    system: Any, there: Mapping[PurePosixPath, dict[str, Any]], folder: Path, record: Path
) -> Iterator[Reading]:
    """Makes *folder* hold what is *there*; *record* says of each file which one was fetched."""
    fetched = _fetched(record)
    for file in _other_files(there, folder, fetched):
        file.unlink()
    for number, (place, info) in enumerate(there.items(), 1):
        file, state = folder / place, _state(info)
        if not file.is_file():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            system.get_file(info["name"], str(part))
            size, expected = part.stat().st_size, info.get("size")
            if expected not in (None, size):
                raise OSError(f"{size:,} of the {expected:,} bytes of {info['name']}")
            part.replace(file)
            fetched[str(place)] = state
            write_json(record, fetched)
        yield Reading("files", number, len(there))
    os.utime(record)
