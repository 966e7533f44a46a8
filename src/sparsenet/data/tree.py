"""The files of a folder and of the folders in it: which are images, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
        *("nef", "orf", "psd", "raf", "rw2", "svg"),
    )
)
# How files of these formats begin; a file with another suffix, or with none, is known by this.
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
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


def list_folder(folder: Path, deep: bool = True) -> Listing:
    """The visible files in *folder* and, where *deep*, in the folders in it.

    Links are followed, and each folder is entered once. A link that leads nowhere, and a folder
    that may not be read, count as images, so that whoever reads them reports them.
    """
    images: list[Path] = []
    others: list[Path] = []

    def unreadable(error: OSError) -> None:
        images.append(Path(error.filename))

    for path in _files(folder, deep, unreadable):
        (images if is_image(path) else others).append(path)
    return Listing(tuple(sorted(images)), tuple(sorted(others)))


def _files(folder: Path, deep: bool, unreadable: Callable[[OSError], None]) -> Iterator[Path]:
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        status = os.stat(parent)  # noqa: PTH116 - of what os.walk names as text
        if (status.st_dev, status.st_ino) in seen:  # by a link
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(filter(is_visible, folders)) if deep else []
        yield from (Path(parent, name) for name in names if is_visible(name))


def is_image(path: Path) -> bool:
    """Whether *path* is an image by its suffix or, where that says nothing, by how it begins.

    A pipe or a device is none.
    """
    try:
        if not path.is_file():
            return path.is_symlink() and not path.exists()
        if path.suffix.lower() in SUFFIXES:
            return True
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:  # nobody may read it, which whoever reads an image reports
        return path.suffix.lower() in SUFFIXES
    return start.startswith(BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def describe_others(paths: Sequence[Path]) -> str:
    """Files that are left out, counted by suffix, such as ``3 files (.txt 2, no suffix 1)``.

    Pictures in formats that cannot be read come first, with what to do.
    """
    counts = Counter(path.suffix.lower() or "no suffix" for path in paths)
    listed = ", ".join(f"{suffix} {count}" for suffix, count in counts.most_common())
    total = len(paths)
    pictures = [path for path in paths if path.suffix.lower() in UNREADABLE]
    advice = "; pictures in such formats have to be converted, to JPEG or PNG" if pictures else ""
    first = f"the first: {(pictures or paths)[0]}"
    return f"left out: {total} file{'s' * (total != 1)} ({listed}), {first}{advice}"
