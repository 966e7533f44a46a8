"""CIFAR-10 and CIFAR-100 as their authors publish them: https://www.cs.toronto.edu/~kriz/cifar.html.

Each is published as pickles and as binary records, and is read packed or unpacked. Members of an
archive are read as streams and never extracted.
"""

from __future__ import annotations

import gzip
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images, Source
from sparsenet.data.download import CIFAR_URL, download
from sparsenet.data.errors import DataError, decoding
from sparsenet.data.labels import check_labels
from sparsenet.data.unpickle import load_pickle
from sparsenet.files import is_special

PIXELS = 3 * 32 * 32
# What is unpacked of an archive, and how large an unpacked file may be, in bytes. A real archive
# has 186 MB, of which the largest file, CIFAR-100's training pickle, has 155 MB.
LIMIT = 1 << 28
HEADER_LIMIT = 1 << 21  # bytes of headers: 512 for a member and one, and its long name
READ_LIMIT = 1 << 20  # times that a packed file is read; 8 KB at a time, real ones take 21,000


@dataclass(frozen=True)
class Archive:
    """A published archive: of pickles, or of records where the class names are a text file."""

    classes: int
    file: str
    folder: str  # in the archive
    class_names: str
    md5: str = ""  # of the archives that are downloaded

    @property
    def binary(self) -> bool:
        return self.class_names.endswith(".txt")

    @property
    def train(self) -> list[str]:
        names = [f"data_batch_{i}" for i in range(1, 6)] if self.classes == 10 else ["train"]
        return [f"{name}.bin" for name in names] if self.binary else names

    @property
    def test(self) -> str:
        name = "test_batch" if self.classes == 10 else "test"
        return f"{name}.bin" if self.binary else name

    @property
    def members(self) -> list[str]:
        return [*self.train, self.test, self.class_names]

    @property
    def record(self) -> int:
        """Bytes of an image with its labels; CIFAR-100 has a coarse one before the fine one."""
        return PIXELS + (1 if self.classes == 10 else 2)

    @property
    def key_prefix(self) -> bytes:
        """What keys of pickles begin with: CIFAR-100 has coarse labels beside the fine ones."""
        return b"" if self.classes == 10 else b"fine_"


MD5_10, MD5_100 = "c58f30108f718f92721af3b95e74349a", "eb9058c3a382ffc7106e4002c42a8d85"
CIFAR10 = (
    Archive(10, "cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta", MD5_10),
    Archive(10, "cifar-10-binary.tar.gz", "cifar-10-batches-bin", "batches.meta.txt"),
)
CIFAR100 = (
    Archive(100, "cifar-100-python.tar.gz", "cifar-100-python", "meta", MD5_100),
    Archive(100, "cifar-100-binary.tar.gz", "cifar-100-binary", "fine_label_names.txt"),
)


def read_first(archives: tuple[Archive, ...], root: Path, config: DataConfig) -> Source | None:
    """The first of *archives*, packed or unpacked, that *root* is or holds."""
    for archive in archives:
        unpacked = any(_is_member(root / name, archive) for name in (*archive.train, archive.test))
        for path in (root if unpacked else root / archive.folder, root / archive.file):
            if path.exists():
                return _read(archive, path)
        if root.name == archive.file:
            return _read(archive, root)
    return None


def _is_member(path: Path, archive: Archive) -> bool:
    """Whether a file is named and begins as a batch of *archive*: any file may be called test."""
    if not path.is_file():
        return False
    if archive.binary:
        return path.stat().st_size % archive.record == 0
    with path.open("rb") as file:
        return file.read(1) == b"\x80"  # as pickles do


def download_first(archives: tuple[Archive, ...], root: Path) -> None:
    """Downloads the first of *archives* into the folder *root*."""
    first = archives[0]
    download(CIFAR_URL + first.file, root / first.file, first.md5)


read_cifar10 = partial(read_first, CIFAR10)
read_cifar100 = partial(read_first, CIFAR100)
download_cifar10 = partial(download_first, CIFAR10)
download_cifar100 = partial(download_first, CIFAR100)


def _read(archive: Archive, path: Path) -> Source:
    """Both splits of an archive or unpacked folder; ``DataError`` names the wrong file."""
    missing = archive.members
    batches: dict[str, Images] = {}
    classes: tuple[str, ...] = ()
    for name, data in _members(archive, path):
        missing.remove(name)
        if name == archive.class_names:
            classes = _class_names(archive, data, f"{path}: {name}")
        else:
            batches[name] = _batch(archive, data, f"{path}: {name}")
    if missing:
        expected = ", ".join(archive.members)
        raise DataError(f"{path}: expected {expected}, found no {', '.join(missing)}")
    train = Images(
        torch.cat([batches[name].pixels for name in archive.train]),
        torch.cat([batches[name].labels for name in archive.train]),
    )
    splits = {"train": train, "test": batches[archive.test]}
    return Source(f"CIFAR-{archive.classes}", classes, 3, splits)


def _members(archive: Archive, path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for name in archive.members:
            if (path / name).is_file():
                _check_size((path / name).stat().st_size, f"{path}: {name}")
                yield name, (path / name).read_bytes()
        return
    if is_special(path):
        raise DataError(f"{path}: expected an archive, found a pipe or device")
    names = {f"{archive.folder}/{name}": name for name in archive.members}
    expected = "a whole archive (delete a damaged one; --download gets it anew)"
    with (
        decoding(str(path), expected, tarfile.TarError),
        path.open("rb") as file,
        gzip.open(_Packed(file)) as stream,
        tarfile.open(fileobj=_Headers(stream), mode="r:") as tar,
    ):
        for member in tar:
            name = names.pop(str(PurePosixPath(member.name)), "")
            if not name or not member.isfile() or member.issparse():
                continue
            _check_size(member.size, f"{path}: {name}")
            stream.seek(member.offset_data)
            data = stream.read(member.size)
            if len(data) < member.size:
                raise EOFError(f"{len(data)} of {member.size} bytes of {name}")
            yield name, data
        while stream.read(1 << 20):  # on to the checksum at its end
            _check_size(stream.tell(), str(path))


def _check_size(size: int, where: str) -> None:
    if not 0 <= size <= LIMIT:
        raise DataError(f"{where}: expected at most {LIMIT:,} bytes, found {size:,}")


class _Packed(RawIOBase):
    """A packed file, read ``READ_LIMIT`` times at most.

    What follows the last stream in it is gone through byte by byte, and there may be many streams.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left = file, READ_LIMIT

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError("too many streams or zeros after them")
        return self.file.read(size)


class _Headers(RawIOBase):
    """What ``tarfile`` sees of an archive, forwards only: headers, within both limits."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream, self.left = stream, HEADER_LIMIT

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"more than {HEADER_LIMIT:,} bytes of headers")
        return self.stream.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if not self.tell() <= position <= LIMIT:
            raise tarfile.ReadError(f"a member that ends at {position:,} of {LIMIT:,} bytes")
        return self.stream.seek(position)

    def tell(self) -> int:
        return self.stream.tell()


def _class_names(archive: Archive, data: bytes, where: str) -> tuple[str, ...]:
    if archive.binary:
        lines = data.split(b"\n")
    else:
        values = load_pickle(data, where).get(archive.key_prefix + b"label_names")
        values = values if isinstance(values, list) else []
        lines = [value for value in values if isinstance(value, bytes)]
    names = [line.decode(errors="replace").strip() for line in lines]
    names = [name for name in names if name]
    if len(names) != archive.classes:
        raise DataError(f"{where}: expected {archive.classes} class names, found {len(names)}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"{where}: expected other names for other classes, found {twice[0]!r} twice"
        )
    return tuple(names)


def _batch(archive: Archive, data: bytes, where: str) -> Images:
    pixels, labels = (_records if archive.binary else _pickled)(archive, data, where)
    labels = check_labels(labels, archive.classes, f"{where} image")
    return Images(torch.tensor(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels))


def _records(archive: Archive, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``(N, 3072)`` and labels ``(N,)``."""
    if not data or len(data) % archive.record:
        expected = f"records of {archive.record} bytes"
        raise DataError(f"{where}: expected {expected}, found {len(data)} in all")
    records = np.frombuffer(data, np.uint8).reshape(-1, archive.record)
    return records[:, -PIXELS:], records[:, -PIXELS - 1]


def _pickled(archive: Archive, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    key = archive.key_prefix + b"labels"
    batch = load_pickle(data, where)
    pixels, labels = batch.get(b"data"), batch.get(key)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (PIXELS,)
    ):
        expected = f"data as a uint8 array (images, {PIXELS})"
        raise DataError(f"{where}: expected {expected}, found something else")
    if isinstance(labels, np.ndarray) and labels.shape == (len(pixels),):
        labels = labels.tolist()
    if not isinstance(labels, list) or [type(label) for label in labels] != [int] * len(pixels):
        expected = f"{len(pixels)} integers as {key.decode()}"
        raise DataError(f"{where}: expected {expected}, found something else")
    return pixels, np.array(labels)
