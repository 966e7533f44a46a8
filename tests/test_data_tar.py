"""Tar files in WebDataset's layout: read right, or refused by name."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsenet.data.config import DataConfig
from sparsenet.data.errors import DataError
from sparsenet.data.load import load_dataset


def grey(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, classes: list[str], folder: str = "") -> dict[str, bytes]:
    found = {}
    for number, name in enumerate(classes, first):
        found[f"{folder}{number:03}.cls"] = name.encode()
        found[f"{folder}{number:03}.png"] = grey(number)
    return found


def read(root: Path, **options: object) -> dict[str, list[tuple[int, str]]]:
    data = load_dataset(DataConfig(dataset_dir=str(root), **options))  # type: ignore[arg-type]
    return {
        split: [
            (int(pixels[0, 0, 0]), data.classes[label])
            for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True)
        ]
        for split, images in (("train", data.train), ("test", data.test))
    }


LONG = "a folder whose name is longer than the hundred characters that headers hold " * 3


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", [["0", "2", "1"], ["cat", "dog", "ant"]])
def test_shards_are_read_in_their_order(names: list[str], form: int, tmp_path: Path) -> None:
    folder = "" if form == tarfile.USTAR_FORMAT else f"{LONG}/"
    more = {"a.txt": b"no image", "._b.png": b"of a Mac"}
    write(tmp_path / "set-train-000000.tar", samples(0, names, folder) | more, form)
    write(tmp_path / "set-train-000001.tar", samples(3, names[:2], folder), form)
    write(tmp_path / "set-val-000000.tar", samples(9, names[1:]), form)
    expected = {
        "train": [*enumerate(names), (3, names[0]), (4, names[1])],
        "test": [(9, names[1]), (10, names[2])],
    }
    assert read(tmp_path) == expected
    assert read(tmp_path, dataset="tar", cache="memory") == expected


def test_shards_on_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / "data" / "x.tar", samples(0, ["a", "b"] * 10))
    config = DataConfig(dataset_dir=str(file), cache="disk")
    disk, memory = load_dataset(config), load_dataset(DataConfig(dataset_dir=str(file)))
    assert torch.equal(disk.train.pixels, memory.train.pixels)
    write(file, samples(50, ["a", "b"] * 10))
    assert load_dataset(config).train.pixels.min() >= 50


REFUSED = {
    "two images": ({"a.png": grey(0), "a.jpg": grey(0), "a.cls": b"0"}, "expected one image"),
    "no class": ({"a.png": grey(0), "b.png": grey(1), "b.cls": b"0"}, "row 0: expected a label"),
    "a large number": ({"a.png": grey(0), "a.cls": b"1" + b"0" * 30}, "expected a label from 0"),
    "a large class": ({"a.png": grey(0), "a.cls": b"0" * 2000}, "expected a class of at most"),
    "no text": ({"a.png": grey(0), "a.cls": b"\xff"}, "expected a tar file, found it damaged"),
    "out of order": (
        {"a.cls": b"0", "b.cls": b"1", "a.png": grey(0), "b.png": grey(1)},
        r"found a\.cls alone; tar --sort=name",
    ),
    "no classes": ({"a.png": grey(0)}, "with classes KEY.cls"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_in_a_shard_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    members, words = REFUSED[kind]
    file = write(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=words) as caught:
        load_dataset(DataConfig(dataset="tar", dataset_dir=str(file)))
    assert str(file) in str(caught.value)


def test_a_shard_that_is_cut_or_claims_much_is_damaged(tmp_path: Path) -> None:
    whole = write(tmp_path / "train.tar", samples(0, ["a", "b"] * 3)).read_bytes()
    name = f"{LONG}{'x' * (2 << 20)}.png"
    large = write(tmp_path / "train.tar", {name: grey(0)} | samples(0, ["a", "b"])).read_bytes()
    for content in (whole[:700], large):
        (tmp_path / "train.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.tar: expected a tar file, found it damaged"):
            load_dataset(DataConfig(dataset="tar", dataset_dir=str(tmp_path)))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("suffix", [".png", ".cls"])
def test_a_link_is_refused_by_its_name(kind: bytes, suffix: str, tmp_path: Path) -> None:
    """GNU tar writes a file with two names once, and then as a link."""
    with tarfile.open(write(tmp_path / "x.tar", samples(0, ["a", "b"] * 3)), "a") as tar:
        for name in ("009.png", "009.cls"):
            member = tarfile.TarInfo(name)
            if name.endswith(suffix):
                member.type, member.linkname = kind, f"000{suffix}"
            tar.addfile(member)
    with pytest.raises(DataError, match=rf"the link 009\{suffix}; pack with tar --hard-deref"):
        read(tmp_path)


def test_a_sparse_file_is_refused_by_its_name(tmp_path: Path) -> None:
    """What such a file holds lies packed in the archive."""
    for name, content in samples(0, ["a", "b"] * 3).items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "004.png").open("ab") as file:
        file.truncate(1 << 20)
    names = sorted(path.name for path in tmp_path.iterdir())
    subprocess.run(["tar", "-S", "-cf", "x.tar", *names], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"the sparse file 004\.png; pack without"):
        read(tmp_path / "x.tar")


def test_a_sample_that_follows_itself_is_refused(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "x.tar", samples(0, ["a", "b"])), "a") as tar:
        for _ in range(2):
            for name, content in {"same.cls": b"a", "same.png": grey(1)}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"found same\.cls twice in a row"):
        read(tmp_path)


def test_another_archive_is_still_to_be_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "photos.tar", {"cat/1.png": grey(0), "dog/1.png": grey(1)})
    with pytest.raises(DataError, match="an archive: unpack it first"):
        load_dataset(DataConfig(dataset_dir=str(tmp_path)))
