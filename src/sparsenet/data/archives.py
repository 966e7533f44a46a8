"""CIFAR-10 and CIFAR-100 as their authors publish them: https://www.cs.toronto.edu/~kriz/cifar.html.

Each comes as pickles and as binary records, packed or unpacked. Members of an archive are read as streams and
never extracted.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from sparsenet.data.dataset import Images, Source, Split
from sparsenet.data.download import CIFAR_URL, download
from sparsenet.data.errors import DataError, decoding
from sparsenet.data.unpickle import load_pickle

PIXELS = 3 * 32 * 32
MEMBER_LIMIT = 1 << 28  # bytes; the largest real member, CIFAR-100's training pickle, has 155 MB


@dataclass(frozen=True)
class Layout:
    """One published archive: as pickles, or as records where the class names are a text file."""

    classes: int
    stem: str
    folder: str
    names: str
    md5: str = ""  # of those that are downloaded

    @property
    def archive(self) -> str:
        return f"{self.stem}.tar.gz"

    @property
    def binary(self) -> bool:
        return self.names.endswith(".txt")

    @property
    def train(self) -> tuple[str, ...]:
        stems = [f"data_batch_{i}" for i in range(1, 6)] if self.classes == 10 else ["train"]
        return tuple(stem + ".bin" * self.binary for stem in stems)

    @property
    def test(self) -> str:
        return ("test_batch" if self.classes == 10 else "test") + ".bin" * self.binary


LAYOUTS = (
    Layout(
        10,
        "cifar-10-python",
        "cifar-10-batches-py",
        "batches.meta",
        "c58f30108f718f92721af3b95e74349a",
    ),
    Layout(10, "cifar-10-binary", "cifar-10-batches-bin", "batches.meta.txt"),
    Layout(100, "cifar-100-python", "cifar-100-python", "meta", "eb9058c3a382ffc7106e4002c42a8d85"),
    Layout(100, "cifar-100-binary", "cifar-100-binary", "fine_label_names.txt"),
)


def layouts(dataset: str) -> list[Layout]:
    """The archives of ``c10`` or ``c100``."""
    return [layout for layout in LAYOUTS if dataset == f"c{layout.classes}"]


def find_archive(root: Path, dataset: str) -> tuple[Layout, Path] | None:
    """The first of the data set's archives or unpacked folders that *root* is or holds."""
    for layout in layouts(dataset):
        unpacked = any((root / file).is_file() for file in (*layout.train, layout.test))
        for path in (root if unpacked else root / layout.folder, root / layout.archive):
            if path.exists():
                return layout, path
        if root.name == layout.archive:
            return layout, root
    return None


def holds(root: Path, name: str) -> bool:
    """Whether *root* is, or has in it, an archive or an unpacked folder of the data set ``c10`` or ``c100``."""
    return find_archive(root, name) is not None


def fetch(root: Path, name: str) -> None:
    """Downloads the archive of the data set into *root*."""
    layout = layouts(name)[0]
    download(CIFAR_URL + layout.archive, root / layout.archive, layout.md5)


def open_source(root: Path, name: str) -> Source:
    """What :func:`holds` found."""
    found = find_archive(root, name)
    assert found, "asked for after holds() said yes"
    return open_archive(*found)


def open_archive(layout: Layout, path: Path) -> Source:
    """Both splits of an archive or unpacked folder. Raises :class:`DataError` naming the file that is wrong."""
    wanted = (*layout.train, layout.test, layout.names)
    read: dict[str, Images] = {}
    classes: tuple[str, ...] = ()
    for name, data in _files(layout, path, wanted):
        if name == layout.names:
            classes = _class_names(layout, data, f"{path}: {name}")
        else:
            read[name] = _batch(layout, data, f"{path}: {name}")
    if missing := [
        name for name in wanted if name not in read and not (name == layout.names and classes)
    ]:
        raise DataError(f"{path}: expected {', '.join(wanted)}, found no {', '.join(missing)}")
    batches = [read[name] for name in layout.train]
    train = Images(torch.cat([b.pixels for b in batches]), torch.cat([b.labels for b in batches]))
    splits: dict[str, Split] = {"train": train, "test": read[layout.test]}
    return Source(f"CIFAR-{layout.classes}", classes, 3, splits)


def _files(layout: Layout, path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        yield from ((name, (path / name).read_bytes()) for name in names if (path / name).is_file())
        return
    wanted = {f"{layout.folder}/{name}": name for name in names}
    expected = "a whole archive (delete a damaged one; --download gets it anew)"
    with (
        decoding(str(path), expected, tarfile.TarError),
        gzip.open(path) as stream,
        tarfile.open(fileobj=stream) as archive,
    ):
        for member in archive:
            name = wanted.pop(str(PurePosixPath(member.name)), "")
            file = archive.extractfile(member) if name and member.isfile() else None
            if file and member.size > MEMBER_LIMIT:
                raise DataError(
                    f"{path}: {name}: expected at most {MEMBER_LIMIT} bytes, found {member.size}"
                )
            if file:
                yield name, file.read()
        while stream.read(1 << 20):  # on to the checksum at its end
            pass


def _class_names(layout: Layout, data: bytes, where: str) -> tuple[str, ...]:
    if layout.binary:
        lines = data.split(b"\n")
    else:
        found = load_pickle(data, where).get(
            b"label_names" if layout.classes == 10 else b"fine_label_names"
        )
        lines = (
            [line for line in found if isinstance(line, bytes)] if isinstance(found, list) else []
        )
    names = tuple(name for line in lines if (name := line.decode(errors="replace").strip()))
    if len(names) != layout.classes:
        raise DataError(f"{where}: expected {layout.classes} class names, found {len(names)}")
    return names


def _batch(layout: Layout, data: bytes, where: str) -> Images:
    pixels, labels = (_records if layout.binary else _pickled)(layout, data, where)
    for i, label in enumerate(labels):
        if not 0 <= label < layout.classes:
            raise DataError(
                f"{where} image {i}: expected a label below {layout.classes}, found {label}"
            )
    return Images(
        torch.tensor(pixels.reshape(-1, 3, 32, 32)), torch.tensor(labels, dtype=torch.int64)
    )


def _records(layout: Layout, data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    size = (
        1 if layout.classes == 10 else 2
    ) + PIXELS  # CIFAR-100 has a coarse label before the fine one
    if not data or len(data) % size:
        raise DataError(
            f"{where}: expected records of {size} bytes, found {len(data)} bytes in all"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return records[:, -PIXELS:], records[:, -PIXELS - 1].tolist()


def _pickled(layout: Layout, data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    key = b"labels" if layout.classes == 10 else b"fine_labels"
    batch = load_pickle(data, where)
    pixels, labels = batch.get(b"data"), batch.get(key)
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (PIXELS,)
    ):
        raise DataError(
            f"{where}: expected data as a uint8 array (images, {PIXELS}), found something else"
        )
    if not isinstance(labels, list) or [type(label) for label in labels] != [int] * len(pixels):
        raise DataError(
            f"{where}: expected {len(pixels)} integers as {key.decode()}, found something else"
        )
    return pixels, labels
