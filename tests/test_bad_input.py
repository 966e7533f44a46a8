"""Bad input gets one clear line, the right exit code, and nothing is lost."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, TINY, Call, newest, snapshot, write_cifar10, write_classes
from safetensors.torch import load_file, save_file

from sparsenet import checkpoints, files, optim
from sparsenet.checkpoints import RunError
from sparsenet.run import Run
from sparsenet.trained import load_trained

SHORT = (*TINY, "--max_epoch", "1", "--batch_size", "4")
LAST, BEFORE, BEST = "last-00000046", "last-00000023", "best-00000046"


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """The one line of a bad call, which exits 2."""

    def refuse(*arguments: object) -> str:
        outcome = call(*arguments)
        assert outcome.code == 2, outcome
        return outcome.error

    return refuse


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["auto", "c10", "c100", "folder", "parquet"])
def test_a_missing_dataset_folder(refused: Callable[..., str], dataset: str) -> None:
    line = refused("train", "--dataset", dataset, "--dataset_dir", "not-here")
    assert "--dataset_dir" in line and "not-here" in line and "expected" in line


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("auto", "class folders"),
        ("folder", "class folders"),
        ("c10", "cifar-10-python.tar.gz"),
        ("c100", "cifar-100-python.tar.gz"),
        ("parquet", "train*.parquet"),
        ("tar", "KEY.jpg and KEY.cls"),
    ],
)
def test_an_empty_dataset_folder_is_told_what_belongs_there(
    refused: Callable[..., str], dataset: str, expected: str
) -> None:
    Path("empty").mkdir()
    line = refused("train", "--dataset", dataset, "--dataset_dir", "empty")
    assert expected in line and "empty" in line and "found" in line


def test_no_dataset_folder_given(refused: Callable[..., str]) -> None:
    assert "--dataset_dir" in refused("train", "--dataset", "c10")


def test_a_class_folder_without_an_image_is_named(refused: Callable[..., str]) -> None:
    root = write_classes(Path("data"))
    (root / "cow").mkdir()
    (root / "cow" / "notes.txt").write_text("moo")
    line = refused("train", "--dataset_dir", root, *SHORT)
    assert str(root / "cow") in line and "expected images" in line and "found none" in line


def test_one_class_is_too_few(refused: Callable[..., str]) -> None:
    line = refused("train", "--dataset_dir", write_classes(Path("data"), ("ant",)), *SHORT)
    assert "at least 2 classes in" in line and "found only ant" in line


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0"])
def test_a_corrupt_image_is_named(refused: Callable[..., str], content: bytes) -> None:
    root = write_classes(Path("data"))
    (root / "bee" / "3.png").write_bytes(content)
    line = refused("train", "--dataset_dir", root, *SHORT)
    assert (
        str(root / "bee" / "3.png") in line
        and "expected an image" in line
        and "--skip_corrupt" in line
    )


def test_corrupt_images_can_be_skipped_and_are_counted(call: Call) -> None:
    root = write_classes(Path("data"))
    for bad in (root / "bee" / "3.png", root / "ant" / "0.png"):
        bad.write_bytes(b"no image")
    outcome = call("train", "--dataset_dir", root, *SHORT, "--skip-corrupt", "--out", "run")
    assert (outcome.code, outcome.err) == (0, "")
    for said in (outcome.out, Path("run/train.log").read_text()):
        assert "left out: 2 unreadable images" in said and str(root / "ant" / "0.png") in said
    assert "8 training and 2 held-out images" in outcome.out


def test_a_class_of_corrupt_images_only(refused: Callable[..., str]) -> None:
    root = write_classes(Path("data"))
    for bad in (root / "bee").iterdir():
        bad.write_bytes(b"no image")
    shutil.rmtree(root / "ant")
    (root / "ant").mkdir()
    shutil.copy(root / "bee" / "0.png", root / "ant" / "0.png")
    line = refused("train", "--dataset_dir", root, *SHORT, "--skip_corrupt")
    assert "found none" in line and "7 unreadable" in line


def archive(folder: Path) -> Path:
    """The folder as its authors pack it; the folder itself is gone afterwards."""
    path = folder.parent / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(folder, folder.name)
    shutil.rmtree(folder)
    return path


def test_a_truncated_archive(refused: Callable[..., str]) -> None:
    path = archive(write_cifar10(Path("data")))
    whole = path.read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])
        line = refused("train", "--dataset", "c10", "--dataset_dir", "data")
        assert str(path) in line and "expected a whole archive" in line


def test_a_tampered_archive(refused: Callable[..., str]) -> None:
    path = archive(write_cifar10(Path("data")))
    damaged = bytearray(path.read_bytes())
    damaged[-6] ^= 1  # of the checksum
    path.write_bytes(damaged)
    assert str(path) in refused("train", "--dataset", "c10", "--dataset_dir", "data")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as packed:
        packed.addfile(tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin"))
    path.write_bytes(gzip.compress(content.getvalue()))
    line = refused("train", "--dataset", "c10", "--dataset_dir", "data")
    assert "data_batch_1.bin" in line and "expected" in line


def test_a_label_out_of_range(refused: Callable[..., str]) -> None:
    file = write_cifar10(Path("data")) / "data_batch_3.bin"
    records = bytearray(file.read_bytes())
    records[4 * 3073] = 77
    file.write_bytes(records)
    line = refused("train", "--dataset", "c10", "--dataset_dir", "data")
    assert (
        "data_batch_3.bin" in line
        and "4" in line
        and "expected a label from 0 to 9" in line
        and "77" in line
    )


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("owned"),)


def test_a_malicious_pickle_is_refused_and_not_run(refused: Callable[..., str]) -> None:
    folder = Path("data/cifar-10-batches-py")
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Malicious()}, protocol=2))
    line = refused("train", "--dataset", "c10", "--dataset_dir", "data")
    assert "data_batch_1" in line and "refused" in line
    assert not Path("owned").exists()


def test_a_batch_larger_than_the_dataset(refused: Callable[..., str], folder_data: Path) -> None:
    line = refused("train", "--out", "run", "--batch_size", 5000)
    assert "--batch_size" in line and "1438" in line and "5000" in line
    line = refused("train", "--out", "run", "--dataset_dir", folder_data, *TINY, "--batch_size", 11)
    assert "9" in line and "11" in line


@pytest.mark.parametrize("flags", [("--dataset", "digits"), ("--preset", "digits")])
def test_a_folder_that_would_be_ignored(
    refused: Callable[..., str], trained: Path, folder_data: Path, flags: tuple[str, str]
) -> None:
    line = refused("train", *flags, "--dataset_dir", folder_data, *SHORT)
    assert str(folder_data) in line and "--dataset digits" in line and "--dataset auto" in line
    line = refused("eval", trained, "--dataset", "digits", "--dataset_dir", folder_data)
    assert str(folder_data) in line and "--dataset digits" in line


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "fitting"),
    [
        (("--depth", "8"), ("7", "10")),
        (("--depth", "41"), ("40", "43")),
        (("--depth", "3"), ("7", "10")),
        (("--depth", "-5"), ("7", "10")),
        (("--depth", "99", "--bottleneck"), ("94", "100")),
        (("--depth", "40", "--blocks", "2,2"), ("7",)),
    ],
)
def test_a_depth_that_fits_no_network_says_which_do(
    refused: Callable[..., str], flags: tuple[str, ...], fitting: tuple[str, ...]
) -> None:
    line = refused("train", *flags)
    assert "depth" in line and f"found {flags[1]}" in line
    assert set(fitting) <= set(re.findall(r"\d+", line.rpartition("found")[0]))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[0], [0, 1, 2]], ("the stage output", "2")),
        ([[1], [0]], ("layer 1", "1")),
        ([[0], [5]], ("the stage output", "5")),
        ([[-1], [0]], ("layer 1", "-1")),
        ([[0], [0, 0]], ("the stage output", "twice")),
        ([[0], []], ("the stage output", "nothing")),
        ([[0]], ("fetch", "1 layer")),
    ],
)
def test_a_wrong_topology_names_the_layer(
    refused: Callable[..., str], table: list[list[int]], expected: tuple[str, ...]
) -> None:
    Path("mine.json").write_text(json.dumps({"network": {"depth": 7, "fetch": table}}))
    line = refused("train", "--config", "mine.json")
    assert all(part in line for part in expected), line


@pytest.mark.parametrize(
    ("fetch", "expected"),
    [
        ("mine.py:too_many", "reads feature"),
        ("mine.py:nothing", "reads nothing"),
        ("mine.py:broken", "mine.py"),
        ("mine.py:no_such", "no_such"),
        ("mine.py:number", "number"),
        ("other.py:chain", "other.py"),
    ],
)
def test_a_wrong_function_as_topology(
    refused: Callable[..., str], fetch: str, expected: str
) -> None:
    Path("mine.py").write_text(
        "number = 3\n"
        "def too_many(i): return range(i + 1)\n"
        "def nothing(i): return []\n"
        "def broken(i): return 1 // 0\n"
    )
    line = refused("train", "--fetch", fetch, *TINY)
    assert expected in line and "expected" in line
    assert "sparse[:BASE]" not in line or "FILE.py:FUNCTION" in line


@pytest.mark.parametrize(
    "device", ["gpu", "meta", "cuda" if not torch.cuda.is_available() else "xpu"]
)
@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_a_device_that_is_not_there(
    refused: Callable[..., str], trained: Path, device: str, command: str
) -> None:
    arguments = {"train": TINY, "eval": (trained,), "predict": (trained, "x.png")}[command]
    line = refused(command, *arguments, "--device", device)
    assert "--device" in line and f"'{device}'" in line and "cpu" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("onnxruntime", "--precision", "bf16"),
            ("--precision", "expected fp32 for onnxruntime", "found bf16"),
        ),
        (
            ("onnxruntime", "--device", "cuda"),
            ("--device", "cpu with --engine onnxruntime", "found 'cuda'"),
        ),
        (
            ("openvino", "--device", "cuda"),
            ("--device", "cpu with --engine openvino", "found 'cuda'"),
        ),
    ],
)
def test_an_engine_asked_for_what_it_cannot(
    refused: Callable[..., str], trained: Path, flags: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    line = refused("eval", trained, "--engine", *flags)
    assert all(part in line for part in expected), line


def test_an_engine_that_is_not_installed(
    refused: Callable[..., str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    line = refused("eval", trained, "--engine", "openvino")
    assert "expected the package openvino" in line and "pip install '.[openvino]'" in line


# --- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"trian": {}}', "trian"),
        ('{"train": {"epochs": 3}}', "epochs"),
        ('{"train": {"batch_size": "many"}}', "batch_size"),
        ('{"train": {"batch_size": null}}', "batch_size"),
        ('{"train": {"batch_size": 8.5}}', "batch_size"),
        ('{"data": {"mirror": "no"}}', "mirror"),
        ('{"network": {"depth": 7, "fetch": 7}}', "fetch"),
        ('{"network": {"depth": 8}}', "depth"),
    ],
)
def test_a_wrong_configuration_file(refused: Callable[..., str], text: str, expected: str) -> None:
    Path("mine.json").write_text(text)
    assert expected in refused("train", "--config", "mine.json", *TINY[2:], "--max_epoch", 1)


def test_a_configuration_that_is_not_there(refused: Callable[..., str]) -> None:
    assert "not-here.json" in refused("train", "--config", "not-here.json")
    assert "config.json" in refused("train", "--config", ".")  # a folder that is no run


# --- run folders ----------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder(refused: Callable[..., str], trained: Path) -> None:
    before = snapshot(trained)
    line = refused("train", *TINY, "--max_epoch", 1, "--out", trained)
    assert str(trained) in line and "--resume" in line
    assert snapshot(trained) == before


def test_a_folder_with_other_content_is_left_alone(
    refused: Callable[..., str], copied: Path
) -> None:
    (
        copied / "config.json"
    ).unlink()  # no run folder any more, but checkpoints and metrics that someone may need
    before = snapshot(copied)
    assert str(copied) in refused("train", *TINY, "--max_epoch", 1, "--out", copied)
    assert snapshot(copied) == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_run_folder_that_cannot_be_written(refused: Callable[..., str], out: str) -> None:
    Path("file").write_text("precious")
    line = refused("train", *TINY, "--out", out)
    assert "--out" in line and out in line and "expected" in line
    assert Path("file").read_text() == "precious"


def test_a_run_that_cannot_be_locked(refused: Callable[..., str], copied: Path) -> None:
    (copied / ".lock").unlink(missing_ok=True)
    (copied / ".lock").mkdir()
    before = snapshot(copied)
    assert str(copied) in refused("train", "--resume", copied)
    assert snapshot(copied) == before


def no_config(run: Path) -> None:
    (run / "config.json").unlink()


def config_is_a_folder(run: Path) -> None:
    no_config(run)
    (run / "config.json").mkdir()


def config_is_no_json(run: Path) -> None:
    (run / "config.json").write_text("{")


def config_is_binary(run: Path) -> None:
    (run / "config.json").write_bytes(b"\xff\xfe\0")


def run_is_a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("")


UNREADABLE = [
    no_config,
    config_is_a_folder,
    config_is_no_json,
    config_is_binary,
    run_is_a_file,
    shutil.rmtree,
]


@pytest.mark.parametrize("damage", UNREADABLE)
@pytest.mark.parametrize("command", [("eval",), ("train", "--resume")])
def test_an_unreadable_run_folder(
    refused: Callable[..., str],
    copied: Path,
    damage: Callable[[Path], None],
    command: tuple[str, ...],
) -> None:
    damage(copied)
    line = refused(*command, copied)
    assert str(copied) in line and "expected" in line


@pytest.mark.parametrize("command", ["predict", "export", "report"])
def test_no_run_folder(refused: Callable[..., str], command: str, folder_data: Path) -> None:
    for folder in (Path("not-here"), folder_data):
        line = refused(command, folder, *(["x.png"] if command == "predict" else []))
        assert str(folder) in line and "expected a run folder" in line


def test_two_processes_training_into_one_folder(refused: Callable[..., str], copied: Path) -> None:
    hold = (
        "import sys, filelock\n"
        "with filelock.FileLock(sys.argv[1]): print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(copied / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = snapshot(copied)
        line = refused("train", "--resume", copied, "--max_epoch", 3)
        assert "another process" in line and str(copied) in line
        assert snapshot(copied) == before


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--depth", "10"), "depth 7 -> 10"),
        (("--lr", "0.3", "--batch_size", "32"), "lr 0.2 -> 0.3"),
        (("--lr", "0.3", "--batch_size", "32"), "batch_size 64 -> 32"),
        (("--seed", "1", "--max_epoch", "9"), "seed 0 -> 1"),
        (("--fetch", "dense"), "fetch 'sparse' -> 'dense'"),
    ],
)
def test_resuming_with_changed_settings_shows_the_difference(
    refused: Callable[..., str], trained: Path, flags: tuple[str, ...], difference: str
) -> None:
    before = snapshot(trained)
    assert difference in refused("train", "--resume", trained, *flags)
    assert snapshot(trained) == before


@pytest.mark.parametrize(
    "flags", [("--batch_size", 5000), ("--dataset_dir", "not-here"), ("--image_size", 2)]
)
def test_a_refused_run_leaves_no_folder_behind(
    refused: Callable[..., str], flags: tuple[object, ...]
) -> None:
    refused("train", *TINY, *flags)
    refused("train", *TINY, *flags, "--out", "mine")
    assert not list(Path("runs").glob("*")) and not Path("mine").exists()


def test_an_empty_folder_of_the_user_stays_and_stays_empty(refused: Callable[..., str]) -> None:
    Path("mine").mkdir()
    refused("train", *TINY, "--batch_size", 5000, "--out", "mine")
    assert list(Path("mine").iterdir()) == []


def test_what_a_killed_start_leaves_is_taken(call: Call) -> None:
    Run.create(Path("mine"))
    (Path("mine") / ".lock").touch()
    (Path("mine") / ".config.json.0123abcd").write_text("{")
    assert call("train", *SHORT[:-2], "--out", "mine").code == 0


def test_of_two_new_runs_in_one_folder_one_wins_and_keeps_it(tmp_path: Path) -> None:
    winner, loser, late = (Run.create(tmp_path / "one") for _ in range(3))
    with winner.locked():
        with pytest.raises(RunError, match="another process"), loser.locked():
            pass
        files.write_json(winner.path / "config.json", {})
    assert winner.is_described
    with pytest.raises(RunError, match="already holds a run"), late.locked():
        pass
    assert winner.is_described and winner.checkpoints.is_dir()


@pytest.mark.parametrize("file", ["config.json", "graph.json", "requirements.txt", "graph.svg"])
def test_a_disk_that_is_full_at_the_start_leaves_nothing_or_a_run(
    call: Call, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write = files.write_atomic

    def full(path: Path, content: str | bytes) -> None:
        if path.name == file:
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        patch.setattr("sparsenet.pictures.network.write_atomic", full)
        outcome = call("train", *SHORT[:-2], "--out", "run")
    assert outcome.code == 1
    assert outcome.error.startswith("sparsenet: run: the run broke off: No space left on device")
    if file == "config.json":
        assert not Path("run").exists() and "--resume" not in outcome.error
    else:
        assert outcome.error.endswith("; go on with: sparsenet train --resume run")
        assert call("train", "--resume", "run").code == 0


def test_a_resumed_run_stays_in_its_folder(refused: Callable[..., str], trained: Path) -> None:
    assert "--out" in refused("train", "--resume", trained, "--out", "elsewhere")


@pytest.mark.parametrize(
    ("classes", "images", "expected"),
    [((*CLASSES, "cat"), 6, "3 classes"), (("ant", "wasp"), 6, "classes"), (CLASSES, 12, "images")],
)
def test_resuming_on_other_data_is_refused(
    refused: Callable[..., str],
    trained_on_folder: Path,
    classes: tuple[str, ...],
    images: int,
    expected: str,
) -> None:
    run = Path(shutil.copytree(trained_on_folder, "copy"))
    other = write_classes(Path("other"), classes, images)
    before = snapshot(run)
    line = refused("train", "--resume", run, "--dataset_dir", other, "--max_epoch", 2)
    assert expected in line and "expected" in line and "found" in line
    assert snapshot(run) == before


def test_evaluating_on_other_classes_is_refused(
    refused: Callable[..., str], trained: Path, trained_on_folder: Path, folder_data: Path
) -> None:
    line = refused(
        "eval", trained_on_folder, "--dataset_dir", write_classes(Path("other"), (*CLASSES, "cat"))
    )
    assert "2 classes of the training (ant, bee), found also cat" in line
    line = refused("eval", trained_on_folder, "--dataset", "digits")
    assert "2 classes of the training (ant, bee), found also 0, 1, 2, 3, 4" in line
    line = refused(
        "eval", trained, "--dataset_dir", folder_data
    )  # not: the digits' error as if it were this folder's
    assert "10 classes of the training (0, 1, 2, 3, 4, …), found also ant, bee" in line


# --- checkpoints ----------------------------------------------------------------------------------


def flipped(run: Path, name: str) -> None:
    path = run / "checkpoints" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncated(run: Path, name: str) -> None:
    path = run / "checkpoints" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def missing(run: Path, name: str) -> None:
    (run / "checkpoints" / f"{name}.safetensors").unlink()


def no_manifest(run: Path, name: str) -> None:
    (run / "checkpoints" / f"{name}.json").write_text("{")


def empty_manifest(run: Path, name: str) -> None:
    (run / "checkpoints" / f"{name}.json").write_text("")


def odd_manifest(run: Path, name: str) -> None:
    (run / "checkpoints" / f"{name}.json").write_text("[]")


def changed_manifest(run: Path, name: str) -> None:
    path = run / "checkpoints" / f"{name}.json"
    value = json.loads(path.read_text())
    value["about"]["classes"].reverse()
    path.write_text(json.dumps(value))


DAMAGES = [flipped, truncated, missing, no_manifest, empty_manifest, odd_manifest, changed_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluating_a_damaged_last_checkpoint_falls_back_with_a_warning(
    call: Call, copied: Path, damage: Callable[[Path, str], None]
) -> None:
    damage(copied, LAST)
    outcome = call("eval", copied, "--checkpoint", "last")
    assert outcome.code == 0
    assert LAST in outcome.error and "damaged" in outcome.error


@pytest.mark.parametrize("damage", [flipped, no_manifest])
def test_resuming_from_a_damaged_last_checkpoint_falls_back_with_a_warning(
    call: Call, copied: Path, trained: Path, damage: Callable[[Path, str], None]
) -> None:
    damage(copied, LAST)
    outcome = call("train", "--resume", copied)
    assert outcome.code == 0
    said = outcome.out + outcome.err
    assert LAST in said and "damaged" in said and "resumed at step 23" in said
    assert LAST in (copied / "train.log").read_text()
    name = f"checkpoints/{LAST}.safetensors"
    ours, theirs = load_file(copied / name), load_file(trained / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_intact_checkpoint_is_one_clear_line_and_nothing_changes(
    refused: Callable[..., str], copied: Path, damage: Callable[[Path, str], None]
) -> None:
    for name in (LAST, BEFORE):
        damage(copied, name)
    before = snapshot(copied)
    line = refused("train", "--resume", copied, "--max_epoch", 3)
    assert (
        str(copied) in line
        and "expected an intact 'last' checkpoint" in line
        and "2 damaged" in line
    )
    assert snapshot(copied) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["eval", "predict", "export"])
def test_tampered_weights_are_refused(
    refused: Callable[..., str], copied: Path, damage: Callable[[Path, str], None], command: str
) -> None:
    damage(copied, BEST)
    before = snapshot(copied)
    line = refused(command, copied, *(["x.png"] if command == "predict" else []))
    assert str(copied) in line and "damaged" in line
    assert snapshot(copied) == before


def test_weights_of_another_network_are_refused(refused: Callable[..., str], copied: Path) -> None:
    run = Run(copied)
    checkpoint, _ = newest(run.checkpoints, "best")
    checkpoint.manifest.about.architecture["growth_rate"] = [7]
    checkpoints.save(run.checkpoints, checkpoint.manifest, checkpoint.tensors)
    line = refused("eval", copied)
    assert str(copied) in line and "expected the tensors of its network" in line


def test_damaged_metrics_are_named(refused: Callable[..., str], copied: Path) -> None:
    (copied / "metrics.csv").write_text("epoch,step\none,two\n")
    assert "metrics.csv" in refused("report", copied)


def shorten(metrics: Path) -> None:
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")


def exchange(metrics: Path) -> None:
    header, *rows = metrics.read_text().splitlines()
    metrics.write_text("\n".join([header, *reversed(rows)]) + "\n")


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, shorten, exchange, lambda metrics: metrics.write_text("epoch,step\none,two\n")],
    ids=["gone", "shorter", "exchanged", "damaged"],
)
def test_metrics_are_written_anew_from_the_checkpoint(
    damage: Callable[[Path], object], call: Call, copied: Path
) -> None:
    before = (copied / "metrics.csv").read_text()
    damage(copied / "metrics.csv")
    outcome = call("train", "--resume", copied, "--max_epoch", 3)
    assert outcome.code == 0 and "metrics.csv is written anew from the checkpoint" in outcome.out
    assert (copied / "metrics.csv").read_text().startswith(before)


def test_a_run_that_lost_its_last_checkpoint_does_not_start_over(
    refused: Callable[..., str], copied: Path
) -> None:
    for file in (copied / "checkpoints").glob("last-*"):
        file.unlink()
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    expected = ["result.json", "2 epochs in metrics.csv", "a 'best' checkpoint of epoch 2"]
    for name in ("result.json", "metrics.csv", "checkpoints/best-*.json"):
        line = refused("train", "--resume", copied, "--max_epoch", 3)
        assert f"found none, but {' and '.join(expected)}; put it back" in line
        now = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
        assert now == {path: content for path, content in before.items() if path.exists()}
        next(copied.glob(name)).unlink()
        expected.pop(0)


@pytest.mark.parametrize(
    ("component", "name", "value"),
    [
        ("optim", "lr", 0.3),
        ("optim", "momentum", 0.8),
        ("train", "seed", 5),
        ("train", "batch_size", 65),
        ("network", "growth_rate", [8]),
        ("network", "fetch", "dense"),
        ("network", "depth", 10),
        ("data", "mirror", True),
        ("data", "val_fraction", 0.25),
    ],
)
def test_settings_that_were_changed_in_the_file_are_refused(
    component: str, name: str, value: object, refused: Callable[..., str], copied: Path
) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    config[component][name] = value
    file.write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in (copied / "checkpoints").iterdir()}
    line = refused("train", "--resume", copied, "--max_epoch", 3)
    assert name in line or "images it was trained on" in line
    assert before == {path: path.read_bytes() for path in (copied / "checkpoints").iterdir()}


# --- runs that fail -------------------------------------------------------------------------------


def test_a_non_finite_loss_names_its_step(call: Call) -> None:
    outcome = call("train", *TINY, "--max_epoch", 2, "--lr", "1e30", "--out", "run")
    assert outcome.code == 1
    assert "step 2 " in outcome.error and "not finite" in outcome.error
    assert not list(Path("run/checkpoints").glob("best-*"))
    assert call("eval", "run").code == 2


def test_a_loss_that_is_lost_later_keeps_what_was_before(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = optim.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(
            optim,
            "learning_rate",
            lambda config, step, *rest: 1e30 if step >= 30 else rate(config, step, *rest),
        )
        outcome = call("train", *TINY, "--max_epoch", 2, "--out", "run")
    assert outcome.code == 1
    assert "step 32 " in outcome.error and "not finite" in outcome.error
    assert load_trained(Path("run"), "best").step == 23
    assert call("eval", "run").code == 0
    assert call("train", "--resume", "run").code == 0
    name = f"checkpoints/{LAST}.safetensors"
    ours, theirs = load_file(Path("run") / name), load_file(trained / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_that_a_step_of_finite_loss_has_lost_are_not_saved(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = optim.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(
            optim,
            "learning_rate",
            lambda config, step, *rest: math.inf if step >= 30 else rate(config, step, *rest),
        )
        outcome = call("train", *TINY, "--max_epoch", 2, "--save_every", 0, "--out", "run")
    assert outcome.code == 1
    assert "weights of step 31 are not finite" in outcome.error and "--lr" in outcome.error
    assert load_trained(Path("run"), "last").step == 30
    assert call("train", "--resume", "run").code == 0
    name = f"checkpoints/{LAST}.safetensors"
    ours, theirs = load_file(Path("run") / name), load_file(trained / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_that_are_lost_in_the_last_step_of_an_epoch_are_not_the_best(call: Call) -> None:
    flags = ("--max_epoch", 1, "--batch_size", 1438, "--lr", "1e30", "--schedule", "step")
    outcome = call("train", *TINY, *flags, "--out", "run")
    assert outcome.code == 1
    assert "step 1 " in outcome.error and "finite" in outcome.error
    assert not list(Path("run/checkpoints").glob("best-*"))


def test_a_full_disk_fails_the_run_and_loses_nothing(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_atomic

    def full(path: Path, content: str | bytes) -> None:
        if path.name.startswith(LAST):
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        outcome = call("train", *TINY, "--max_epoch", 2, "--out", "run")
    assert outcome.code == 1
    assert outcome.error.endswith(
        "No space left on device; go on with: sparsenet train --resume run"
    )
    assert call("train", "--resume", "run").code == 0
    name = f"checkpoints/{LAST}.safetensors"
    ours, theirs = load_file(Path("run") / name), load_file(trained / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [row.test_error for row in Run(Path("run")).metrics()] == [
        row.test_error for row in Run(trained).metrics()
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
    ],
)
def test_what_cannot_be_written_names_its_path(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, told: str
) -> None:
    def failing(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("sparsenet.export.onnx.write_atomic", failing)
    outcome = call("export", trained, "--out", "x.onnx")
    assert outcome.code == 1
    assert outcome.error == f"sparsenet: --out: expected to write x.onnx, found: {told}"
    monkeypatch.setattr("sparsenet.weights.read_json", failing)
    outcome = call("models")
    assert (outcome.code, outcome.error) == (1, f"sparsenet: {told}")


def test_a_run_that_ends_before_an_epoch_is_evaluated_loses_no_epoch(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("sparsenet.train.evaluate", failing)
        assert call("train", *TINY, "--max_epoch", 2, "--save_every", 0, "--out", "run").code == 1
    assert call("train", "--resume", "run").code == 0
    times = ("seconds", "images_per_second", "eval_seconds", "peak_memory_mb")
    ours, theirs = (
        [dataclasses.replace(row, **dict.fromkeys(times)) for row in Run(run).metrics()]
        for run in (Path("run"), trained)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"train.ids": torch.zeros(3)}, "instead of int64 (3,)"),
        ({"train.ids": torch.tensor(3)}, "instead of int64 (1,)"),
        ({"train.labels": torch.tensor(3)}, "train.labels of int64 () instead of"),
        ({"train.labels": torch.zeros(3, 1).long()}, "train.labels of int64 (3, 1) instead of"),
        ({"test.ids": torch.zeros(2).long()}, "instead of int64 (2,)"),
        ({"train.ids": None}, "instead of ids and labels of train, val and test"),
        ({"other.ids": torch.zeros(2).long(), "other.labels": torch.zeros(2).long()}, "other.ids"),
        ({"train.ids": None, "train.labels": None}, "test.ids, test.labels instead of"),
    ],
)
@pytest.mark.parametrize("verb", [("train", "--resume"), ("eval",)])
def test_a_record_of_other_images_than_a_run_keeps_is_one_line(
    refused: Callable[..., str],
    copied: Path,
    verb: tuple[str, ...],
    wrong: dict[str, torch.Tensor | None],
    found: str,
) -> None:
    file = copied / "images.safetensors"
    tensors = {**load_file(file), **wrong}
    save_file({name: each for name, each in tensors.items() if each is not None}, file)
    flags = ("--max_epoch", 3) if "--resume" in verb else ()
    line = refused(*verb, copied, *flags)
    assert f"{file}: expected a readable file, found: " in line and found in line


# --- links and pipes ------------------------------------------------------------------------------


def linked(run: Path, name: str, target: Path) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)


@pytest.mark.parametrize("name", ["train.log", "checkpoints", ".lock", "config.json"])
def test_a_run_writes_through_no_link(
    refused: Callable[..., str], copied: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if name == "checkpoints":
        shutil.copytree(copied / name, elsewhere)
    else:
        elsewhere.write_bytes((copied / name).read_bytes() if name != ".lock" else b"mine")
    linked(copied, name, elsewhere)
    before = snapshot(tmp_path)
    line = refused("train", "--resume", copied, "--max_epoch", 3)
    assert f"{copied / name}: " in line and "found a link" in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["train.log", "checkpoints", ".lock"])
def test_a_new_run_writes_through_no_link(
    refused: Callable[..., str], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(tmp_path / "elsewhere")
    assert "found a link" in refused("train", *SHORT, "--out", out)
    assert not (tmp_path / "elsewhere").exists()
    assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    [*("curves.png", "graph.svg", "filters.png", "config.json", "environment.json"),
     *("result.json", "metrics.csv", "graph.json")],
)  # fmt: skip
def test_a_report_shows_nothing_that_a_link_leads_to(
    refused: Callable[..., str], copied: Path, tmp_path: Path, name: str
) -> None:
    private = tmp_path / "private"
    private.write_text("{}")
    linked(copied, name, private)
    assert f"{copied / name}: " in refused("report", copied)
    assert not (copied / "report.html").exists()


def test_the_run_folder_may_be_a_link_and_hold_links_of_the_user(
    call: Call, copied: Path, tmp_path: Path
) -> None:
    (copied / "notes").symlink_to(tmp_path / "my-notes")
    (tmp_path / "run").symlink_to(copied)
    assert call("train", "--resume", "run", "--max_epoch", 3).code == 0
    assert call("eval", "run").code == 0
    assert call("report", "run").code == 0


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_checkpoint_that_is_a_link_is_damaged_and_stays_what_it_leads_to(
    call: Call, copied: Path, tmp_path: Path, kind: str
) -> None:
    name, elsewhere = f"checkpoints/{LAST}.{kind}", tmp_path / "elsewhere"
    content = (copied / name).read_bytes()
    elsewhere.write_bytes(content)
    linked(copied, name, elsewhere)
    outcome = call("eval", copied, "--checkpoint", "last")
    assert outcome.code == 0 and f"{LAST}: damaged" in outcome.error
    assert "found a link" in outcome.error
    outcome = call("train", "--resume", copied)
    assert outcome.code == 0 and "resumed at step 23" in outcome.out
    assert elsewhere.read_bytes() == content and not (copied / name).is_symlink()


def piped(*parts: object) -> Path:
    path = Path(*map(str, parts))
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.fixture
def in_time() -> Iterator[None]:
    """The test ends, however long somebody waits for a pipe."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("still waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


RUN_FILES = ("config.json", "metrics.csv", "environment.json", "images.safetensors", "train.log")


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", [*RUN_FILES, ".lock", "checkpoints"])
def test_resuming_waits_for_no_pipe(refused: Callable[..., str], copied: Path, name: str) -> None:
    if name == "checkpoints":
        shutil.rmtree(copied / name)
    piped(copied, name)
    line = refused("train", "--resume", copied, "--max_epoch", 3)
    assert f"{copied / name}: " in line and "found a pipe" in line


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_checkpoint_that_is_a_pipe_is_damaged(call: Call, copied: Path, kind: str) -> None:
    piped(copied, "checkpoints", f"{LAST}.{kind}")
    outcome = call("train", "--resume", copied)
    assert outcome.code == 0 and "resumed at step 23" in outcome.out
    assert f"warning: {LAST}: damaged" in outcome.out


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "curves.png", "result.json"])
def test_a_report_waits_for_no_pipe(refused: Callable[..., str], copied: Path, name: str) -> None:
    piped(copied, name)
    assert f"{copied / name}: " in refused("report", copied)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    "name",
    [
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-py",
        "a.parquet",
        "a.tar",
    ],
)
def test_data_are_read_from_no_pipe(refused: Callable[..., str], name: str) -> None:
    Path("data").mkdir()
    pipe = piped("data", name)
    for place in ("data", pipe):
        line = refused("train", "--dataset_dir", place)
        assert "data" in line and "expected" in line and "Traceback" not in line


@pytest.mark.usefixtures("in_time")
def test_tables_settings_and_functions_are_read_from_no_pipe(
    refused: Callable[..., str], folder_data: Path
) -> None:
    pipe = piped("pipe.py")
    assert "found none at" in refused("train", "--dataset_dir", folder_data, "--labels", pipe)
    assert "found: a pipe or device" in refused("train", "--config", pipe)
    assert "which is no file" in refused("train", "--fetch", f"{pipe}:sources")
