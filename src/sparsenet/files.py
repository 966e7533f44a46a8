"""The user's cache folder, files written whole, and JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def cache_folder() -> Path:
    """Where this library keeps what it can make or fetch again; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsenet"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename, fsync of the folder.

    A text is written as UTF-8, and what UTF-8 does not have, such as half a surrogate pair in the
    name of a file, as an escape.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def size_text(count: int) -> str:
    """A number of bytes as it is printed: in MiB, or in KiB below one."""
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
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
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
    except (UnicodeDecodeError, RecursionError):
        pass
    return ""


def read_json(file: Path, kind: type[T]) -> T:
    """Reads a file with ``parse_json``; also ``ValueError`` where it cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: expected a readable file, found: {error.strerror}") from None
    return parse_json(data, kind, str(file))
