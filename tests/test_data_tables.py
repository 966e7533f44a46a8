"""Parquet and CSV files as people have them: which files, which columns, which class."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sparsenet.data import parquet as parquet_module
from sparsenet.data.config import DataConfig
from sparsenet.data.csv_labels import read_csv_labels
from sparsenet.data.dataset import Dataset, Source
from sparsenet.data.errors import BadImage, DataError
from sparsenet.data.images import read_image
from sparsenet.data.load import find, load_dataset
from sparsenet.data.parquet import read_parquet
from sparsenet.data.preprocessing import Form
from sparsenet.data.unreadable import name_what_it_is

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(value: int) -> bytes:
    stream = BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def plant(*paths: Path) -> None:
    """Images with the grey of their number."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def write(
    path: Path,
    labels: Any = (0, 1),
    names: Any = None,
    images: Any = None,
    metadata: bytes | None = None,
    **columns: Any,
) -> Path:
    """A parquet file with *labels* and images that have the grey of their row."""
    labels = labels if isinstance(labels, (pa.Array, pa.ChunkedArray)) else pa.array(list(labels))
    if images is None:
        cells = [{"bytes": png(row), "path": f"{row}.png"} for row in range(len(labels))]
        images = pa.array(cells, STRUCT)
    table = pa.table({"image": images, "label": labels, **columns})
    if names is not None:
        feature = {"_type": "ClassLabel", "names": names}
        metadata = json.dumps({"info": {"features": {"label": feature}}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata and {b"huggingface": metadata}), path)
    return path


def parquet(root: Path, **options: Any) -> Source:
    source = read_parquet(root, DataConfig(dataset_dir=str(root), **options))
    assert source is not None
    return source


def labels_of(source: Source) -> dict[str, list[str]]:
    """The names of the classes of the examples of each split."""
    return {
        split: [source.classes[example.label] for example in examples]
        for split, examples in source.splits.items()
    }


def greys(source: Source, split: str = "train") -> list[int]:
    return [
        int(read_image(example.source, Form(0, 1))[0, 0, 0])  # type: ignore[arg-type]
        for example in source.splits[split]
    ]


# --- which parquet files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {"train": ["train.parquet"], "test": ["test.parquet"]},
        {"train": ["Training_1.parquet", "Training_2.parquet"], "val": ["dev.PARQUET"]},
        {
            "train": [f"train-0000{i}-of-00002-a09b74b3ef9c3b5{i}.parquet" for i in range(2)],
            "test": ["test-00000-of-00001-3fe8e4e5d1a2b3c4.parquet"],
        },
        {"train": ["data/train-0.parquet"], "val": ["data/validation-0.parquet"]},
        {"train": ["plain_text/train-0.parquet"], "test": ["plain_text/test-0.parquet"]},
        {"train": ["train/0000.parquet", "train/0001.parquet"], "test": ["test/0000.parquet"]},
        {"train": ["default/train/0000.parquet"], "test": ["default/test/0000.parquet"]},
        {"train": ["data/train/0000.parquet"], "val": ["data/eval/0000.parquet"]},
        {"train": ["train.parquet/part-0.parquet"], "test": ["test.parquet/part-0.parquet"]},
        {"train": ["train/part-0.parquet"], "test": ["test.parquet"]},
        {"train": ["0000.parquet"]},
        {"train": ["0000.parquet", "0001.parquet"]},
        {"train": ["data/part-0.parquet"]},
        {"test": ["test-0.parquet"]},
        {"test": ["test/0.parquet"]},
    ],
)
def test_layouts_of_parquet_files(files: dict[str, list[str]], tmp_path: Path) -> None:
    words = iter(["ant", "bee", "cow", "dog"])
    expected: dict[str, list[str]] = {}
    for split, names in files.items():
        for name in names:
            word = next(words)
            write(tmp_path / name, [word, word])
            expected.setdefault(split, []).extend([word, word])
    source = parquet(tmp_path)
    assert labels_of(source) == expected and source.notes == ()


def test_a_file_by_its_path_is_that_file_alone(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["a", "b"])
    write(tmp_path / "test.parquet", ["c", "c"])
    source = parquet(tmp_path / "test.parquet")
    assert labels_of(source) == {"train": ["c", "c"]} and source.name == "test"
    (tmp_path / "notes.txt").write_text("?")
    assert read_parquet(tmp_path / "notes.txt", DataConfig()) is None


def test_files_of_no_split_are_counted_and_named(tmp_path: Path) -> None:
    for name in ("train.parquet", "test.parquet", "extra.parquet", "old/train.parquet"):
        write(tmp_path / name)
    write(tmp_path / ".cache" / "train.parquet")
    assert parquet(tmp_path).notes == (
        "2 parquet files beside those of train and test left out: extra.parquet, old/train.parquet",
    )


def test_several_configurations_are_refused(tmp_path: Path) -> None:
    for name in ("en", "fr"):
        write(tmp_path / name / "train-0.parquet")
    with pytest.raises(DataError, match=r"found en, fr; --dataset_dir .*/en takes") as caught:
        parquet(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(parquet(tmp_path / "fr").splits["train"]) == 2


def test_names_that_say_two_things_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train_left.parquet")
    write(tmp_path / "a" / "train_right.parquet")
    with pytest.raises(DataError, match=r"expected one name for each .* train_left, train_right"):
        parquet(tmp_path / "a")
    write(tmp_path / "b" / "train" / "train.parquet")
    write(tmp_path / "b" / "train" / "test.parquet")
    with pytest.raises(DataError, match=r"the files of train in .*, found test\.parquet"):
        parquet(tmp_path / "b")
    assert set(parquet(tmp_path / "b" / "train").splits) == {"train", "test"}


def test_a_parquet_file_among_the_images_of_a_class_makes_no_parquet_data(tmp_path: Path) -> None:
    plant(tmp_path / "cat" / "0.png", tmp_path / "dog" / "0.png")
    write(tmp_path / "cat" / "features.parquet")
    assert read_parquet(tmp_path, DataConfig()) is None


# --- which columns --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), pa.large_string()])
def test_images_are_bytes_or_paths(kind: pa.DataType, tmp_path: Path) -> None:
    paths = [tmp_path / "pics" / f"{i}.png" for i in range(4)]
    plant(*paths)
    cells = [png(0), png(1), png(2), png(3)] if "binary" in str(kind) else [str(p) for p in paths]
    write(tmp_path / "train.parquet", [0, 1, 0, 1], images=pa.array(cells, kind))
    assert greys(parquet(tmp_path)) == [0, 1, 2, 3]


def test_paths_lead_from_the_folder_of_the_file_then_from_the_root(tmp_path: Path) -> None:
    plant(tmp_path / "x.png", tmp_path / "data" / "x.png", tmp_path / "y.png")
    cells = pa.array([{"bytes": None, "path": "x.png"}, {"bytes": None, "path": "y.png"}], STRUCT)
    write(tmp_path / "data" / "train.parquet", images=cells)
    assert greys(parquet(tmp_path)) == [1, 2]


@pytest.mark.parametrize(
    "cell",
    [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "gone.png"},
        {"bytes": None, "path": "x\0.png"},
        {"bytes": None, "path": "x" * 5000},
        {"bytes": None, "path": "."},
    ],
)
def test_a_cell_without_an_image_is_an_unreadable_image(cell: Any, tmp_path: Path) -> None:
    cells = [{"bytes": png(row), "path": None} for row in range(7)]
    path = write(tmp_path / "train.parquet", [0, 1] * 4, images=pa.array([*cells, cell]))
    with pytest.raises(BadImage, match=r"train\.parquet row 7: expected an image"):
        load_dataset(DataConfig(dataset_dir=str(tmp_path)))
    data = load_dataset(DataConfig(dataset_dir=str(tmp_path), skip_corrupt=True))
    assert len(data.skipped) == 1 and data.skipped[0].startswith(f"{path} row 7: expected an image")


ROOT_OF_EVERYTHING = "../" * 30


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "/etc/hostname", "../secret.png", "in/../../secret.png", "{}/../secret.png",
     f"{ROOT_OF_EVERYTHING}etc/hostname", "../data2/x.png", ".."],
)  # fmt: skip
def test_a_path_leads_out_of_the_folder_of_no_data_set(
    name: str, flat: bool, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    plant(tmp_path / "secret.png", tmp_path / "data2" / "x.png", root / "in" / "x.png")
    cells = ["in/x.png", name.format(root)]
    images = pa.array(cells if flat else [{"bytes": None, "path": cell} for cell in cells])
    path = write(root / "train.parquet", images=images)
    for place in (root, path):
        for skip in (True, False):
            with pytest.raises(DataError) as caught:
                load_dataset(
                    DataConfig(dataset_dir=str(place), image_column="image", skip_corrupt=skip)
                )
            assert str(caught.value) == (
                f"{path} row 1: expected the path of an image in {root}, found {cells[1]!r}; "
                "--dataset_dir names the folder that holds the table and its images"
            )


def test_paths_lead_to_the_whole_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "real" / "data"
    plant(root / "pics" / "0.png", tmp_path / "elsewhere" / "1.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    linked = tmp_path / "link" / "data"
    names = ["../pics/0.png", "../linked/1.png", f"{root}/pics/0.png", f"{linked}/linked/1.png",
             "pics/../linked/1.png", "../../data/pics/0.png"]  # fmt: skip
    write(root / "data" / "train.parquet", [0, 1] * 3, images=pa.array(names))
    monkeypatch.chdir(linked / "pics")
    assert greys(parquet(linked)) == [0, 1, 0, 1, 1, 0]
    names = [name for name in names if str(linked) not in name]
    write(root / "data" / "train.parquet", [0] * 5, images=pa.array(names))
    for place in (root, linked, Path(".."), Path("../../data"), linked / "pics" / ".."):
        assert greys(parquet(place)) == [0, 1, 0, 1, 0]


def test_texts_in_a_field_of_bytes_are_no_paths(tmp_path: Path) -> None:
    plant(tmp_path / "0.png", tmp_path / "1.png")
    cells = [{"bytes": "0.png", "path": "1.png"}] * 2
    write(tmp_path / "train.parquet", images=pa.array(cells))
    assert greys(parquet(tmp_path)) == [1, 1]
    write(tmp_path / "train.parquet", images=pa.array([{"bytes": "0.png"}] * 2))
    with pytest.raises(DataError, match="expected one image column"):
        parquet(tmp_path)
    with pytest.raises(DataError, match=r"expected images \(bytes, paths, or a struct of them\)"):
        parquet(tmp_path, image_column="image")


# --- bounds ---------------------------------------------------------------------------------------


def stretched(path: Path, groups: int, cells: dict[str, Any], rows: int = 1 << 16) -> Path:
    """A parquet file of *rows* times *groups* rows that repeat *cells*."""
    table = pa.table({
        name: pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([cell]))
        for name, cell in cells.items()
    })  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(groups):
            writer.write_table(table)
    return path


def test_more_rows_than_memory_holds_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "MAX_ROWS", 1 << 17)
    for name in ("train", "test"):
        stretched(tmp_path / f"{name}.parquet", 1, {"image": png(0), "label": "x"})
    assert len(parquet(tmp_path).splits["train"]) == 1 << 16
    path = stretched(tmp_path / "val.parquet", 1, {"image": png(0), "label": "x"}, rows=1)
    monkeypatch.setattr(parquet_module, "_read_labels", None)
    message = rf"{tmp_path}/.*\.parquet: expected at most 131,072 images in all, found 131,073$"
    with pytest.raises(DataError, match=message):
        parquet(tmp_path)
    assert path.stat().st_size < 2000


def test_a_label_that_is_repeated_is_kept_once(tmp_path: Path) -> None:
    path = stretched(tmp_path / "train.parquet", 4, {"image": png(0), "label": "x" * 100_000})
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    assert len(parquet(path).splits["train"]) == 1 << 18
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    assert pa.default_memory_pool().max_memory() - before < 1 << 28
    tracemalloc.stop()


@pytest.mark.parametrize("column", ["image", "label", "split"])
def test_a_column_that_unpacks_to_much_more_is_refused(column: str, tmp_path: Path) -> None:
    cells: dict[str, Any] = {"image": b"", "label": "x", column: "0" * (1 << 25)}
    path = stretched(tmp_path / "all.parquet", 1, cells, 1)
    assert path.stat().st_size < 20_000
    expected = r"that unpack from its [\d,]+ bytes to at most 16,777,216, found that they are 33,5"
    with pytest.raises(DataError, match=rf"all\.parquet: expected .* {expected}"):
        list(parquet(path, image_column="image").splits["train"])


def test_images_that_are_repeated_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 22
    path = stretched(tmp_path / "train.parquet", 1, {"image": bytes(size), "label": 0}, 1000)
    monkeypatch.setattr(parquet_module, "AT_ONCE", 4 * size)
    examples = iter(parquet(path).splits["train"])
    before = pa.total_allocated_bytes()
    assert next(examples).source == bytes(size)
    assert pa.total_allocated_bytes() - before < 16 * size


def test_metadata_and_names_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write(path, [0, 1], metadata=b" " * (1 << 24) + b"{}")
    with pytest.raises(DataError, match=r"at most 16,777,216 bytes of huggingface metadata"):
        parquet(path)
    write(path, [0, 1], [str(number) for number in range((1 << 16) + 1)])
    with pytest.raises(DataError, match=r"at most 65,536 classes, found 65,537$"):
        parquet(path)
    write(path, map(str, range((1 << 16) + 1)), images=pa.array([b""] * ((1 << 16) + 1)))
    with pytest.raises(DataError, match=r"at most 65,536 classes, found more in column label$"):
        parquet(path)


def test_as_many_images_as_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [0, 1])
    source = parquet(path)
    write(path, [0, 1, 1])
    with pytest.raises(DataError, match=r"train\.parquet: expected an image and a label in each"):
        list(source.splits["train"])


def test_a_column_of_splits_is_not_passed_over(tmp_path: Path) -> None:
    table = write(tmp_path / "all.parquet", [0, 1] * 4, split=pa.array(["train", "test"] * 4))
    with pytest.raises(DataError, match="expected a file for each split, found a column split"):
        parquet(tmp_path)
    table.rename(tmp_path / "train.parquet")
    assert "not used: split" in parquet(tmp_path).notes[0]


def test_a_test_file_without_a_label_column_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 4)
    images = pa.array([{"bytes": png(9), "path": None}] * 3, STRUCT)
    pq.write_table(pa.table({"image": images}), tmp_path / "test.parquet")
    source = parquet(tmp_path)
    assert set(source.splits) == {"train"}
    assert source.notes == ("test: 3 images without labels, left out",)


def test_parts_that_are_missing_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1] * 4)
    assert parquet(tmp_path).notes == ("warning: train has 1 of 2 files, as their names say",)
    write(tmp_path / "train-00001-of-00002.parquet", [0, 1] * 4)
    assert parquet(tmp_path).notes == ()


def test_the_image_column_is_found_or_told(tmp_path: Path) -> None:
    masks = pa.array([{"bytes": png(100 + row), "path": None} for row in range(2)], STRUCT)
    write(tmp_path / "a" / "train.parquet", mask=masks)
    source = parquet(tmp_path / "a")
    assert greys(source) == [0, 1]
    assert source.notes == (
        "images: column image of train.parquet; classes: column label; not used: mask",
    )
    assert greys(parquet(tmp_path / "a", image_column="mask")) == [100, 101]
    table = pq.read_table(tmp_path / "a" / "train.parquet").rename_columns(["x", "label", "y"])
    (tmp_path / "b").mkdir()
    pq.write_table(table, tmp_path / "b" / "train.parquet")
    with pytest.raises(DataError, match=r"one image column .*found x and y; --image_column"):
        parquet(tmp_path / "b")
    with pytest.raises(DataError, match=r"--image_column: .*found 'z'; the columns are x, label"):
        parquet(tmp_path / "b", image_column="z")
    with pytest.raises(DataError, match="--label_column: expected another than the image column"):
        parquet(tmp_path / "b", image_column="x", label_column="x")


@pytest.mark.parametrize(
    ("names", "options", "found"),
    [
        (["target", "id"], {}, "target"),
        (["fine_label", "coarse_label"], {}, "fine_label"),
        (["class", "category"], {}, None),
        (["class", "category"], {"label_column": "category"}, "category"),
        (["x", "y"], {}, None),
        (["x", "y"], {"label_column": "x"}, "x"),
    ],
)
def test_the_label_column_is_found_or_told(
    names: list[str], options: dict[str, Any], found: str | None, tmp_path: Path
) -> None:
    table = pq.read_table(write(tmp_path / "train.parquet", ["x", "x"], other=["y", "y"]))
    renamed = table.rename_columns(["image", *names])
    pq.write_table(renamed, tmp_path / "train.parquet")
    if found:
        assert parquet(tmp_path, **options).classes == ("xy"[names.index(found)],)
    else:
        with pytest.raises(DataError, match=rf"one label column .*{names[0]}.*--label_column"):
            parquet(tmp_path, **options)


def test_a_class_label_is_the_label_column_whatever_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [0, 1], number=[5, 5])
    table = pq.read_table(path).rename_columns(["image", "animal", "number"])
    features = {"animal": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    metadata = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    assert labels_of(parquet(tmp_path)) == {"train": ["cat", "dog"]}


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0.0, 1.0])
    with pytest.raises(DataError, match=r"one label column .* label \(double\)"):
        parquet(tmp_path)
    with pytest.raises(DataError, match=r"train\.parquet: expected integers.* found double"):
        parquet(tmp_path, label_column="label")
    with pytest.raises(DataError, match=r"train\.parquet: expected images.* found double"):
        parquet(tmp_path, image_column="label", label_column="image")


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint64"])
def test_integers_of_any_width(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pa.array([2, 0, 2], kind))
    write(tmp_path / "test.parquet", pa.array([3, 0], kind), images=None)
    source = parquet(tmp_path)
    assert source.classes == ("0", "1", "2", "3")
    assert labels_of(source) == {"train": ["2", "0", "2"], "test": ["3", "0"]}


@pytest.mark.parametrize("number", [1 << 16, 2**64 - 1])
def test_a_number_too_large_for_a_class_is_refused(number: int, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pa.array([0, number], pa.uint64()))
    with pytest.raises(DataError, match=rf"row 1: .* from 0 to 65535, found {number}$"):
        parquet(tmp_path)


def test_a_stray_number_is_no_reason_for_thousands_of_classes(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 701] * 2)
    assert len(parquet(tmp_path).classes) == 702
    write(tmp_path / "train.parquet", range(0, 22_000, 10), images=pa.array([b""] * 2200))
    assert len(parquet(tmp_path).classes) == 21_991
    write(tmp_path / "train.parquet", [0, 1, 65_535])
    with pytest.raises(DataError, match=r"row 2: expected a label of at most 1030, as there are 3"):
        parquet(tmp_path)
    write(tmp_path / "train.parquet", [0, 1, 65_535], [str(number) for number in range(65_536)])
    assert len(parquet(tmp_path).classes) == 65_536


def test_booleans_and_strings(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.parquet", [True, False])
    assert labels_of(parquet(tmp_path / "a")) == {"train": ["True", "False"]}
    assert parquet(tmp_path / "a").classes == ("False", "True")
    write(tmp_path / "b" / "train-0.parquet", ["dog", "cat"])
    write(tmp_path / "b" / "train-1.parquet", pa.array(["emu", "cat"]).dictionary_encode())
    write(tmp_path / "b" / "test.parquet", pa.array(["bee", "dog"], pa.large_string()))
    source = parquet(tmp_path / "b")
    assert source.classes == ("bee", "cat", "dog", "emu")
    assert labels_of(source) == {"train": ["dog", "cat", "emu", "cat"], "test": ["bee", "dog"]}
    write(tmp_path / "b" / "train-1.parquet", [0, 1])
    with pytest.raises(DataError, match=r"train-1\.parquet: .* found integers"):
        parquet(tmp_path / "b")


@pytest.mark.parametrize("absent", [[-1, -1], [None, -1], pa.array([None, None])])
def test_a_test_split_without_labels_is_left_out(absent: Any, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1])
    write(tmp_path / "test.parquet", absent)
    source = parquet(tmp_path)
    assert set(source.splits) == {"train"}
    assert source.notes == ("test: 2 images without labels, left out",)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match="expected images with labels"):
        parquet(tmp_path)
    write(tmp_path / "train.parquet", absent)
    with pytest.raises(DataError, match=r"train\.parquet row 0: expected a label"):
        parquet(tmp_path)


@pytest.mark.parametrize(
    ("split", "labels", "found"),
    [
        ("train", [0, -1], "expected a label from 0 to 65535, found -1"),
        ("train", ["a", None], "expected a label, found none"),
        ("train", ["a", ""], "expected a label, found none"),
        ("test", [1, -1], "expected a label from 0 to 65535, found -1"),
    ],
)
def test_some_images_without_labels_are_refused(
    split: str, labels: Sequence[Any], found: str, tmp_path: Path
) -> None:
    write(tmp_path / "train.parquet", [0, 1])
    write(tmp_path / f"{split}.parquet", labels)
    with pytest.raises(DataError, match=rf"{split}\.parquet row 1: {found}$"):
        parquet(tmp_path)


def test_files_that_number_the_same_names_otherwise_agree_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1, 2], ["ant", "bee", "caf\u00e9"])
    write(tmp_path / "train-1.parquet", [0, 1, 2], ["bee", "cafe\u0301", "ant"])
    write(tmp_path / "test.parquet", [0, 1], ["caf\u00e9", "ant"])
    source = parquet(tmp_path)
    assert source.classes == ("ant", "bee", "caf\u00e9")
    assert labels_of(source) == {
        "train": ["ant", "bee", "caf\u00e9", "bee", "caf\u00e9", "ant"],
        "test": ["caf\u00e9", "ant"],
    }
    assert [note.split()[0] for note in source.notes] == ["train-1.parquet", "test.parquet"]


@pytest.mark.parametrize(
    ("split", "names", "found"),
    [
        ("train-1", ["cat", "cow"], r"\+cow, -dog$"),
        ("train-1", ["cat"], "-dog$"),
        ("test", ["dog", "cow"], r"\+cow, -cat$"),
    ],
)
def test_files_of_other_classes_are_refused(
    split: str, names: list[str], found: str, tmp_path: Path
) -> None:
    write(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"])
    write(tmp_path / f"{split}.parquet", [0, 0], names)
    with pytest.raises(DataError, match=rf"{split}\.parquet: .* of .*train-0\.parquet, .*{found}"):
        parquet(tmp_path)


def test_numbers_without_names_are_taken_as_those_with_names(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1], ["cat", "dog"])
    write(tmp_path / "test.parquet", [1, 0])
    source = parquet(tmp_path)
    assert labels_of(source)["test"] == ["dog", "cat"]
    assert source.notes == ("test.parquet has no class names: numbered as train.parquet is",)
    write(tmp_path / "test.parquet", [1, 2])
    with pytest.raises(DataError, match=r"test\.parquet row 1: .* from 0 to 1, found 2$"):
        parquet(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        b"{",
        b"\xff",
        b"[]",
        b'{"info": null}',
        b'{"info": {"features": 3}}',
        b'{"info": {"features": {"label": {"names": 3}}}}',
        b'{"info": {"features": {"label": {"names": "ab"}}}}',
        b'{"info": {"features": {"label": {"names": [3, 4]}}}}',
        b'{"info": {"features": {"label": {"names": {"0": "a", "2": "b"}}}}}',
        b'{"info": {"features": {"label": {"names": ["a", "a"]}}}}',
        b"[" * 100_000,
    ],
)
def test_damaged_metadata_is_one_line(metadata: bytes, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1], metadata=metadata)
    with pytest.raises(DataError, match=r"train\.parquet: expected .*, found") as caught:
        parquet(tmp_path)
    assert "\n" not in str(caught.value)


# --- CSV ------------------------------------------------------------------------------------------


def labelled(root: Path, table: str | bytes, **options: Any) -> Source:
    """The images below *root* with the labels of *table*."""
    path = root.parent / "labels.csv"
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    source = read_csv_labels(root, DataConfig(dataset_dir=str(root), labels=str(path), **options))
    assert source is not None
    return source


def of_files(source: Source, split: str = "train") -> dict[str, str]:
    """The class of each file."""
    pairs = ((Path(e.name).name, source.classes[e.label]) for e in source.splits[split])
    return dict(sorted(pairs))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Four images, one of them in a folder."""
    root = tmp_path / "pets"
    plant(root / "0a.jpg", root / "0b.jpg", root / "1c.png", root / "in" / "1d.png")
    return root


PETS = {"0a.jpg": "cat", "0b.jpg": "dog", "1c.png": "cat", "1d.png": "dog"}


@pytest.mark.parametrize(
    "table",
    [
        "image,label\n0a.jpg,cat\n0b.jpg,dog\n1c.png,cat\n1d.png,dog\n",
        "id;breed\r\n0a;cat\r\n0b;dog\r\n1c;cat\r\n1d;dog\r\n",
        "sep=;\r\npath;species\r\n0a.jpg;cat\r\n0b.jpg;dog\r\n1c.png;cat\r\nin/1d.png;dog",
        "\ufeffpath\tspecies\n./0a.jpg\tcat\n0b.jpg\tdog\n1c.png\tcat\nin/1d.png\tdog",
        '"id";"class"\n"0a";"cat"\n\n0b;dog\n1c; cat\nin\\1d;dog\n',
        ",id,age,class\n0,0a,3,cat\n1,0b,4,dog\n2,1c,5,cat\n3,1d,6,dog\n",
        "dog,cat,image\n0,1,0a\n1,0,0b\n0,1,1c\n1,0,1d\n",
        "image,MEL,cat,dog\n0a,0.0,1.0,0.0\n0b,0.0,0.0,1.0\n1c,0.0,1.0,0.0\n1d,0.0,0.0,1.0\n",
        "id,file,label\n0a,0a.jpg,cat\n0b,0b.jpg,dog\n1c,1c.png,cat\n1d,1d.png,dog\n",
        'image,label\n"0a.jpg","cat"\n0b.jpg,dog\n1c.png,cat\n1d.png,dog\n0a,cat\n',
    ],
)
def test_a_table_says_the_classes_of_images(table: str, pets: Path) -> None:
    source = labelled(pets, table)
    assert of_files(source) == PETS
    assert (source.name, source.classes, source.channels) == ("pets", ("cat", "dog"), 3)


def test_auto_reads_the_table_and_trains_on_it(pets: Path) -> None:
    path = pets / "labels.csv"
    path.write_text("id,label\n0a,cat\n0b,dog\n1c,cat\n1d,dog\n")
    for dataset in ("auto", "csv"):
        data: Dataset = load_dataset(
            DataConfig(dataset=dataset, dataset_dir=str(pets), labels=str(path), test_fraction=0.5)
        )
        assert data.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (2, 2)


def test_columns_of_a_table_are_told(pets: Path) -> None:
    table = "a,b,x,y\n0a,1d,u,1\n0b,1c,v,2\n1c,0b,u,1\n1d,0a,v,2\n"
    with pytest.raises(DataError, match=r"found 'a', 'b'; --image_column says which"):
        labelled(pets, table)
    with pytest.raises(DataError, match=r"found 'b', 'x', 'y'; --label_column says which"):
        labelled(pets, table, image_column="a")
    source = labelled(pets, table, image_column="b", label_column="x")
    assert list(of_files(source).values()) == ["v", "u", "v", "u"]
    assert source.notes == ("labels.csv: images from column b, classes from x; not used: a, y",)
    for flag in ("image_column", "label_column"):
        with pytest.raises(DataError, match=rf"--{flag}: .*found 'z'; the columns are a, b, x, y"):
            labelled(pets, table, **{"image_column": "a", flag: "z"})
    with pytest.raises(DataError, match="--label_column: expected another than that of the images"):
        labelled(pets, table, image_column="a", label_column="a")


def test_a_table_of_classes_alone_names_no_images(pets: Path) -> None:
    with pytest.raises(DataError, match=r"expected a column that names the 4 images .*found ''"):
        labelled(pets, ",label\n0,cat\n1,dog\n", label_column="label")


def test_numbers_of_classes_that_are_also_names_of_files_are_no_images(tmp_path: Path) -> None:
    plant(*(tmp_path / "pics" / f"{i}.png" for i in range(10)))
    rows = "".join(f"{i},{i % 3}\n" for i in range(10))
    assert of_files(labelled(tmp_path / "pics", f"id,number\n{rows}"))["5.png"] == "2"
    rows = "".join(f"{i},{9 - i or 'x'},cat\n" for i in range(10))  # which has the missing one?
    with pytest.raises(DataError, match="found 'id', 'row'; --image_column says which"):
        labelled(tmp_path / "pics", f"row,id,label\n{rows}")


def test_a_class_may_have_the_name_of_its_image(tmp_path: Path) -> None:
    plant(tmp_path / "pics" / "cat.png", tmp_path / "pics" / "dog.png")
    table = "image,label\ncat.png,cat\ndog.png,dog\n"
    expected = {"cat.png": "cat", "dog.png": "dog"}
    assert of_files(labelled(tmp_path / "pics", table, label_column="label")) == expected
    assert of_files(labelled(tmp_path / "pics", table, image_column="image")) == expected


def test_a_column_of_splits(pets: Path) -> None:
    table = "id,label,Split\n0a,cat,Training\n0b,dog,train\n1c,cat,val\n1d,dog,TEST\n"
    source = labelled(pets, table)
    assert labels_of(source) == {"train": ["cat", "dog"], "val": ["cat"], "test": ["dog"]}
    with pytest.raises(DataError, match=r"line 5: expected train, val or test .* found 'extra'"):
        labelled(pets, table.replace("TEST", "extra"))
    only = labelled(pets, "id,label,set\n0a,cat,test\n0b,dog,test\n")
    assert labels_of(only) == {"test": ["cat", "dog"]}


def test_files_without_a_line_and_lines_that_repeat_are_noted(pets: Path) -> None:
    source = labelled(pets, "id,label\n0a,cat\n0a.jpg,cat\n0b,dog\n")
    assert of_files(source) == {"0a.jpg": "cat", "0b.jpg": "dog"}
    assert source.notes == (
        "labels.csv: images from column id, classes from label",
        "lines of labels.csv that repeat another: 1, taken once",
        "left out: 2 images without a line in labels.csv",
    )


def test_lines_whose_image_is_missing_are_refused_or_counted(pets: Path) -> None:
    table = "id,label\n0a,cat\n9x,dog\n0b,dog\n9y,emu\n"
    with pytest.raises(DataError, match=r"line 3: .* '9x' and 1 others name none; --skip_corrupt"):
        labelled(pets, table)
    source = labelled(pets, table, skip_corrupt=True)
    assert source.classes == ("cat", "dog") and len(source.splits["train"]) == 2
    assert "left out: 2 lines of labels.csv whose image is missing" in source.notes
    with pytest.raises(DataError, match=r"line 2: .* 'x' and 1 others name none"):
        labelled(pets, "id,label\nx,cat\ny,dog\n", skip_corrupt=True, image_column="id")


def test_a_name_of_two_files_is_refused(pets: Path) -> None:
    plant(pets / "0a.png")
    with pytest.raises(DataError, match=r"line 2: .* '0a' for .*0a\.jpg, .*0a\.png"):
        labelled(pets, "id,label\n0a,cat\n0b,dog\n")
    assert len(labelled(pets, "id,label\n0a.jpg,cat\n0b,dog\n").splits["train"]) == 2
    plant(pets / "deep" / "1d.png")
    with pytest.raises(DataError, match=r"line 2: .* '1d\.png' for "):
        labelled(pets, "id,label\n1d.png,cat\n0b,dog\n")


def test_names_agree_however_their_accents_are_written(tmp_path: Path) -> None:
    plant(tmp_path / "pics" / "e\u0301.png", tmp_path / "pics" / "x.png")
    source = labelled(tmp_path / "pics", "id,label\n\u00e9,cafe\u0301\nx,caf\u00e9\n")
    assert source.classes == ("caf\u00e9",) and len(source.splits["train"]) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"id,label\n0a,caf\xe9\n", r"line 2: expected text in UTF-8, found the byte 0xe9"),
        ("id,label\n0a,cat\n".encode("utf-16"), "line 1: expected text in UTF-8"),
        ("", "expected a header, and lines .* found 0 columns"),
        ("id,label\n", "found 2 columns and 0 lines"),
        ("0a\n0b\n", "found 1 columns"),
        ("0a.jpg,cat\n0b.jpg,dog\n", "line 1: expected names of columns, found image '0a.jpg'"),
        ("id,id\n0a,cat\n", "found 'id' twice"),
        ("id,label\n0a,cat\n0b\n", "line 3: expected 2 cells, found 1"),
        ("id,label\n0a,cat,\n", "line 2: expected 2 cells, found 3"),
        ('id,label\n0a,"cat\n0b,dog\n', "expected a CSV file, found it damaged"),
        ("id,label\n0a,cat\n0b,\n", "line 3: expected a class in column label, found none"),
        ("id,label\nx,cat\ny,dog\n", "expected a column that names the 4 images"),
        ("id,\n0a,cat\n", "expected one column of classes, found none"),
        ("id,x,y\n0a,cat,3\n0b,dog,4\n", "one column of classes, found 'x', 'y'; --label_column"),
        ("id,x,y\n0a,0,1\n0b,1,1\n", "one column of classes, found 'x', 'y'; --label_column"),
        ("id,class,label\n0a,cat,3\n", "found 'class', 'label'; --label_column"),
        (
            "id,label\n0a,cat\n0a,dog\n",
            "line 3: expected 'cat' for .*0a.jpg as in line 2",
        ),
        ("id,label,set\n0a,cat,train\n0a,cat,test\n", "line 3: .* found 'cat' in test$"),
    ],
)
def test_a_wrong_table_is_one_line(table: str | bytes, message: str, pets: Path) -> None:
    with pytest.raises(DataError, match=rf"labels\.csv.*{message}") as caught:
        labelled(pets, table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"id" + b",x" * 10_000 + b"\n", "at most 10,000 columns in a table, found 10,001$"),
        (b"id;label\n" + b";" * (1 << 25), "at most 16,777,216 cells in a table, found 33,554,43"),
        (b"id,label\n0a," + b"x" * (1 << 20), "field larger than field limit"),
    ],
)
def test_a_table_of_too_much_is_refused(table: bytes, message: str, pets: Path) -> None:
    with pytest.raises(DataError, match=message):
        labelled(pets, table)


def test_a_table_that_is_too_large_is_not_read(pets: Path) -> None:
    path = pets / "labels.csv"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(DataError, match=r"at most 268,435,456 bytes in a table, found 1,099"):
        load_dataset(DataConfig(dataset_dir=str(pets), labels=str(path)))


def test_columns_that_all_name_the_images_are_read_in_time(pets: Path) -> None:
    columns = 9000
    header = ",".join(map(str, range(columns)))
    rows = "".join(f"{','.join([name] * columns)},cat\n" for name in ("0a", "0b"))
    source = labelled(pets, f"{header},label\n{rows}")
    assert len(source.splits["train"]) == 2 and len(source.notes[0]) < 1000


def test_a_table_that_is_missing(pets: Path) -> None:
    (pets / "labels.csv").write_text("id,label\n0a,cat\n")

    def load(**options: Any) -> None:
        load_dataset(DataConfig(**options))

    with pytest.raises(DataError, match=r"found none at .*none\.csv$"):
        load(dataset_dir=str(pets), labels="none.csv")
    with pytest.raises(DataError, match=r"; --labels .*pets/labels\.csv\?$"):
        load(dataset_dir=str(pets), labels="labels.csv")
    with pytest.raises(DataError, match="--labels: expected a CSV file with --dataset csv"):
        load(dataset_dir=str(pets), dataset="csv")
    with pytest.raises(DataError, match=r"--labels: .* found --dataset folder"):
        load(dataset_dir=str(pets), dataset="folder", labels="labels.csv")
    with pytest.raises(DataError, match="--dataset_dir: expected a folder with data"):
        load(labels="labels.csv")
    with pytest.raises(DataError, match="--dataset_dir: expected the folder of the images"):
        load(dataset_dir=str(pets / "labels.csv"), labels="labels.csv")


# --- what no reader takes -------------------------------------------------------------------------


def saved_to_disk(root: Path) -> Path:
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (root / name).touch()
    return root


def saved_in_splits(root: Path) -> Path:
    (root / "dataset_dict.json").touch()
    (root / "train").mkdir()
    return saved_to_disk(root / "train").parent


def touched(*names: str) -> Callable[[Path], Path]:
    """A function that makes files in a folder, and returns it."""

    def make(root: Path) -> Path:
        for name in names:
            (root / name).touch()
        return root

    return make


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (saved_to_disk, "written by save_to_disk .*dataset.to_parquet"),
        (saved_in_splits, "written by save_to_disk .*dataset.to_parquet"),
        (touched("pets.zip"), r"pets\.zip, an archive: unpack it first$"),
        (lambda root: touched("x.TAR.gz")(root) / "x.TAR.gz", "an archive: unpack it first$"),
        (touched("a.7z", "b.rar", ".DS_Store"), r"a\.7z, .*b\.rar, archives: unpack them first$"),
        (lambda root: touched("t.csv")(root) / "t.csv", r"a table: .*--labels .*t\.csv"),
        (touched("t.csv", "0.png", "1.png"), r"t\.csv, a table: .*--labels .*t\.csv"),
        (touched("0.png", "pets.zip"), "^$"),
        (touched("state.json"), "^$"),
        (lambda root: root, "^$"),
        (lambda root: root / "nothing", "^$"),
        (lambda root: touched("x.txt")(root) / "x.txt", "^$"),
    ],
)
def test_what_no_reader_takes_is_named(
    make: Callable[[Path], Path], what: str, tmp_path: Path
) -> None:
    assert re.search(what, name_what_it_is(make(tmp_path)))


def test_names_that_no_file_of_a_run_may_hold_are_refused(tmp_path: Path) -> None:
    plant(tmp_path / "a.png", tmp_path / "b.png")
    long = "x" * 1001
    (tmp_path / "labels.csv").write_text(f"image,label\na.png,{long}\nb.png,y\n")
    with pytest.raises(DataError, match=r"names of at most 1,000 characters, found 'x+'… of 1,001"):
        find(DataConfig(dataset_dir=str(tmp_path), labels=str(tmp_path / "labels.csv")))
