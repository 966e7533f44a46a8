"""Folders, parquet files and digits as a user has them, and every way they can be wrong."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_image
from PIL import Image
from safetensors.torch import load_file

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset
from sparsenet.data.digits import DIGITS
from sparsenet.data.errors import DataError
from sparsenet.data.load import load_dataset
from sparsenet.data.registry import KINDS
from sparsenet.presets import PRESETS


def load(root: Path | str = "", **options: Any) -> Dataset:
    return load_dataset(DataConfig(dataset_dir=str(root), **options))


def png(value: int, size: tuple[int, int] = (12, 12)) -> bytes:
    stream = BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def plant(root: Path, *classes: str, count: int = 5, size: tuple[int, int] = (12, 12)) -> Path:
    """Class folders with images whose grey is 10 times the class plus the number of the image."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png(10 * label + i, size))
    return root


def greys(images: Any) -> list[int]:
    return sorted(images.pixels[:, 0, 0, 0].tolist())


def test_digits_are_the_default() -> None:
    digits = load()
    assert (digits.name, digits.classes, digits.val) == ("digits", tuple("0123456789"), None)
    assert digits.train.pixels.shape[1:] == (1, 8, 8) and digits.train.pixels.dtype == torch.uint8
    assert len(digits.train) + len(digits.test) == 1797 and int(digits.train.pixels.max()) == 255
    again = load(val_fraction=0.1)
    assert torch.equal(again.test.pixels, digits.test.pixels)
    assert again.val is not None and len(again.val) + len(again.train) == len(digits.train)
    assert load(dataset="digits", image_size=16, in_chans=3).train.pixels.shape[1:] == (3, 16, 16)


def test_digits_are_those_of_scikit_learn() -> None:
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = load_file(DIGITS)
    assert (ours["images"].numpy() == theirs.images).all()
    assert (ours["labels"].numpy() == theirs.target).all()
    pixels = torch.from_numpy(np.rint(theirs.images * (255 / 16)).astype(np.uint8))
    data = load()
    assert sorted(map(bytes, pixels.numpy())) == sorted(
        map(bytes, torch.cat([data.train.pixels, data.test.pixels]).numpy())
    )


def test_folder_of_classes_is_split(tmp_path: Path) -> None:
    data = load(plant(tmp_path / "pets", "dog", "cat"), test_fraction=0.4)
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(greys(data.train) + greys(data.test)) == [*range(5), *range(10, 15)]
    assert data.train.pixels.shape[1:] == (3, 12, 12)
    assert load(tmp_path / "pets", dataset_name="Pets").name == "Pets"


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_with_splits_is_taken_as_it_is(val: str, tmp_path: Path) -> None:
    plant(tmp_path / "train", "a", "b", count=3)
    plant(tmp_path / val, "a", "b", count=2)
    data = load(tmp_path)
    assert data.val is None and (len(data.train), len(data.test)) == (6, 4)
    plant(tmp_path / "test", "a", "b", count=1)
    data = load(tmp_path, val_fraction=0.5)
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (6, 4, 2)


def test_train_folder_alone_is_split_and_a_class_may_be_named_train(tmp_path: Path) -> None:
    assert load(plant(tmp_path / "x" / "train", "a", "b").parent).classes == ("a", "b")
    assert load(plant(tmp_path / "y", "train", "plane")).classes == ("plane", "train")


def test_hidden_and_other_files_are_ignored_and_nested_ones_belong_to_the_class(
    tmp_path: Path,
) -> None:
    plant(tmp_path, "a", "b", ".hidden", count=2)
    for name in ("a/notes.txt", "a/.DS_Store", "a/._0.png", "a/.cache/9.png", "readme.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"?")
    plant(tmp_path / "b" / "deep", "er", count=1)
    (tmp_path / "a" / "LOUD.PNG").write_bytes(png(77))
    data = load(tmp_path)
    assert sorted(greys(data.train) + greys(data.test)) == [0, 0, 1, 10, 11, 77]


def test_image_size_is_the_images_own_or_128_or_as_asked(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    assert load(tmp_path).train.pixels.shape[2:] == (12, 12)
    assert load(tmp_path, image_size=9, in_chans=1).test.pixels.shape[1:] == (1, 9, 9)
    (tmp_path / "b" / "wide.png").write_bytes(png(50, (30, 12)))
    assert load(tmp_path).train.pixels.shape[2:] == (128, 128)


def empty_class(root: Path) -> None:
    plant(root, "a", "b")
    (root / "bare").mkdir()


def heic_class(root: Path) -> None:
    plant(root, "a", "b")
    (root / "photos").mkdir()
    (root / "photos" / "1.heic").write_bytes(b"x")


def other_classes(root: Path) -> None:
    plant(root / "train", "cat", "dog")
    plant(root / "test", "dog", "frog")


def single_images(root: Path) -> None:
    plant(root, "a", "b", count=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (heic_class, r"photos: expected images .*: 1 file .*have to be converted, to JPEG or PNG$"),
        (empty_class, r"bare: expected images of this class, found none; remove the folder$"),
        (other_classes, r"test: expected the classes of .*train \(cat, dog\), found also frog$"),
        (
            single_images,
            r"expected a class of 2 different images .* found none among 2 images of 2 classes",
        ),
        (lambda root: plant(root, "only"), r"at least 2 classes in .*nowhere, found only only$"),
        (lambda root: None, r"--dataset_dir: expected class folders in .*, found none"),
        (
            lambda root: root.rmdir(),
            r"^--dataset_dir: expected a folder with data, found .*nowhere",
        ),
        (
            lambda root: (root / "train-0.parquet").write_bytes(b"PAR1?"),
            r"train-0.parquet: expected a parquet file",
        ),
        (
            lambda root: (root / "extra.parquet").touch(),
            r"extra.parquet: expected a parquet file",
        ),
    ],
)
def test_wrong_folder_is_one_line(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    root = tmp_path / "nowhere"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)


def test_corrupt_image_is_named_or_skipped(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    bad = tmp_path / "a" / "2.png"
    bad.write_bytes(png(3)[:40])
    with pytest.raises(DataError, match=r"a/2\.png: .*--skip_corrupt"):
        load(tmp_path)
    data = load(tmp_path, skip_corrupt=True)
    (line,) = data.skipped
    assert line.startswith(f"{bad}: expected an image") and len(data.train) + len(data.test) == 9
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match=r"expected train images, found none \(10 unreadable\)"):
        load(tmp_path, skip_corrupt=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is readable to root"
)
def test_unreadable_folder_is_one_line(tmp_path: Path) -> None:
    plant(tmp_path / "x", "a", "b").chmod(0)
    with pytest.raises(DataError, match="--dataset_dir: expected readable data"):
        load(tmp_path / "x")
    (tmp_path / "x").chmod(0o700)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "c11"}, r"^--dataset: expected one of auto, digits, .*, found 'c11'$"),
        ({"in_chans": 2}, "--in_chans: expected one of 0, 1, 3, found 2"),
        ({"image_size": -1}, "--image_size"),
        ({"test_fraction": 0.0}, "--test_fraction"),
        ({"val_fraction": 1.0}, "--val_fraction"),
        ({"shift": -1}, "--shift"),
        ({"download": True}, "^--download: expected --dataset c10 or c100, found auto$"),
        (
            {"dataset": "c10"},
            "^--dataset_dir: expected a folder with data, found none given; --dataset_dir DIR",
        ),
        (
            {"dataset": "c10", "download": True},
            "^--dataset_dir: expected a folder with data, found none given; --dataset_dir DIR",
        ),
    ],
)
def test_wrong_option_names_its_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(**options)


def test_every_option_has_one_line_of_help() -> None:
    for field in fields(DataConfig):
        assert field.metadata["help"] and "\n" not in field.metadata["help"]
        assert field.default in field.metadata.get("choices", (field.default,))


def test_settings_need_neither_torch_nor_numpy() -> None:
    """The command line answers ``--help`` without loading them."""
    code = "import sys, sparsenet.data.config; print({'torch', 'numpy'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("splits", [[""], ["train", "test"]], ids=["held out", "given"])
def test_images_kept_larger_for_crops_are_tested_as_ever(splits: list[str], tmp_path: Path) -> None:
    for number, split in enumerate(splits):
        for label, name in enumerate("ab"):
            for i in range(12):
                write_image(tmp_path / split / name / f"{i}.png", 100 * number + 20 * label + i, 20)
    small, middle = (load(tmp_path, val_fraction=0.3, image_size=size) for size in (8, 12))
    kept = load(tmp_path, val_fraction=0.3, image_size=8, crop=0.1, stored_size=12)
    assert small.val is not None and kept.val is not None
    assert torch.equal(kept.train.pixels, middle.train.pixels)
    assert torch.equal(kept.val.pixels, small.val.pixels)
    assert torch.equal(kept.test.pixels, small.test.pixels)
    for name, ids in small.ids.items():
        assert torch.equal(kept.ids[name], ids)
        assert torch.equal(kept.labels(name), small.labels(name))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_names_functions_and_a_preset_that_exist(name: str) -> None:
    kind = KINDS[name]
    assert callable(pkgutil.resolve_name(kind.reader)) and kind.preset in PRESETS
    assert not kind.downloader or callable(pkgutil.resolve_name(kind.downloader))


def write_parquet(
    path: Path,
    labels: list[int | None],
    names: Any = None,
    image: str = "img",
    label: str = "label",
    bad: tuple[int, ...] = (),
) -> None:
    """A file in the hub's layout; images have the grey of their row."""
    cells = [{"bytes": b"?" if i in bad else png(i), "path": None} for i in range(len(labels))]
    table = pa.table(
        {
            image: pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            label: pa.array(labels, pa.int64()),
        }
    )
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


@pytest.mark.parametrize("names", [["cat", "dog"], {"0": "cat", "1": "dog"}, None])
@pytest.mark.parametrize(
    ("folder", "image", "label"),
    [(".", "img", "label"), ("data", "image", "fine_label"), (".", "pic", "labels")],
)
def test_parquet_in_the_hubs_layout(
    names: Any, folder: str, image: str, label: str, tmp_path: Path
) -> None:
    root = tmp_path / "pets"
    files: dict[str, list[int | None]] = {
        "train-0-of-2": [0, 1, 0, 1, 1, 0],
        "train-1-of-2": [1, 1],
        "test-0-of-1": [0, 1, 0],
    }
    for name, labels in files.items():
        write_parquet(root / folder / f"{name}.parquet", labels, names, image, label)
    data = load(root)
    assert data.name == "pets" and data.classes == (("cat", "dog") if names else ("0", "1"))
    assert data.train.labels.tolist() == [*files["train-0-of-2"], *files["train-1-of-2"]]
    assert data.test.labels.tolist() == files["test-0-of-1"]
    assert data.train.pixels[:, 2, 3, 4].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert data.val is None and data.train.pixels.shape[1:] == (3, 12, 12)


def test_parquet_validation_is_val_beside_a_test_and_the_test_without(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    assert len(load(tmp_path).test) == 2
    write_parquet(tmp_path / "validation-0.parquet", [0, 1, 1])
    data = load(tmp_path)
    assert data.val is None and len(data.test) == 3
    write_parquet(tmp_path / "test-0.parquet", [0, 1])
    data = load(tmp_path)
    assert data.val is not None and (len(data.val), len(data.test)) == (3, 2)


def test_parquet_damage_names_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    write_parquet(path, [0, 1] * 5, ["cat", "dog"], bad=(7,))
    with pytest.raises(DataError, match=r"train-0\.parquet row 7: .*--skip_corrupt"):
        load(tmp_path)
    data = load(tmp_path, skip_corrupt=True)
    (line,) = data.skipped
    assert (
        line.startswith(f"{path} row 7: expected an image")
        and len(data.train) + len(data.test) == 9
    )
    for label, name in ((2, "2"), (-1, "-1"), (None, "-1")):
        write_parquet(path, [0, 1, label], ["cat", "dog"])
        with pytest.raises(
            DataError, match=rf"train-0\.parquet row 2: expected a label from 0 to 1, found {name}$"
        ):
            load(tmp_path)
    write_parquet(path, [0, 1], label="weight")
    with pytest.raises(DataError, match=r"expected one label column .* columns img .*, weight"):
        load(tmp_path)
    write_parquet(path, [0, 1] * 5)
    write_parquet(tmp_path / "train-1.parquet", [0, 1], image="other")
    with pytest.raises(DataError, match=r"train-1\.parquet: expected"):
        load(tmp_path)
    whole = path.read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-1\.parquet: expected a parquet file"):
        load(tmp_path)


@pytest.mark.skipif(
    "SPARSENET_TEST_PARQUET" not in os.environ, reason="SPARSENET_TEST_PARQUET names no folder"
)
def test_real_parquet_folder() -> None:
    data = load(os.environ["SPARSENET_TEST_PARQUET"])
    assert len(data.train) and len(data.test) and not data.skipped
    assert np.all(np.bincount(data.train.labels.numpy(), minlength=len(data.classes)) > 0)


def test_a_class_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    for name in (b"cat", b"caf\xe9"):
        plant(tmp_path, os.fsdecode(name))
    with pytest.raises(DataError, match=r"expected names of classes in UTF-8, found 'caf\\udce9'"):
        load_dataset(DataConfig(dataset_dir=str(tmp_path)))
