"""The run folder: written whole or not at all, refused when damaged."""

import dataclasses
import itertools
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ABOUT, newest

from sparsenet import checkpoints, display
from sparsenet.checkpoints import Manifest, RunError, save
from sparsenet.config import RunConfig, replace
from sparsenet.environment import environment, installed
from sparsenet.events import Concluded
from sparsenet.files import read_json, size_text, write_atomic, write_json
from sparsenet.graph import graph
from sparsenet.presets import preset
from sparsenet.results import EpochMetrics, TrainingResult
from sparsenet.run import Run
from sparsenet.train import train


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "f"
    write_atomic(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomic(file, "new")
    assert [f.name for f in tmp_path.iterdir()] == ["f"]
    assert file.read_text() == "old"


def saved(tmp_path, steps=(1, 2, 3)):
    run = Run.create(tmp_path / "run")
    for step in steps:
        manifest = Manifest(kind="last", step=step, epoch=step, about=ABOUT)
        save(run.checkpoints, manifest, {"x": torch.full((3,), float(step))})
    return run


def test_the_newest_checkpoint_comes_back_and_two_are_kept(tmp_path):
    run = saved(tmp_path)
    checkpoint, warnings = newest(run.checkpoints, "last")
    assert (checkpoint.manifest.step, warnings) == (3, [])
    assert torch.equal(checkpoint.tensors["x"], torch.full((3,), 3.0))
    assert {file.name for file in run.checkpoints.iterdir()} == checkpoint_files(2, 3)


def test_a_hundred_million_steps_are_more_than_one_less(tmp_path):
    run = saved(tmp_path, steps=(10**8 - 2, 10**8 - 1, 10**8, 10**8 + 1))
    assert newest(run.checkpoints, "last")[0].manifest.step == 10**8 + 1
    assert {file.name for file in run.checkpoints.iterdir()} == checkpoint_files(10**8, 10**8 + 1)


def test_only_files_that_the_program_wrote_are_removed(tmp_path):
    run = saved(tmp_path, steps=(1, 2))
    mine = [
        "my-last-1.safetensors",
        "last-1.json",
        "last-mine.json",
        ".last-notes",
        "x.last-00000001.json",
    ]
    for name in mine:
        (run.checkpoints / name).write_text("mine")
    half = run.checkpoints / ".last-00000001.safetensors.k3_x9abc"  # as a kill leaves it
    half.write_text("half")
    later = Manifest(kind="last", step=3, epoch=3, about=ABOUT)
    save(run.checkpoints, later, {"x": torch.zeros(3)})
    assert newest(run.checkpoints, "last")[1] == []
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == checkpoint_files(2, 3) | set(mine)


def test_a_manifest_has_the_keys_that_it_always_had(tmp_path):
    run = Run.create(tmp_path / "run")
    keys = {"epoch", "about", "kind", "step", "sha256"}
    for kind, more in (("best", set()), ("last", {"seconds", "best", "rows"})):
        save(
            run.checkpoints,
            Manifest(kind=kind, step=3, epoch=1, about=ABOUT),
            {"x": torch.zeros(3)},
        )
        assert (
            json.loads((run.checkpoints / f"{kind}-00000003.json").read_text()).keys()
            == keys | more
        )


def checkpoint_files(*steps):
    return {f"last-{step:08d}.{kind}" for step in steps for kind in ("json", "safetensors")}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "empty manifest"])
def test_damage_falls_back_to_the_one_before_with_a_warning(tmp_path, damage):
    run = saved(tmp_path)
    weights, manifest = (
        run.checkpoints / f"last-00000003.{kind}" for kind in ("safetensors", "json")
    )
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    {
        "flip": lambda: weights.write_bytes(data),
        "truncate": lambda: weights.write_bytes(data[:20]),
        "remove": weights.unlink,
        "manifest": lambda: manifest.write_text("{"),
        "empty manifest": lambda: manifest.write_text("{}"),
    }[damage]()
    checkpoint, warnings = newest(run.checkpoints, "last")
    assert checkpoint.manifest.step == 2
    assert len(warnings) == 1
    assert "last-00000003: damaged" in warnings[0]


def test_nothing_intact_is_one_clear_line(tmp_path):
    run = saved(tmp_path, steps=(1,))
    with pytest.raises(RunError, match="expected an intact 'best' checkpoint, found none"):
        newest(run.checkpoints, "best")
    next(run.checkpoints.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(RunError, match="found 1 damaged"):
        newest(run.checkpoints, "last")


def test_of_checkpoints_that_are_replaced_meanwhile_the_new_one_is_taken(tmp_path, monkeypatch):
    run, read = saved(tmp_path), checkpoints._read

    def replaced_first(path):
        if path.stem == "last-00000003":
            manifest = Manifest(kind="last", step=5, epoch=5, about=ABOUT)
            for file in run.checkpoints.iterdir():
                file.unlink()
            save(run.checkpoints, manifest, {"x": torch.full((3,), 5.0)})
        return read(path)

    monkeypatch.setattr(checkpoints, "_read", replaced_first)
    checkpoint, warnings = newest(run.checkpoints, "last")
    assert (checkpoint.manifest.step, warnings) == (5, [])


def test_who_gives_up_takes_nothing_from_who_comes_next(tmp_path):
    first = Run.create(tmp_path / "run")
    with first.locked():
        second = Run.create(tmp_path / "run")
    with second.locked():
        assert second.checkpoints.is_dir()
    assert not any(second.path.iterdir())


def test_metrics_come_back_exactly(tmp_path):
    run = Run.create(tmp_path / "run")
    numbers = [0.1 * i + 1 / 3 for i in range(11)]
    rows = [EpochMetrics(1, 7, *numbers), EpochMetrics(2, 14, 1e-300, val_error=0.0)]
    run.write_metrics(rows)
    assert run.metrics() == rows
    lines = (run.path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,step,lr,train_loss,train_error,val_loss,val_error,test_loss")
    assert lines[1:] == [
        ",".join(map(repr, [1, 7, *numbers])),
        "2,14,1e-300,,,,0.0,,,,,,",
    ]


def test_a_folder_is_held_by_one_process_and_freed_by_a_kill(tmp_path):
    run = Run.create(tmp_path / "run")
    holder = "import sys,time; from pathlib import Path; from sparsenet.run import Run\n"
    holder += (
        f"with Run(Path({str(run.path)!r})).locked(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"), run.locked():
            pass
        process.kill()
    with run.locked():
        pass


def test_what_a_run_says_of_itself(tmp_path):
    run = Run.create(tmp_path / "run")
    used, images = (
        environment(torch.device("cpu")),
        {f"train.{each}": torch.arange(3) for each in ("ids", "labels")},
    )
    run.describe(RunConfig(), 32, graph(RunConfig().network), used, images)
    assert torch.equal(run.images()["train.ids"], torch.arange(3))
    recorded = json.loads((run.path / "environment.json").read_text())
    assert recorded["torch"] == torch.__version__
    assert recorded == dataclasses.asdict(environment(torch.device("cpu")))
    assert f"torch=={torch.__version__}" in installed()
    assert json.loads((run.path / "graph.json").read_text())["parameters"] == 189_514
    assert run.config() == RunConfig()


def test_an_existing_run_is_not_overwritten_and_no_run_is_refused(tmp_path):
    run = Run.create(tmp_path / "run")
    write_json(run.path / "config.json", RunConfig().to_dict())
    with pytest.raises(RunError, match="already holds a run"):
        Run.create(run.path)
    with pytest.raises(RunError, match="found nothing"):
        Run.open(tmp_path / "none")
    with pytest.raises(RunError, match="found a folder without one"):
        Run.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected a folder that can be written"):
        Run.create(tmp_path / "file" / "run")


def test_each_of_many_gets_a_folder_of_its_own(tmp_path):
    runs = tmp_path / "runs"
    with ThreadPoolExecutor(8) as executor:
        made = list(executor.map(Run.create_one_of_its_own, [runs / "name"] * 8))
    names = ["name", *(f"name-{number}" for number in range(1, 8))]
    assert sorted(run.path.name for run in made) == names
    for run in made:
        with run.locked():  # ends before it is described
            pass
    assert not any(runs.iterdir())
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"--out: expected a folder that can be written, .*gone"):
        Run.create_one_of_its_own(tmp_path / "gone" / "name")


def test_names_that_are_not_utf_8_are_written_and_come_back(tmp_path):
    name = "caf\udce9"
    write_atomic(tmp_path / "text", f"{name}\n")
    assert (tmp_path / "text").read_text() == "caf\\udce9\n"
    write_json(tmp_path / "json", {"dataset_dir": name, "é": [1.5]})
    assert read_json(tmp_path / "json", dict) == {"dataset_dir": name, "é": [1.5]}
    with pytest.raises(ValueError, match=f"^{tmp_path / 'json'}: "):
        read_json(tmp_path / "json", dict[str, int])


def test_sizes_are_printed_in_units_that_show_them():
    assert size_text(2**30) == "1.0 GiB"
    assert size_text(2**20) == "1.0 MiB"
    assert size_text(2**20 - 1) == "1024.0 KiB"
    assert size_text(3000) == "2.9 KiB"


def test_the_top_5_error_is_told_where_there_are_more_than_five_classes():
    numbers = {"error": 10.0, "top5_error": 1.5, "loss": 1.0, "images": 8, "seconds": 1.0}
    for count, told in ((5, False), (6, True)):
        classes = tuple(map(str, range(count)))
        result = TrainingResult(
            "d", **numbers, epochs=1, checkpoint="", classes=classes, class_errors={}
        )
        assert ("top-5 1.50 %" in display._line(Concluded(result))) == told


def test_new_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    for mask in (0o022, 0o077, 0o007):
        before = os.umask(mask)
        try:
            write_atomic(tmp_path / "f", "x")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~mask


def test_without_a_home_there_is_a_cache_for_the_process(tmp_path):
    homeless = (
        "import os, pwd; from pathlib import Path; from sparsenet import files\n"
        "def nobody(number): raise KeyError(number)\n"
        "pwd.getpwuid = nobody\n"
        "assert files.cache_folder() == files.cache_folder()\n"
        "assert files.user_path('~/images') == Path('~/images')\n"
        "assert files.cache_folder().stat().st_mode & 0o077 == 0\n"
        "print(files.cache_folder())"
    )
    unset = ("HOME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", homeless],
        env={**kept, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{tmp_path}/sparsenet-")
    assert not any(tmp_path.iterdir())  # and goes with it


def test_an_old_checkpoint_that_cannot_be_deleted_stays(tmp_path, monkeypatch):
    """But one of a later step, which would be taken for the last, is an error."""
    run = Run.create(tmp_path / "run")

    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    def save_step(step):
        manifest = Manifest(kind="last", step=step, epoch=1, about=ABOUT)
        save(run.checkpoints, manifest, {"x": torch.full((3,), float(step))})

    for step in (1, 2):
        save_step(step)
    monkeypatch.setattr(Path, "unlink", refuse)
    save_step(3)
    save_step(4)
    checkpoint, warnings = newest(run.checkpoints, "last")
    assert checkpoint.manifest.step == 4 and not warnings
    assert len(list(run.checkpoints.glob("last-*.json"))) == 4
    with pytest.raises(PermissionError):
        save_step(3)


@pytest.mark.parametrize("steps", [0.0, -1.0], ids=["stands still", "goes back"])
def test_a_wrong_clock_ends_no_run(steps, tmp_path, monkeypatch):
    ticks = itertools.count(1.0, steps)
    for clock in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(f"time.{clock}", lambda: next(ticks))
    config = replace(preset("digits"), {"network": {"depth": 7, "growth_rate": 4}})
    config = replace(config, {"train": {"max_epoch": 1, "batch_size": 512, "time_limit": 60.0}})
    run = Run.create(tmp_path / "run")
    *_, last = train(config, run)
    assert isinstance(last, Concluded)
    assert run.metrics()[0].seconds <= 0 < run.metrics()[0].images_per_second
    assert newest(run.checkpoints, "last")[0].manifest.epoch == 1
