"""The user's folders, files read and written whole, and JSON."""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

MOST_BYTES = 64 * 2**20  # of a file that this library writes as text, or of a picture


def cache_folder() -> Path:
    """Where this library keeps what it can make or fetch again; it need not exist yet.

    A user without a home has one that ends with the process.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named or Path.home() / ".cache") / "sparsenet"
    except RuntimeError:  # neither HOME nor an entry among the system's users
        return _passing_folder()


@cache
def _passing_folder() -> Path:
    # Not a name that others know, who could put libraries into it before this user does.
    folder = tempfile.mkdtemp(prefix="sparsenet-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def with_home(text: str) -> str:
    """*text*, a path or an address, with ``~`` for the user's home; without one it stays."""
    return os.path.expanduser(text)  # noqa: PTH111 - pathlib raises instead


def user_path(text: str) -> Path:
    """``with_home`` as a path."""
    return Path(with_home(text))


def is_address(text: str) -> bool:
    """Whether *text* is an address such as ``s3://bucket/data``, and no path."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", text))


DEVICES = Path("/dev"), Path("/dev/fd")
PROCESSES = Path("/proc")


def is_special(path: Path) -> bool:
    """Whether *path* is a pipe or a device, from which reading may never end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def is_ours(path: Path) -> bool:
    """Whether a regular file or a folder is this user's or root's, and no one else's to change."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return False
    if os.name != "posix":
        return True
    for_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # In a sticky folder, such as /tmp, others cannot put a file in the place of ours.
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and (not for_others or bool(sticky))


def file_state(path: Path) -> str:
    """A text that is another when the file at *path* is another.

    It has the time when anything about the file was changed, since another file that is moved to
    its place can bring its own time of writing.
    """
    try:
        found = path.stat()
    except OSError as error:
        return f"{path.absolute()}: {error.strerror}"
    return f"{path.absolute()}: {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def read_bytes(file: Path, limit: int = MOST_BYTES) -> bytes:
    """The content of a file of at most *limit* bytes.

    Raises ``OSError``, also for more and for a pipe or a device.
    """
    if is_special(file):
        raise OSError("a pipe or device, which is no file")
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise OSError(f"more than the {size_text(limit)} that are read of such a file")
        return stream.read(size)  # so many bytes are set aside at once


def failure(error: OSError) -> str:
    """Why a file could not be used, after its path where *error* names one."""
    if not error.strerror:
        return str(error)
    named = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return f"{named}{error.strerror}"


def write_atomic(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename, fsync of the folder.

    *content* may come in parts, which are not held together in memory. A text is written as UTF-8,
    and what UTF-8 does not have, such as half a surrogate pair in the name of a file, as an escape.
    Who may read it is what the process says of new files.
    """
    _refuse_device(path)
    parts = [content] if isinstance(content, str | bytes) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            for part in parts:
                if isinstance(part, str):
                    part = part.encode(errors="backslashreplace")
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def try_to_write(path: Path) -> None:
    """Raises ``OSError`` where ``write_atomic`` could write no file, as far as is known before."""
    _refuse_device(path)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def behind_link(path: Path) -> Path:
    """The file that is written where the user names *path*: a link stays, and leads to it.

    Raises ``OSError`` for a pipe or a device, which a file would replace, and for what only looks
    like a file, as /dev/stdout.
    """
    place = path.absolute()
    is_place = place.parent in DEVICES or PROCESSES in place.parents
    if is_special(path) or (is_place and path.exists()):
        raise OSError(errno.EINVAL, "a device or pipe", str(path))
    return path.resolve() if path.is_symlink() else path


def _refuse_device(path: Path) -> None:
    if path.is_char_device() or path.is_block_device():  # which a file would replace
        raise OSError(errno.EINVAL, "a device", str(path))


def size_text(count: int) -> str:
    """A number of bytes as it is printed: in GiB, or in MiB or KiB below one."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value or a dataclass of such, indented."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    except UnicodeEncodeError:  # the path of a folder whose name is not UTF-8
        text = json.dumps(msgspec.to_builtins(value), indent=2).encode()
    write_atomic(path, text + b"\n")


def parse_json(data: bytes | str, kind: type[T], where: str) -> T:
    """Parses JSON into a *kind*, such as a dataclass, whose fields and their types are checked.

    Fields that *kind* does not have are passed over. Raises ``ValueError`` in one line that begins
    with *where*.
    """
    try:
        return _decode(data, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or a number of 5,000 digits
        raise ValueError(f"{where}: expected JSON, found: {_place(data) or error}") from None


def _decode(data: bytes | str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        if "invalid utf-16 surrogate" not in str(error):
            raise
        # As write_json writes names that are not UTF-8.
        return msgspec.convert(json.loads(data), kind)


def _place(data: bytes | str) -> str:
    """Where *data* stops being JSON, which msgspec does not say in lines."""
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return f"{error.msg} in line {error.lineno}"
    except (ValueError, RecursionError):
        pass
    return ""


def read_json(file: Path, kind: type[T], limit: int = MOST_BYTES) -> T:
    """Reads a file with ``parse_json``; also ``ValueError`` where it cannot be read."""
    return parse_json(readable(file, limit), kind, str(file))


def readable(file: Path, limit: int = MOST_BYTES) -> bytes:
    """As ``read_bytes``, but raises ``ValueError`` in one line."""
    try:
        return read_bytes(file, limit)
    except OSError as error:
        found = error.strerror or error
        raise ValueError(f"{file}: expected a readable file, found: {found}") from None
