"""Who is held out, what a run keeps of its images, and what eval and export tell of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, TINY, Call, newest, write_classes, write_image
from PIL import Image

from sparsenet import checkpoints
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images
from sparsenet.data.errors import DataError
from sparsenet.data.identity import DataRecord, digest, in_order, record, to_tensors
from sparsenet.data.load import load_dataset
from sparsenet.data.sampling import hold_out
from sparsenet.data.selection import Known, Selection, select_images
from sparsenet.run import Run
from sparsenet.trained import load_trained

SHORT = (*TINY, "--max_epoch", 1, "--image_size", 8)


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


# --- who is held out -----------------------------------------------------------------------------


def test_others_do_not_change_who_is_held_out() -> None:
    ids, labels = random_ids(2000), torch.arange(2000) % 4
    whole = set(ids[hold_out(ids, labels, 0.2, "test")].tolist())
    some = torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:700]
    part = set(ids[some][hold_out(ids[some], labels[some], 0.2, "test")].tolist())
    assert part == whole & set(ids[some].tolist())
    assert abs(len(whole) - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5


def test_purposes_draw_independently() -> None:
    ids, labels = random_ids(4000), torch.zeros(4000, dtype=torch.int64)
    test, val = (hold_out(ids, labels, 0.2, purpose) for purpose in ("test", "val"))
    assert abs(int((test & val).sum()) - 160) < 4 * (4000 * 0.04 * 0.96) ** 0.5


def test_every_class_has_an_image_on_either_side() -> None:
    for seed in range(40):
        ids, labels = random_ids(24, seed), torch.arange(24) % 8  # 3 images a class
        held = hold_out(ids, labels, 0.2, "test")
        for label in range(8):
            assert 0 < int(held[labels == label].sum()) < 3


def test_copies_stay_together_and_one_image_is_not_held_out() -> None:
    ids = random_ids(50).repeat(2)
    labels = torch.arange(100) // 50  # each image is in both classes
    held = hold_out(ids, labels, 0.3, "test")
    assert torch.equal(held[:50], held[50:]) and 0 < held.sum() < 100
    lone = hold_out(ids[:1].repeat(5), torch.zeros(5, dtype=torch.int64), 0.9, "test")
    assert not lone.any()


def test_an_added_image_moves_no_other_to_the_test_side() -> None:
    """Not even where a class is so small that one is taken by force."""
    for seed in range(60):
        ids = random_ids(4, seed)
        labels = torch.zeros(4, dtype=torch.int64)
        before = hold_out(ids[:3], labels[:3], 0.05, "test")
        after = hold_out(ids, labels, 0.05, "test")
        assert not (after[:3] & ~before).any()


def test_names_and_order_do_not_matter(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", images=20)
    before = load_dataset(DataConfig(dataset_dir=str(root)))
    for folder in root.iterdir():
        for number, file in enumerate(sorted(folder.iterdir(), reverse=True)):
            file.rename(folder / f"renamed-{number:03d}.png")
    after = load_dataset(DataConfig(dataset_dir=str(root)))
    for split in ("train", "test"):
        assert sorted(before.ids[split].tolist()) == sorted(after.ids[split].tolist())
    assert record(before) == record(after)


def test_a_digest_is_of_images_and_labels() -> None:
    ids, labels = random_ids(9), torch.arange(9) % 3
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert digest(ids, labels) == digest(ids[order], labels[order])
    assert digest(ids, labels) != digest(ids, labels.roll(1))
    assert digest(ids, labels) != digest(ids[:8], labels[:8])


# --- eval and export -----------------------------------------------------------------------------


@pytest.fixture
def grown(call: Call) -> Path:
    """A run on a folder ``d`` without splits, to which images were added afterwards."""
    write_classes(Path("d"), images=25)
    assert call("train", *SHORT, "--batch_size", 8, "--dataset_dir", "d", "--out", "run").code == 0
    for label, name in enumerate(CLASSES):
        for number in range(5):
            write_image(Path("d", name, f"!new-{number}.png"), seed=5000 + 10 * label + number)
    return Path("run")


def evaluated(call: Call, *arguments: Any) -> tuple[dict[str, Any], str]:
    outcome = call("eval", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found, outcome.err


def test_what_was_trained_on_is_not_tested_on(call: Call, grown: Path) -> None:
    result = json.loads((grown / "result.json").read_text())
    assert result["tested_on"] == "held-out"
    found, said = evaluated(call, grown)
    assert (found["split"], found["images"]) == ("held-out", result["images"] + 10)
    assert said == "sparsenet: warning: test images have changed since then: 10 added\n"
    assert (
        call("eval", grown)
        .lines[0]
        .startswith(f"d: {result['images'] + 10} held-out images in d, ")
    )
    trained = evaluated(call, grown, "--split", "train")[0]
    assert trained["split"] == "training"
    assert trained["images"] == 50 - result["images"]


def test_the_stated_error_is_of_images_that_were_not_trained_on(call: Call, grown: Path) -> None:
    outcome = call("export", grown, "--format", "safetensors", "--out", "w.safetensors")
    images = evaluated(call, grown)[0]["images"]
    assert outcome.code == 0 and f"(d: {images} held-out images in " in outcome.out


def test_without_changes_eval_repeats_the_result(call: Call) -> None:
    write_classes(Path("d"), images=20)
    for flags in ((), ("--val_fraction", 0.3)):
        target = ("--dataset_dir", "d", "--out", f"run{len(flags)}")
        assert call("train", *SHORT, "--batch_size", 8, *flags, *target).code == 0
        result = json.loads(Path(target[-1], "result.json").read_text())
        found, said = evaluated(call, target[-1])
        assert said == ""
        for name in ("error", "images", "loss"):
            assert found[name] == pytest.approx(result[name])
    assert evaluated(call, "run2", "--split", "val")[0]["split"] == "validation"


def test_a_removed_image_is_named(call: Call, grown: Path) -> None:
    tested = set(Run.open(grown).images()["test.ids"].tolist())
    for file in sorted(Path("d").rglob("*.png")):
        content = file.read_bytes()
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)
        if number in tested:
            file.unlink()
            break
    assert "then: 10 added, 1 removed" in evaluated(call, grown)[1]


def test_other_data_without_splits_are_all_tested(call: Call, tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        write_classes(tmp_path / "d" / name, images=6, seed=seed)
    assert call("train", *SHORT, "--batch_size", 4, "--dataset_dir", "d", "--out", "run").code == 0
    shutil.copytree("d/test", "only/test")
    own = evaluated(call, "run")[0]
    for folder, split in (("d/test", ""), ("only", "test")):
        found, said = evaluated(call, "run", "--dataset_dir", folder)
        assert (found["images"], found["split"], said) == (12, split, "")
        assert found["error"] == own["error"] and found["loss"] == own["loss"]
    assert evaluated(call, "run", "--dataset_dir", "only")[0]["place"] == "only/test"
    found, said = evaluated(call, "run", "--dataset_dir", "d/train")
    assert found["images"] == 12
    assert said == "sparsenet: warning: the network was trained on 12 of these images\n"
    write_classes(Path("one"), images=1, seed=7)
    assert evaluated(call, "run", "--dataset_dir", "one")[0]["images"] == 2


def test_classes_are_found_by_name_and_those_without_images_are_said(call: Call) -> None:
    names = ("ant", "bee", "cat")
    write_classes(Path("d/train"), names, images=6)
    write_classes(Path("d/test"), names, images=6, seed=1)
    assert call("train", *SHORT, "--batch_size", 4, "--dataset_dir", "d", "--out", "run").code == 0
    whole = evaluated(call, "run")[0]["class_errors"]
    shutil.copytree("d/test", "e/test", ignore=shutil.ignore_patterns("bee"))
    Path("e/test/bee").mkdir()
    found, said = evaluated(call, "run", "--dataset_dir", "e")
    assert said == "sparsenet: no image of bee\n"
    assert found["class_errors"] == {**whole, "bee": None} and found["images"] == 12


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("val", "--split val: expected validation images in .*, found none"),
        ("test", r"--split: expected one of those that there are \(train, val\), found test"),
    ],
)
def test_a_split_that_is_not_there_is_refused(split: str, words: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    if split == "test":
        write_classes(tmp_path / "val", seed=1)
    config = DataConfig(dataset_dir=str(tmp_path), image_size=8, in_chans=3)
    with pytest.raises(DataError, match=words):
        select_images(config, split, CLASSES, Known({}, None))


def test_nothing_left_to_test_on_is_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", images=5)
    config = DataConfig(dataset_dir=str(root), image_size=8, in_chans=3)
    whole = select_images(config, "", CLASSES, Known({}, None))
    data = load_dataset(config)
    known = Known({"train.ids": torch.cat(list(data.ids.values()))}, DataRecord("held-out"))
    with pytest.raises(DataError, match=r"found none among 10; --split train evaluates those"):
        select_images(config, "", CLASSES, known)
    assert whole.kind == "" and len(whole.images) == 10
    assert "is not recorded" in whole.notes[0]


def test_a_weights_file_knows_the_data_it_was_made_with(call: Call, grown: Path) -> None:
    """As long as they are the same: to more of them it can only say that it does not know."""
    for file in Path("d").rglob("!new*"):
        file.unlink()
    export = ("--format", "safetensors", "--out", "w.safetensors")
    assert call("export", grown, *export).code == 0
    own = evaluated(call, grown)[0]
    found = evaluated(call, "w.safetensors", "--dataset_dir", "d")[0]
    assert (found["images"], found["split"]) == (own["images"], "held-out")
    for number in range(5):  # of which one at least would be trained on
        write_image(Path("d/ant", f"new-{number}.png"), seed=9990 + number)
    found, said = evaluated(call, "w.safetensors", "--dataset_dir", "d")
    assert found["images"] == 55 and "trained on, if any, is not recorded" in said


def test_a_description_names_number_kind_and_place() -> None:
    images = Images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3).long())
    selection = Selection("pets", images, "test", "pets/test", ())
    assert selection.description == "pets: 3 test images in pets/test"
    plain = dataclasses.replace(selection, kind="", place="")
    assert plain.description == "pets: 3 images"


def test_a_test_image_of_another_class_is_named(call: Call) -> None:
    root = write_classes(Path("d"), images=20)
    assert call("train", *SHORT, "--batch_size", 8, "--dataset_dir", "d", "--out", "run").code == 0
    ids = set(Run.open(Path("run")).images()["test.ids"].tolist())
    data = load_dataset(DataConfig(dataset_dir="d", image_size=8))
    assert set(data.ids["test"].tolist()) == ids
    for name in CLASSES:
        (root / name).rename(root / f"old-{name}")
    for name, other in zip(CLASSES, reversed(CLASSES), strict=True):
        (root / f"old-{name}").rename(root / other)
    counts = {"test": len(ids), "train": 40 - len(ids)}
    for split, kind in (("test", "test"), ("train", "training")):
        for data in ((), ("--dataset_dir", "d")):
            said = evaluated(call, "run", "--split", split, *data)[1]
            words = f"{kind} images have changed since then: {counts[split]} of another class"
            assert f"sparsenet: warning: {words}\n" in said


def test_the_runs_own_folder_with_other_images_is_refused(call: Call, grown: Path) -> None:
    for path in Path("d").rglob("*.png"):
        Image.open(path).save(path, compress_level=1)
    outcome = call("eval", grown)
    assert outcome.code == 2
    assert "expected the images that the run was made with, found none of them" in outcome.error
    assert evaluated(call, grown, "--dataset_dir", "d")[0]["images"] == 60


def test_splits_that_were_drawn_beside_given_ones_are_found_again(call: Call) -> None:
    """From a run and, as long as the data are the same, from its weights."""
    write_classes(Path("d/train"), images=20)
    write_classes(Path("d/test"), images=4, seed=1)
    target = ("--dataset_dir", "d", "--val_fraction", 0.3, "--out", "run")
    assert call("train", *SHORT, "--batch_size", 8, *target).code == 0
    assert call("export", "run", "--format", "safetensors", "--out", "w.safetensors").code == 0
    kept = Run.open(Path("run")).images()
    for network, data in (("run", ()), ("w.safetensors", ("--dataset_dir", "d"))):
        for split in ("train", "val", "test"):
            found = evaluated(call, network, "--split", split, *data)[0]
            assert found["images"] == len(kept[f"{split}.ids"])


def test_a_part_that_is_not_drawn_as_there_is_a_split_is_said_and_known(call: Call) -> None:
    for split, images in {"train": 20, "val": 4, "test": 5}.items():
        write_classes(Path("d") / split, images=images, seed=images)
    target = ("--dataset_dir", "d", "--val_fraction", 0.3, "--out", "run")
    told = call("train", *SHORT, "--batch_size", 8, *target).out
    assert "--val_fraction 0.3 has no effect: there is a val split" in told
    assert call("export", "run", "--format", "safetensors", "--out", "w.safetensors").code == 0
    train = ("--split", "train", "--dataset_dir", "d")
    found, warned = evaluated(call, "w.safetensors", *train)
    assert found["images"] == 40 and "not known" not in warned


def test_what_is_advised_for_unreadable_images_works(call: Call, grown: Path) -> None:
    write_classes(Path("other"), images=3, seed=9)
    (Path("other") / "bee" / "bad.png").write_bytes(b"?")
    refused = call("eval", grown, "--dataset_dir", "other")
    assert refused.code == 2 and "--skip_corrupt" in refused.err
    found, said = evaluated(call, grown, "--dataset_dir", "other", "--skip_corrupt")
    assert found["images"] == 6 and "bad.png" in said


def test_validation_images_that_were_drawn_beside_tested_ones_are_found_again(call: Call) -> None:
    write_classes(Path("d/train"), images=20)
    write_classes(Path("d/val"), images=4, seed=1)
    target = ("--dataset_dir", "d", "--val_fraction", 0.3, "--out", "run")
    assert call("train", *SHORT, "--batch_size", 8, *target).code == 0
    kept = Run.open(Path("run")).images()
    kinds = {"train": "training", "val": "held-out", "test": "validation"}
    for split, kind in kinds.items():
        found = evaluated(call, "run", "--split", split)[0]
        assert (found["images"], found["split"]) == (len(kept[f"{split}.ids"]), kind)


def test_training_images_that_are_tested_on_too_stay_training_images(call: Call) -> None:
    write_classes(Path("d/train"), images=8)
    Path("d/test").symlink_to("train")
    target = ("--dataset_dir", "d", "--out", "run")
    assert call("train", *SHORT, "--batch_size", 8, *target).code == 0
    found = evaluated(call, "run", "--split", "train")[0]
    assert found["images"] == 16 and found["split"] == "training"
    assert "trained on 16 of these images" in evaluated(call, "run")[1]


def test_the_result_is_repeated_where_classes_share_images(call: Call) -> None:
    root = write_classes(Path("d"), ("ant", "bee", "cat"), images=12)
    for number in range(6):
        (root / "cat" / f"c{number}.png").write_bytes((root / "ant" / f"{number}.png").read_bytes())
    target = ("--dataset_dir", "d", "--val_fraction", 0.2, "--out", "run")
    assert call("train", *SHORT, "--batch_size", 8, *target).code == 0
    kept = Run.open(Path("run")).images()
    splits = [set(kept[f"{split}.ids"].tolist()) for split in ("train", "val", "test")]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    found, said = evaluated(call, "run")
    assert said == "" and found["images"] == len(kept["test.ids"])


# --- resuming ------------------------------------------------------------------------------------


def swap(root: Path) -> str:
    first, second = (root / name / "0.png" for name in CLASSES)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return "2 of another class"


def add(root: Path) -> str:
    write_image(root / CLASSES[0] / "new.png", seed=999)
    return "1 added"


def replace(root: Path) -> str:
    write_image(root / CLASSES[0] / "3.png", seed=999)
    return "1 added, 1 removed"


def copy(root: Path) -> str:
    (root / CLASSES[0] / "copy.png").write_bytes((root / CLASSES[0] / "3.png").read_bytes())
    return "other copies of some"


@pytest.mark.parametrize("change", [swap, add, replace, copy], ids=lambda each: each.__name__)
def test_resuming_with_other_images_is_refused(
    change: Callable[[Path], str], call: Call, tmp_path: Path
) -> None:
    root = write_classes(tmp_path / "d", images=12)
    arguments = ("--batch_size", 8, "--dataset_dir", root, "--out", "run")
    assert call("train", *SHORT, *arguments).code == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    words = change(root)
    outcome = call("train", "--resume", "run", "--max_epoch", 2)
    assert outcome.code == 2 and words in outcome.error and "\n" not in outcome.error
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_resuming_with_other_test_images_says_so(call: Call, tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        write_classes(tmp_path / "d" / name, images=6, seed=seed)
    arguments = ("--batch_size", 4, "--dataset_dir", tmp_path / "d", "--out", "run")
    assert call("train", *SHORT, *arguments).code == 0
    write_image(tmp_path / "d" / "test" / CLASSES[0] / "new.png", seed=999)
    outcome = call("train", "--resume", "run", "--max_epoch", 2)
    assert outcome.code == 0
    assert "warning: the test images are others than before (1 added)" in outcome.out


def test_a_renamed_image_resumes(call: Call, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", images=12)
    arguments = ("--batch_size", 8, "--dataset_dir", root, "--out", "run")
    assert call("train", *SHORT, *arguments).code == 0
    (root / CLASSES[0] / "3.png").rename(root / CLASSES[0] / "zzz.png")
    outcome = call("train", "--resume", "run", "--max_epoch", 2)
    assert outcome.code == 0
    write_classes(tmp_path / "same", images=12)
    arguments = ("--batch_size", 8, "--dataset_dir", tmp_path / "same", "--out", "same-run")
    assert call("train", *SHORT, *arguments).code == 0
    assert call("train", "--resume", "same-run", "--max_epoch", 2).code == 0
    renamed, unchanged = (
        newest(Path(run, "checkpoints"), "last")[0].tensors for run in ("run", "same-run")
    )
    for name, tensor in unchanged.items():
        assert torch.equal(tensor, renamed[name]), name


def test_a_run_of_an_older_version_is_tested_as_it_was(call: Call) -> None:
    """It recorded none of its images, and held out a part of each class by their places."""
    write_classes(Path("d"), images=25)
    assert call("train", *SHORT, "--batch_size", 8, "--dataset_dir", "d", "--out", "run").code == 0
    run = Path("run")
    (run / "images.safetensors").unlink()
    for kind in ("best", "last"):
        checkpoint, _ = newest(run / "checkpoints", kind)
        manifest = checkpoint.manifest
        about = dataclasses.replace(manifest.about, data=None)
        checkpoints.save(
            run / "checkpoints", dataclasses.replace(manifest, about=about), checkpoint.tensors
        )
    assert load_trained(run).about.data is None
    found, said = evaluated(call, "run")
    assert (found["images"], found["split"]) == (10, "held-out") and "older version" in said
    shutil.copytree("d", "elsewhere")
    found, said = evaluated(call, "run", "--dataset_dir", "elsewhere")
    assert found["images"] == 50 and "is not recorded" in said


def test_resuming_with_the_same_images_copies_none() -> None:
    data = load_dataset(DataConfig())
    assert in_order(data, to_tensors(data)) is data
    assert in_order(data, {}) is data
