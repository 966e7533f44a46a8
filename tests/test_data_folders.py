"""Folders as people have them: names of splits, what is left out, links, and files of any name."""

from __future__ import annotations

import os
import shutil
import unicodedata
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset
from sparsenet.data.errors import DataError
from sparsenet.data.load import load_dataset
from sparsenet.data.splits import find_splits, split_of
from sparsenet.data.tree import describe_others, list_folder

PAIRS = {
    ("Training", "Testing"): "test",
    ("Train", "Test"): "test",
    ("TRAIN", "VAL"): "validation",
    ("training", "validation"): "validation",
    ("seg_train", "seg_test"): "test",
    ("train2017", "val2017"): "validation",
    ("TrainImages", "TestImages"): "test",
    ("train", "eval"): "validation",
    ("train", "dev"): "validation",
    ("train", "Test"): "test",
    ("train_set", "test_set"): "test",
    ("train", "test_images"): "test",
}


def load(root: Path, **options: Any) -> Dataset:
    return load_dataset(DataConfig(dataset_dir=str(root), **options))


def image(value: int, kind: str = "PNG") -> bytes:
    stream = BytesIO()
    Image.new("RGB", (9, 9), (value, value, value)).save(stream, kind)
    return stream.getvalue()


def plant(root: Path, *classes: str, count: int = 5, first: int = 0) -> Path:
    """Class folders of images, each of another grey."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(image(first + 20 * label + number))
    return root


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_split_folders_are_known_by_their_usual_names(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    plant(tmp_path / pair[0], "a", "b")
    plant(tmp_path / pair[1], "a", "b", count=2, first=100)
    data = load(tmp_path)
    assert (data.classes, data.tested_on) == (("a", "b"), PAIRS[pair])
    assert (len(data.train), len(data.test), data.val) == (10, 4, None)
    assert data.test.pixels[:, 0, 0, 0].tolist() == [100, 101, 120, 121]
    rests = {meaning[1] for name in pair if (meaning := split_of(name))}
    said = [note for note in data.notes if note.startswith("taken as splits: ")]
    assert len(said) == len(data.notes) == (rests != {"*"})


def test_all_three_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    for place, name in enumerate(("Valid", "train", "TEST")):
        plant(tmp_path / name, "a", "b", count=place + 1, first=70 * place)
    data = load(tmp_path, val_fraction=0.5)
    assert data.val is not None
    assert (len(data.val), len(data.train), len(data.test)) == (2, 4, 6)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"),
        ("seg_test", "test"),
        ("val-2017", "val"),
        ("TestImages", "test"),
        ("train_val", None),
        ("trainval", None),
        ("latest", None),
        ("evaluator", None),
        ("", None),
    ],
)
def test_what_a_name_stands_for(name: str, split: str | None) -> None:
    found = split_of(name)
    assert (found and found[0]) == split


def test_of_several_names_for_a_split_those_that_belong_together_count() -> None:
    names = ["train", "test", "my_test_photos", "notes"]
    assert find_splits(names, "d") == {"train": "train", "test": "test"}
    for names in (["train", "val", "dev"], ["train_1", "train_2"], ["Train", "train", "test"]):
        with pytest.raises(DataError, match=r"^d: expected one folder .* rename or move away"):
            find_splits(names, "d")


def test_a_class_may_be_named_as_a_split(tmp_path: Path) -> None:
    data = load(plant(tmp_path, "train", "plane", "test_tube"))
    assert data.classes == ("plane", "test_tube", "train")
    words = "taken as classes, since they hold no class folders: test_tube, train"
    assert words in data.notes


def test_stray_images_beside_class_folders_are_named_and_left_out(tmp_path: Path) -> None:
    plant(tmp_path / "train", "a", "b")
    plant(tmp_path / "test", "a", "b", first=100)
    for stray in ("train/stray.jpg", "cover.jpg"):
        (tmp_path / stray).write_bytes(image(9, "JPEG"))
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (10, 10, ("a", "b"))
    assert data.notes == (
        f"left out: 2 images in no class folder, the first: {tmp_path / 'cover.jpg'}",
    )


def test_a_folder_in_a_folder_is_entered_and_said(tmp_path: Path) -> None:
    plant(tmp_path / "d" / "photos" / "train", "a", "b")
    plant(tmp_path / "d" / "photos" / "test", "a", "b", first=100)
    (tmp_path / "d" / "__MACOSX" / "photos").mkdir(parents=True)
    data = load(tmp_path / "d")
    assert data.name == "d" and (len(data.train), len(data.test)) == (10, 10)
    assert data.notes == (f"taken: {tmp_path / 'd/photos'}, the only folder in {tmp_path / 'd'}",)


def test_a_split_that_was_packed_once_more_is_entered(tmp_path: Path) -> None:
    plant(tmp_path / "seg_train" / "seg_train", "a", "b")
    plant(tmp_path / "seg_test" / "seg_test", "a", "b", first=100)
    plant(tmp_path / "seg_pred", "seg_pred", first=150)
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.tested_on) == (10, 10, "test")
    assert f"left out: {tmp_path / 'seg_pred'}, 5 images in a folder that is no split" in data.notes


@pytest.mark.parametrize("where", ["", "unknown"])
def test_a_test_split_without_labels_is_said_and_a_part_is_held_out(
    where: str, tmp_path: Path
) -> None:
    plant(tmp_path / "train", "a", "b")
    plant(tmp_path / "test", where, first=100)
    data = load(tmp_path)
    assert data.tested_on == "held-out" and len(data.train) + len(data.test) == 10
    assert len(data.notes) == 1 and "left out" in data.notes[0] and "5 images" in data.notes[0]


def test_a_split_of_unknown_name_is_refused(tmp_path: Path) -> None:
    plant(tmp_path / "train", "a", "b")
    plant(tmp_path / "holdout", "a", "b", first=100)
    line = refusal(tmp_path)
    assert "holdout (10 images)" in line and f"--dataset_dir {tmp_path / 'train'}" in line
    assert len(load(tmp_path / "train").train) < 10
    plant(tmp_path / "val", "a", "b", first=150)
    data = load(tmp_path)
    assert data.tested_on == "validation"
    assert any("holdout, 10 images in a folder that is no split" in note for note in data.notes)


def test_folders_with_the_same_folders_look_like_splits(tmp_path: Path) -> None:
    for number in range(3):
        plant(tmp_path / f"fold{number}", "a", "b", first=60 * number)
    line = refusal(tmp_path)
    assert "fold0, fold1, fold2 with the same folders (a, b), as splits have" in line
    assert load(tmp_path, dataset="folder").classes == ("fold0", "fold1", "fold2")


def test_folders_within_a_class_belong_to_it(tmp_path: Path) -> None:
    plant(tmp_path / "animals", "cat", "dog")
    plant(tmp_path / "vehicles", "car", first=100)
    data = load(tmp_path)
    assert data.classes == ("animals", "vehicles")
    assert len(data.train) + len(data.test) == 15


def test_only_a_test_split_cannot_be_trained_on(tmp_path: Path) -> None:
    plant(tmp_path / "test", "a", "b")
    assert "expected images to train on, found only test;" in refusal(tmp_path)


def test_a_class_without_test_images_is_said(tmp_path: Path) -> None:
    plant(tmp_path / "train", "a", "b", "c")
    plant(tmp_path / "test", "a", "c", first=100)
    data = load(tmp_path)
    assert data.test.labels.tolist() == [0] * 5 + [2] * 5  # c by its name, not its place
    assert data.notes == ("warning: no test image of b",)
    plant(tmp_path / "test", "d", first=200)
    assert refusal(tmp_path).endswith("train (a, b, c), found also d")


def test_images_that_are_in_two_places_are_said(tmp_path: Path) -> None:
    plant(tmp_path / "train", "a", "b")
    plant(tmp_path / "test", "a", "b", first=100)
    (tmp_path / "test" / "a" / "copy.png").write_bytes(image(0))
    (tmp_path / "train" / "b" / "copy.png").write_bytes(image(1))
    assert load(tmp_path).notes == (
        "warning: 2 training images are also in another class, to the byte",
        "warning: 1 test images are also training images, to the byte",
    )


def test_the_content_says_what_is_an_image(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b", count=3)
    files = {
        "1.jfif": image(30, "JPEG"),
        "2.jpe": image(31, "JPEG"),
        "3": image(32, "JPEG"),
        "4.dat": image(33),
        "5.webp_": image(34, "WEBP"),
        "6.tiff2": image(35, "TIFF"),
        "7.gif2": image(36, "GIF"),
    }
    for name, content in files.items():
        (tmp_path / "a" / name).write_bytes(content)
    for name in ("notes.txt", "more.TXT", "readme"):
        (tmp_path / "b" / name).write_bytes(b"no image")
    (tmp_path / "b" / "x.NEF").write_bytes(image(37, "TIFF"))  # as raw photographs begin
    data = load(tmp_path)
    assert len(data.train) + len(data.test) == 6 + len(files)
    assert data.notes == (
        "left out: 4 files (.txt 2, no suffix 1, .nef 1), "
        f"the first: {tmp_path / 'b' / 'x.NEF'}; pictures in such formats have to be converted, "
        "to JPEG or PNG",
    )


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".thumbnails", "#recycle", "lost+found"])
def test_folders_of_storage_systems_are_no_data(name: str, tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    plant(tmp_path, name, first=100)
    plant(tmp_path / "a", name, first=150)
    data = load(tmp_path)
    assert data.classes == ("a", "b") and len(data.train) + len(data.test) == 10


def test_links_are_followed_once(tmp_path: Path) -> None:
    plant(tmp_path / "src", "cat", "dog", "more")
    root = tmp_path / "d"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to("../src/cat")
    for number in range(5):
        (root / "dog" / f"{number}.png").symlink_to(f"../../src/dog/{number}.png")
    (root / "dog" / "more").symlink_to("../../src/more")
    (root / "dog" / "loop").symlink_to("../dog")
    (root / "dog" / "up").symlink_to("..")
    (root / "dog" / "self").symlink_to("self")
    (root / "self").symlink_to("self")
    assert "dog/self: expected an image, found" in refusal(root)
    assert len(load(root, skip_corrupt=True).skipped) == 1
    (root / "dog" / "self").unlink()
    data = load(root)
    assert len(data.train) + len(data.test) == 15
    for number in range(2):
        (tmp_path / "src" / "dog" / f"{number}.png").unlink()
    assert "0.png: expected an image, found a link that leads nowhere" in refusal(root)
    data = load(root, skip_corrupt=True)
    assert len(data.skipped) == 2 and len(data.train) + len(data.test) == 13


def test_folders_may_lie_in_each_other_very_deeply(tmp_path: Path) -> None:
    root = inner = tmp_path / "data"
    root.mkdir()
    for _ in range(1200):
        inner /= "d"
        inner.mkdir()
    plant(inner, "a", "b")
    (inner / "a" / "up").symlink_to(root)
    (inner / "a" / "loop").symlink_to(".")
    try:
        data = load(root)
        assert len(list_folder(tmp_path).images) == 10
    finally:  # Python's own removal goes as deep as functions may call each other
        for name in ("a", "b"):
            shutil.rmtree(inner / name)
        while inner != root:
            inner.rmdir()
            inner = inner.parent
    assert data.classes == ("a", "b") and len(data.train) + len(data.test) == 10
    assert len(data.notes) == 1
    assert data.notes[0].startswith(f"taken: {root}/d/d/") and data.notes[0].endswith(
        f"the only folder in {root}"
    )


def test_a_folder_whose_path_is_too_long_is_reported(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    here = os.open(tmp_path / "a", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    line = refusal(tmp_path)
    assert "File name too long" in line or "expected an image, found" in line
    assert len(load(tmp_path, skip_corrupt=True).skipped) == 1
    shutil.rmtree(tmp_path / "a")


def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    data = load(tmp_path)
    assert len(data.train) + len(data.test) == 10
    assert data.notes == (f"left out: 1 file (.png 1), the first: {tmp_path / 'a' / 'pipe.png'}",)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable to root")
def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    plant(tmp_path / "a", "locked", first=100).joinpath("locked").chmod(0)
    assert "locked" in refusal(tmp_path)


@pytest.mark.parametrize("locked", ["a/locked", "b"])
def test_an_unreadable_folder_counts_as_an_image(
    locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, "a", "b", "c")
    (tmp_path / locked).mkdir(exist_ok=True)
    scan = os.scandir

    def failing(folder: Any = ".") -> Any:
        if Path(folder) == tmp_path / locked:
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", failing)
    assert tmp_path / locked in list_folder(tmp_path).images
    assert f"{tmp_path / locked}: expected an image, found a folder" in refusal(tmp_path)
    assert len(load(tmp_path, skip_corrupt=True).skipped) == 1


def test_classes_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    plant(tmp_path / "train", composed, "b")
    plant(tmp_path / "test", decomposed, "b", first=100)
    data = load(tmp_path)
    assert data.classes == (composed, "b")
    assert len(data.test) == 10
    plant(tmp_path / "train", decomposed, first=200)
    assert "expected one folder a class, found two named" in refusal(tmp_path)


def test_a_text_file_named_as_a_cifar_batch_is_none(tmp_path: Path) -> None:
    plant(tmp_path, "a", "b")
    for name in ("test", "train", "data_batch_1", "test_batch.bin", "test.bin"):
        (tmp_path / name).write_text("a list of images\n")
    assert load(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize("name", ["photos.zip", "photos.csv"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_no_folder_of_images_is_named(name: str, alone: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4")
    line = refusal(tmp_path / name if alone else tmp_path)
    assert name in line and ("unpack it first" in line or "--labels" in line)


def test_others_are_counted_by_suffix() -> None:
    paths = [Path(name) for name in ("a.txt", "b.TXT", "c")]
    assert describe_others(paths) == "left out: 3 files (.txt 2, no suffix 1), the first: a.txt"
    assert describe_others(paths[:1]) == "left out: 1 file (.txt 1), the first: a.txt"


@pytest.mark.parametrize("names", [("train", "test"), ("circle_train", "circle_test")])
def test_splits_without_class_folders_are_no_classes(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    plant(tmp_path, *names)
    assert "named as splits, with images in no class folders; --labels FILE" in refusal(tmp_path)
    (tmp_path / "train.csv").write_text("id,label\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n")
    assert f"--labels {tmp_path / 'train.csv'} can say" in refusal(tmp_path)
    assert load(tmp_path, dataset="folder").classes == tuple(sorted(names))


def test_classes_that_name_one_split_are_classes(tmp_path: Path) -> None:
    plant(tmp_path, "blood_test", "breath_test")
    assert load(tmp_path).classes == ("blood_test", "breath_test")


def test_a_split_without_images_is_said(tmp_path: Path) -> None:
    plant(tmp_path / "train", "a", "b")
    (tmp_path / "test" / "a").mkdir(parents=True)
    data = load(tmp_path)
    assert data.tested_on == "held-out"
    assert f"warning: {tmp_path / 'test'} holds no images" in data.notes


def test_a_class_that_differs_in_case_in_another_split_is_refused(tmp_path: Path) -> None:
    plant(tmp_path / "train", "Cat", "Dog")
    plant(tmp_path / "test", "cat", first=100)
    assert refusal(tmp_path).endswith("train (Cat, Dog), found also cat")


@pytest.mark.parametrize("missing", [None, "dog/test"])
def test_splits_within_classes_are_refused(missing: str | None, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        plant(tmp_path / name, "train", "test")
    if missing:
        shutil.rmtree(tmp_path / missing)
    assert "found splits in each of cat, dog; put them the other way round" in refusal(tmp_path)


def test_images_outside_of_class_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(image(1))
    assert "found 1 image outside of any; --labels FILE" in refusal(tmp_path)
    plant(tmp_path / "d" / "train", "", count=5)
    plant(tmp_path / "d" / "train", "a", "b", count=2)
    plant(tmp_path / "d" / "test", "a", "b", first=100)
    assert "train: expected class folders, found 5 images outside of any" in refusal(tmp_path / "d")


def test_folders_of_pictures_that_cannot_be_read_are_no_riddle(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.heic").write_bytes(b"?")
    assert "found none; left out: 2 files (.heic 2)" in refusal(tmp_path)


def test_a_table_beside_one_folder_of_images_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "images")
    (tmp_path / "labels.csv").write_text("id,label\n")
    assert f"found only images and labels.csv; --labels {tmp_path / 'labels.csv'}" in refusal(
        tmp_path
    )


def test_a_second_folder_for_a_split_is_said(tmp_path: Path) -> None:
    for place, name in enumerate(("train", "test", "my_test_photos")):
        plant(tmp_path / name, "a", "b", first=60 * place)
    note = f"left out: {tmp_path / 'my_test_photos'}, 10 images in a second folder for a split"
    assert note in load(tmp_path).notes


def test_classes_that_differ_in_case_only_and_copies_are_said(tmp_path: Path) -> None:
    plant(tmp_path, "cat", "Cat", "dog")
    (tmp_path / "dog" / "copy.png").write_bytes((tmp_path / "dog" / "0.png").read_bytes())
    notes = load(tmp_path, test_fraction=0.01).notes
    assert "warning: classes whose names differ in case only: Cat, cat" in notes
    assert "warning: copies of other training images, to the byte: 1" in notes


def test_data_in_a_split_are_named_after_the_folder_above(tmp_path: Path) -> None:
    plant(tmp_path / "pets" / "test", "a", "b")
    assert load(tmp_path / "pets" / "test").name == "pets/test"


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    plant(tmp_path, "only")
    assert "expected at least 2 classes in " in refusal(tmp_path)
