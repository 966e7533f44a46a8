"""Tar files in WebDataset's layout: images ``KEY.jpg`` beside their classes ``KEY.cls``."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source
from sparsenet.data.errors import DataError, decoding, shortened
from sparsenet.data.labels import MAX_CLASSES, Labels, check_labels, numbered
from sparsenet.data.pixels import MAX_BYTES
from sparsenet.data.shards import find_files, left_out, missing_parts
from sparsenet.data.tree import SUFFIXES, is_visible
from sparsenet.files import file_state

CLASS = ".cls"
MOST_HEADER = 1 << 20  # bytes of a name and other attributes of a member
MOST_CLASS = 1000  # bytes of a file with a class


class Member(NamedTuple):
    """An image in a tar file."""

    name: str  # KEY.jpg as it is written there
    key: str
    suffix: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """The images of a tar file, and a text for the class of each, empty where there is none."""

    path: Path
    images: tuple[Member, ...]
    texts: tuple[str, ...]
    unused: frozenset[str]  # suffixes of other members
    alone: str  # the first class without an image beside it
    unreadable: str  # the first member that images or classes are lost with, and why


def read_tar(root: Path, config: DataConfig) -> Source | None:
    """The splits in *root*: a tar file, or a folder of some, named as those of parquet may be.

    Files of one sample follow each other and have one name up to its first dot; ``.cls`` is a
    number or a name in UTF-8, or -1 for none. Raises ``DataError`` naming the file. Where no file
    has a class, these are archives of something else, which only ``--dataset tar`` refuses here.
    """
    files = find_files(root, ".tar")
    shards = {split: [_index(path) for path in paths] for split, paths in files.items()}
    all_shards = [shard for parts in shards.values() for shard in parts]
    if not any(any(shard.texts) for shard in all_shards):
        for shard in all_shards:
            if shard.alone and shard.images:
                raise DataError(
                    f"{shard.path}: expected the files of a sample, KEY.jpg and KEY.cls, to follow "
                    f"each other and to have one name up to its first dot, found {shard.alone} "
                    "alone; tar --sort=name packs them so"
                )
        if files and config.dataset == "tar":
            first = next(iter(files.values()))[0]
            raise DataError(f"{first}: expected images KEY.jpg with classes KEY.cls, found none")
        return None
    for shard in all_shards:
        if shard.unreadable:
            raise DataError(f"{shard.path}: {shard.unreadable}")
    labels = {split: [_labels(shard) for shard in parts] for split, parts in shards.items()}
    notes = (*left_out(root, files, ".tar"), *missing_parts(files))
    if unused := sorted({each for parts in shards.values() for s in parts for each in s.unused}):
        notes += (f"not used of the samples: {shortened(unused)}",)
    classes, numbers, more = numbered(labels, root)
    splits = {
        split: TarSplit(tuple(zip(shards[split], parts, strict=True)))
        for split, parts in numbers.items()
    }
    name = root.resolve()
    return Source(name.stem if root.is_file() else name.name, classes, 3, splits, notes + more)


class _Headers(FileIO):
    """A file of which ``tarfile`` reads headers, and none that claims to be very large."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def _index(path: Path) -> Shard:
    images: list[Member] = []
    texts: list[str] = []
    unused: set[str] = set()
    alone, problems = "", list[str]()
    with decoding(str(path), "a tar file", tarfile.TarError), _Headers(path) as file:
        for _, group in groupby(_members(path, file, problems), attrgetter("key")):
            fields: dict[str, Member] = {}
            for member in group:
                if member.suffix in fields and not problems:
                    problems.append(
                        f"expected each file of a sample once, found {member.name} twice in a row"
                    )
                fields[member.suffix] = member
            pictures = [member for suffix, member in fields.items() if suffix in SUFFIXES]
            unused |= fields.keys() - SUFFIXES - {CLASS}
            if len(pictures) > 1:
                found = " and ".join(member.name for member in pictures)
                raise DataError(f"{path}: expected one image in a sample, found {found}")
            if pictures:
                images += pictures
                texts.append(_text(path, file, fields[CLASS]) if CLASS in fields else "")
            elif CLASS in fields:
                alone = alone or fields[CLASS].name
    problem = problems[0] if problems else ""
    return Shard(path, tuple(images), tuple(texts), frozenset(unused), alone, problem)


def _members(path: Path, file: FileIO, problems: list[str]) -> Iterator[Member]:
    """The files in a tar file; *problems* come to hold what else there is of images and classes."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if not is_visible(name.name):
                continue
            stem, _, suffix = name.name.partition(".")
            is_link, is_sparse = member.islnk() or member.issym(), member.issparse()
            is_of_sample = f".{suffix.lower()}" in {*SUFFIXES, CLASS}
            if is_of_sample and (is_link or is_sparse) and not problems:
                found = f"the link {name}" if is_link else f"the sparse file {name}"
                advice = "with tar --hard-dereference -h" if is_link else "without tar --sparse"
                problems.append(f"expected whole files, found {found}; pack {advice}")
            if not member.isreg() or is_sparse:
                continue
            if member.size > MAX_BYTES:
                expected = f"members of at most {MAX_BYTES:,} bytes"
                raise DataError(f"{path}: expected {expected}, found {name} of {member.size:,}")
            key = str(name.with_name(stem))
            yield Member(str(name), key, f".{suffix.lower()}", member.offset_data, member.size)


def _text(path: Path, file: FileIO, member: Member) -> str:
    if member.size > MOST_CLASS:
        expected = f"a class of at most {MOST_CLASS:,} bytes"
        raise DataError(f"{path}: expected {expected}, found {member.key}.cls of {member.size:,}")
    file.seek(member.offset)
    text = normalize("NFC", file.read(member.size).decode().strip())
    return "" if text == "-1" else text


def _labels(shard: Shard) -> Labels:
    """The classes as numbers, or as places in the sorted names that there are."""
    names = tuple(sorted(set(shard.texts) - {""}))
    if len(names) > MAX_CLASSES:
        found = f"{len(names):,}"
        raise DataError(f"{shard.path}: expected at most {MAX_CLASSES:,} classes, found {found}")
    if not names:
        return Labels(shard.path, "null", (), np.full(len(shard.images), -1))
    if all(name.isascii() and name.isdigit() for name in names):
        numbers = np.array([min(int(text), MAX_CLASSES) if text else -1 for text in shard.texts])
        checked = check_labels(numbers.clip(0), MAX_CLASSES, f"{shard.path} image")
        return Labels(shard.path, "integers", (), np.where(numbers < 0, -1, checked))
    number = {name: number for number, name in enumerate(names)} | {"": -1}
    labels = np.array([number[text] for text in shard.texts], np.int64)
    return Labels(shard.path, "string", names, labels)


@dataclass(frozen=True)
class TarSplit:
    """The tar files of one split with their labels; images are read one by one."""

    shards: tuple[tuple[Shard, np.ndarray], ...]

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self.shards)

    def __iter__(self) -> Iterator[Example]:
        names = self.names()
        for shard, labels in self.shards:
            with decoding(str(shard.path), "its images"), shard.path.open("rb") as file:
                for member, label in zip(shard.images, labels.tolist(), strict=True):
                    file.seek(member.offset)
                    yield Example(next(names), file.read(member.size), label)

    def names(self) -> Iterator[str]:
        """The file and the name in it of each image."""
        return (f"{shard.path} {each.name}" for shard, _ in self.shards for each in shard.images)

    def labels(self) -> np.ndarray:
        """int64 ``(N,)``."""
        return np.concatenate([labels for _, labels in self.shards])

    def identity(self) -> list[str]:
        """What changes when an image does."""
        return [file_state(shard.path) for shard, _ in self.shards]
