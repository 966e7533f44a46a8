"""The files of a folder and of the folders in it: which are images, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsenet.data.errors import DataError

SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("bmp", "dib", "gif", "jfif", "jpe", "jpeg", "jpg", "pgm"),
        *("png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
UNREADABLE = frozenset(
    f".{suffix}"
    for suffix in (
        *("arw", "avif", "cr2", "cr3", "dng", "heic", "heif", "jp2", "jxl"),
        *("nef", "nrw", "orf", "pef", "psd", "raf", "rw2", "srw", "svg", "3fr", "iiq"),
    )
)
# How files of these formats begin; a file with another suffix, or with none, is known by this.
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
MAX_FOLDERS = 200_000  # a few that are linked to each other give more paths than can be walked
# The end of the names of what predict --explain draws beside pictures, on which nobody must train.
HEAT_MAP = ".explained.png"
# Folders that storage systems and archivers put beside those of people.
CLUTTER = frozenset(["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"])


@dataclass(frozen=True)
class Listing:
    """What lies below a folder."""

    images: tuple[Path, ...] = ()  # sorted
    others: tuple[Path, ...] = ()  # visible files that are no images


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is one that people made."""
    return not name.startswith(".") and name not in CLUTTER


def list_folder(folder: Path) -> Listing:
    """The visible files in *folder* and in the folders in it.

    Links are followed, but not back into a folder that holds them. A link that leads nowhere, and
    a folder that may not be read, count as images, so that whoever reads them reports them.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path, found in _walk(str(folder)):
        (images if found else others).append(Path(path))
    return Listing(tuple(images), tuple(others))


# A file or folder as it was found, and the identities of the folders that hold it.
_Found = tuple[str, os.DirEntry[str] | None, frozenset[tuple[int, int]]]


def _walk(root: str) -> Iterator[tuple[str, bool]]:
    """Each visible file, in the order of paths, and whether it is an image.

    Folders may lie in each other more deeply than functions may call each other.
    """
    waiting: list[_Found] = [(root, None, frozenset())]  # the next one last
    gone_through = 0
    while waiting:
        path, entry, holders = waiting.pop()
        if entry and not is_folder(entry):
            yield path, _is_image(entry)
            continue
        try:
            status = os.stat(path)  # noqa: PTH116 - names as text are much faster
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield path, True
            continue
        gone_through += 1
        if gone_through > MAX_FOLDERS:
            raise DataError(
                f"{root}: expected at most {MAX_FOLDERS:,} folders in it, found more; links "
                "between folders are followed"
            )
        identity = status.st_dev, status.st_ino
        if identity not in holders:
            inside = holders | {identity}
            waiting += [(each.path, each, inside) for each in entries if is_visible(each.name)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether *entry* is a folder or leads to one; a link to itself does not."""
    return _holds(entry.is_dir)


def _holds(kind: Callable[[], bool]) -> bool:
    """What *kind* says of an entry; no where it cannot be told, as of a link to itself."""
    try:
        return kind()
    except OSError:
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is an image by its suffix or, where that says nothing, by how it begins.

    A pipe or a device is none, nor is what was drawn to explain a prediction.
    """
    if entry.name.endswith(HEAT_MAP):
        return False
    if not _holds(entry.is_file):
        return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
    if suffix in SUFFIXES or suffix in UNREADABLE:  # raw photographs begin as a TIFF does
        return suffix in SUFFIXES
    try:
        with open(entry.path, "rb") as file:  # noqa: PTH123
            start = file.read(16)
    except OSError:
        return False
    return start.startswith(BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def describe_others(paths: Sequence[Path]) -> str:
    """Files that are left out, counted by suffix, such as ``3 files (.txt 2, no suffix 1)``.

    Pictures in formats that cannot be read come first, with what to do.
    """
    counts = Counter(
        HEAT_MAP if path.name.endswith(HEAT_MAP) else path.suffix.lower() or "no suffix"
        for path in paths
    )
    listed = ", ".join(f"{suffix} {count}" for suffix, count in counts.most_common())
    total = len(paths)
    pictures = [path for path in paths if path.suffix.lower() in UNREADABLE]
    advice = "; pictures in such formats have to be converted, to JPEG or PNG" if pictures else ""
    first = f"the first: {(pictures or paths)[0]}"
    return f"left out: {total} file{'s' * (total != 1)} ({listed}), {first}{advice}"
