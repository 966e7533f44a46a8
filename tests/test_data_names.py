"""The name beside an image is that image's, whatever it was read from and whatever was left out."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import IMAGES, write_cifar10
from PIL import Image

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images
from sparsenet.data.identity import in_order, to_tensors
from sparsenet.data.load import load_dataset
from sparsenet.data.selection import Known, select_images

DAMAGED = (3, 17)  # of every split
Greys = dict[str, int]  # of each image by its name


def png(grey: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def files(first: int = 0) -> Iterator[tuple[int, str, bytes]]:
    """The grey, the class and the bytes of 30 images, some damaged."""
    for number in range(30):
        grey = first + number
        content = b"\x89PNG\r\n\x1a\n" if number in DAMAGED else png(grey)
        yield grey, ("ant", "bee")[number % 2], content


def folder(root: Path, first: int = 0) -> Greys:
    found = {}
    for grey, name, content in files(first):
        file = root / name / f"{(grey * 7) % 100}.png"  # in another order than the greys
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        found[str(file)] = grey
    return found


def splits(root: Path) -> Greys:
    return {**folder(root / "train"), **folder(root / "test", 40), **folder(root / "val", 80)}


def table(root: Path) -> Greys:
    found = folder(root)
    lines = [f"{path},{Path(path).parent.name}\n" for path in reversed(found)]
    (root / "labels.csv").write_text("file,label\n" + "".join(lines).replace(f"{root}/", ""))
    return found


def parquet(root: Path) -> Greys:
    """Two files for one split; every fifth image lies in a file of its own."""
    root.mkdir(parents=True)
    found = {}
    for part in range(2):
        cells, labels = [], []
        for row, (grey, name, content) in enumerate(files(30 * part)):
            by_path = grey % 5 == 4
            (root / f"{grey}.png").write_bytes(content)
            cells.append({"bytes": None if by_path else content, "path": f"{grey}.png"})
            labels.append(name)
            found[f"{root}/train-{part}.parquet row {row}"] = grey
        pq.write_table(pa.table({"image": cells, "label": labels}), root / f"train-{part}.parquet")
    return found


def tar(root: Path) -> Greys:
    root.mkdir(parents=True)
    found = {}
    for part in range(2):
        path = root / f"train-{part}.tar"
        with tarfile.open(path, "w") as archive:
            for grey, name, data in files(30 * part):
                for member, content in ((f"x/{grey}.PNG", data), (f"x/{grey}.cls", name.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, BytesIO(content))
                found[f"{path} x/{grey}.PNG"] = grey
    return found


def assert_named(images: Images, names: tuple[str, ...], greys: Greys) -> None:
    assert len(names) == len(images) > 0
    assert [greys[name] for name in names] == images.pixels[:, 0, 0, 0].tolist()


KINDS = {"folder": folder, "splits": splits, "csv": table, "parquet": parquet, "tar": tar}


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_images(kind: str, cache: str, tmp_path: Path) -> None:
    make: Callable[[Path], Greys] = KINDS[kind]
    root = tmp_path / "data"
    greys = make(root)
    labels = str(root / "labels.csv") if kind == "csv" else ""
    config = DataConfig(
        dataset_dir=str(root),
        labels=labels,
        skip_corrupt=True,
        cache="memory" if kind == "parquet" else cache,  # of which some rows are paths
        val_fraction=0.2,
        image_size=4,
        in_chans=1,
    )
    data = load_dataset(config)
    assert_named(data.test, data.test_names, greys)
    if kind != "splits":  # kept larger than they are tested on, they are read twice
        larger = load_dataset(replace(config, crop=0.5, stored_size=8))
        assert_named(larger.test, larger.test_names, greys)
    known = Known(to_tensors(data), None, own=True)
    for split in ("", "train", "val"):
        found = select_images(config, split, data.classes, known)
        assert_named(found.images, found.names, greys)
    before = to_tensors(data)  # as of a run whose files were renamed since
    before = {name: tensor.flip(0) for name, tensor in before.items()}
    ordered = in_order(data, before)
    assert ordered.train.labels.tolist() == before["train.labels"].tolist()
    assert_named(ordered.test, ordered.test_names, greys)


def test_validation_images_that_are_tested_on_have_their_names(tmp_path: Path) -> None:
    greys = {**folder(tmp_path / "train"), **folder(tmp_path / "val", 40)}
    config = DataConfig(dataset_dir=str(tmp_path), skip_corrupt=True, image_size=4, in_chans=1)
    data = load_dataset(config)
    assert data.tested_on == "validation"
    assert_named(data.test, data.test_names, greys)


def test_images_of_an_archive_are_numbered_in_their_split(tmp_path: Path) -> None:
    root = str(write_cifar10(tmp_path))
    config = DataConfig(dataset="c10", dataset_dir=root, image_size=32, in_chans=3)
    data = load_dataset(config)
    assert data.test_names == tuple(f"image {number}" for number in range(IMAGES))
    held = load_dataset(replace(config, val_fraction=0.2))
    found = select_images(config, "val", data.classes, Known(to_tensors(held), None))
    assert held.val is not None and len(found.names) == len(held.val)
    for name, pixels in zip(found.names, found.images.pixels, strict=True):
        assert (data.train.pixels[int(name.removeprefix("image "))] == pixels).all()
