"""The program as its users see it: commands, exit codes, output, run folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, Call, Found, snapshot, write_cifar10, write_classes, write_image
from rich.progress import Progress
from safetensors.torch import load_file

from sparsenet import checkpoints, cli, commands, flags, pictures, zoo
from sparsenet.commands.common import print_result
from sparsenet.composition import compose
from sparsenet.config import RunConfig, replace, settings
from sparsenet.display import display
from sparsenet.events import Event
from sparsenet.export import RUNTIMES
from sparsenet.presets import describe_recipe, preset
from sparsenet.run import Run
from sparsenet.schedule import learning_rate
from sparsenet.train import train
from sparsenet.trained import load_trained

PROGRAM = [sys.executable, "-m", "sparsenet.cli"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # several, on as many workers' cores, wait for each other
FILES = (
    *("config.json", "requirements.txt", "environment.json", "graph.json", "graph.svg"),
    *("metrics.csv", "train.log", "curves.png", "confusion.png", "samples.png"),
)


@pytest.fixture
def configured(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """The settings that a command line stands for, without the training."""

    def parse(*arguments: object) -> RunConfig:
        found: list[RunConfig] = []

        def note(config: RunConfig, *rest: object) -> Iterator[Any]:
            found.append(config)
            return iter(())

        monkeypatch.setattr("sparsenet.commands.train.train", note)
        outcome = call("train", "--out", f"out-{len(list(Path().iterdir()))}", *arguments)
        assert outcome.code == 0, outcome.err
        return found[0]

    return parse


def json_of(text: str) -> Any:
    """*text* as one JSON value; NaN and infinity are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- flags ----------------------------------------------------------------------------------------


def test_dash_and_underscore_are_the_same_in_a_flag(configured: Callable[..., RunConfig]) -> None:
    underscored = configured("--growth_rate", "4", "--max_epoch=3", "--skip_corrupt")
    dashed = configured("--growth-rate", "4", "--max-epoch=3", "--skip-corrupt")
    assert underscored == dashed
    assert underscored.data.skip_corrupt and underscored.train.max_epoch == 3


def test_a_value_keeps_its_dashes(call: Call, trained: Path) -> None:
    write_image(Path("my-photo.png"))
    write_image(Path("--my-photo.png"))
    for arguments in (("my-photo.png",), ("--", "--my-photo.png")):
        outcome = call("predict", trained, "--json", *arguments)
        assert outcome.code == 0, outcome.out
        assert json_of(outcome.out)[0]["path"] == arguments[-1]


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("trian",), "train"),
        (("train", "--dept", "7"), "--depth"),
        (("train", "--growth-rte=4"), "--growth_rate"),
        (("eval", "RUN", "--batchsize", "2"), "--batch_size"),
        (("train", "--dataset", "c1O"), "c10"),
        (("train", "--schedule", "cosin"), "cosine"),
        (("train", "--precision", "fp23"), "fp32"),
        (("train", "--preset", "papre"), "paper"),
        (("train", "--fetch", "harmnic"), "harmonic"),
        (("eval", "RUN", "--checkpoint", "lst"), "last"),
        (("export", "RUN", "--format", "onxx"), "onnx"),
        (("eval", "RUN", "--engine", "openvin"), "openvino"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_one(
    call: Call, arguments: tuple[str, ...], nearest: str
) -> None:
    outcome = call(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(rf"did you mean '?{re.escape(nearest)}'?\?", outcome.error), outcome.error
    assert (
        next(a for a in arguments if a not in ("train", "eval", "export", "RUN")).split("=")[0][2:5]
        in outcome.error
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("train", "photos"), "did you mean --dataset_dir photos?"),
        (("eval", "RUN", "photos"), "did you mean --dataset_dir photos?"),
        (("models", "a", "b"), "see sparsenet models --help"),
        (("train", "--epochs", "3"), "did you mean --max_epoch?"),
        (("train", "epochs=3"), "did you mean --max_epoch?"),
        (("train", "--data=x"), "did you mean --dataset_dir?"),
        (("train", "--lr-scheduler", "cosine"), "did you mean --schedule?"),
        (("train", "--batch", "3"), "did you mean --batch_size?"),
        (("train", "--arch", "resnet18"), "did you mean --model?"),
        (("train", "--pretrained"), "did you mean --weights?"),
        (("train", "--workers", "4"), "no flag, images are decoded once"),
        (("train", "--dataset", "c10"), "--dataset_dir DIR --download gets it"),
    ],
)
def test_the_words_of_other_programs_lead_to_ours(
    call: Call, arguments: tuple[str, ...], hint: str
) -> None:
    outcome = call(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert hint in outcome.error


def test_what_takes_the_place_of_an_unknown_flag_is_one_that_train_has() -> None:
    train = flags.parser()._subparsers._group_actions[0].choices["train"]  # type: ignore[union-attr,index]
    for unknown, instead in flags.INSTEAD.items():
        assert f"--{unknown}" not in train._option_string_actions
        named = re.findall(r"--\w+", instead)
        assert set(named) <= train._option_string_actions.keys()


def test_an_unknown_network_is_told_with_the_nearest_ones(call: Call) -> None:
    with pytest.raises(ValueError, match=r"sparsenet_40_12.* found 'sparsenet_40_21'"):
        zoo.architecture("sparsenet_40_21")
    outcome = call("models", "resnet*")
    assert outcome.code == 2
    assert "'resnet*'" in outcome.error


@pytest.mark.parametrize(
    ("arguments", "expected", "found"),
    [
        (("--depth", "seven"), "a whole number", "'seven'"),
        (("--depth", "7.5"), "a whole number", "'7.5'"),
        (("--lr", "fast"), "a number", "'fast'"),
        (("--lr", "-1"), "positive", "-1"),
        (("--lr", "nan"), "number", "nan"),
        (("--lr", "inf"), "number", "inf"),
        (("--time_limit", "nan"), "expected", "nan"),
        (("--seed", "-1"), "at least 0", "-1"),
        (("--max_epoch", "-1"), "at least 0", "-1"),
        (("--batch_size", "-1"), "at least 0", "-1"),
        (("--growth_rate", "4,x"), "whole numbers", "'4,x'"),
        (("--growth_rate", "4,5"), "1 or 3 numbers", "(4, 5)"),
        (("--growth_rate", "0"), "positive", "0"),
        (("--blocks", "2,0,2"), "at least one layer", "0"),
        (("--mirror", "maybe"), "true or false", "'maybe'"),
        (("--dropout", "1.5"), "below 1", "1.5"),
        (("--momentum", "2"), "between 0 and 1", "2"),
        (("--drop_1", "9", "--drop_2", "3"), "at least", "3"),
        (("--test_fraction", "1"), "between 0 and 1", "1"),
        (("--fetch", "sparse:1"), "at least 2", "1"),
        (("--fetch", "windowed:0"), "at least 1", "0"),
        (("--in_chans", "2"), "1", "2"),
        (("--image_size", "3"), "at least 4", "found 3"),
        (("--download",), "c10", "digits"),
    ],
)
def test_a_value_out_of_range_names_its_flag(
    call: Call, arguments: tuple[str, ...], expected: str, found: str
) -> None:
    outcome = call("train", *TINY, "--max_epoch", 1, "--out", "out", *arguments)
    assert outcome.code == 2
    line = outcome.error
    assert expected in line and found in line
    assert arguments[0].lstrip("-") in line


def test_every_value_of_a_choice_is_taken(configured: Callable[..., RunConfig]) -> None:
    for channels in (0, 1, 3):
        assert configured("--in_chans", channels).data.in_chans == channels
    for schedule in ("step", "cosine", "onecycle"):
        assert configured("--schedule", schedule).optim.schedule == schedule


def test_more_bad_calls_are_one_line(call: Call, trained: Path) -> None:
    for arguments in (
        (),
        ("train", "stray"),
        ("train", "--depth"),
        ("eval",),
        ("predict", trained),
        ("report",),
        ("eval", trained, "--batch_size", "0"),
        ("predict", trained, "x.png", "--top", "none"),
    ):
        outcome = call(*arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert outcome.error


@pytest.mark.parametrize(
    "arguments",
    [
        *(("train", flag) for flag in ("--resume", "--out", "--config", "--preset")),
        *(("train", flag) for flag in ("--dataset_dir", "--labels")),
        *(("eval", "RUN", "--dataset_dir"), ("export", "RUN", "--out"), ("predict", "RUN")),
        *(("check", "--dataset_dir"), ("report",), ("report", "RUN", "--out"), ("eval",)),
    ],
)
def test_an_empty_value_is_none(call: Call, arguments: tuple[str, ...]) -> None:
    outcome = call(*arguments, "")
    assert (outcome.code, outcome.out) == (2, "")
    assert "expected a value, found an empty one" in outcome.error
    assert arguments[-1].strip("-") in outcome.error or not arguments[-1].startswith("-")
    assert not any(Path().iterdir())


@pytest.mark.parametrize("command", ["", *commands.MODULES])
def test_help_renders_and_names_what_there_is(call: Call, command: str) -> None:
    outcome = call(*([command] if command else []), "--help", "all")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: sparsenet {command}".rstrip())
    if not command:
        assert set(commands.MODULES) <= set(outcome.out.split())
    if command == "train":
        text = " ".join(outcome.out.split())
        for setting in settings():
            assert f"--{setting.name}" in text
            assert setting.help.replace("%%", "%") in text


@pytest.mark.parametrize("command", commands.MODULES)
def test_help_begins_with_what_is_used_most(call: Call, command: str) -> None:
    outcome = call(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: sparsenet {command}")
    assert len(re.findall("^  -", outcome.out, re.M)) <= 12
    _, examples = outcome.out.split("\nexamples:\n")
    shown = [line.strip() for line in examples.splitlines() if line.startswith("  ")]
    assert len(shown) == 2
    for example in shown:  # whose flags and values are right
        assert flags.parser().parse(shlex.split(example)[1:]).command == command
    if "every flag: " in outcome.out:
        whole = call(command, "--help", "all").out
        assert set(re.findall(r"--\w+", outcome.out)) < set(re.findall(r"--\w+", whole))


# --- settings -------------------------------------------------------------------------------------


def test_the_paper_command_is_the_paper_recipe(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    write_cifar10(tmp_path / "data")
    config = configured(
        *(
            "--dataset",
            "c10",
            "--dataset_dir",
            tmp_path / "data",
            "--fetch",
            "sparse",
            "--depth",
            "100",
        ),
        *(
            "--growth_rate",
            "24",
            "--batch_size",
            "64",
            "--drop_1",
            "150",
            "--drop_2",
            "225",
            "--max_epoch",
            "300",
        ),
    )
    assert dataclasses.replace(config.network, in_chans=3, num_classes=10) == zoo.architecture(
        "sparsenet_100_24"
    )
    assert dataclasses.asdict(config.optim) == {
        "lr": 0.1, "schedule": "step", "drop_1": 150, "drop_2": 225, "warmup": 0.0, "momentum": 0.9,
        "weight_decay": 1e-4, "label_smoothing": 0.0, "class_weights": "none", "ema": 0.0,
        "grad_clip": 0.0, "backbone_lr": 0.0, "freeze": "", "optimizer": "sgd",
    }  # fmt: skip
    rates = [
        learning_rate(config.optim, epoch * 10, 10, config.train.max_epoch)
        for epoch in (0, 149, 150, 225, 299)
    ]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    assert (config.train.batch_size, config.train.max_epoch) == (64, 300)
    assert (
        config.data.dataset,
        config.data.mirror,
        config.data.shift,
        config.data.val_fraction,
    ) == ("c10", True, 4, 0)
    short = (
        "--dataset",
        "c10",
        "--dataset_dir",
        tmp_path / "data",
        "--depth",
        "100",
        "--growth_rate",
        "24",
    )
    assert configured(*short) == config


def test_no_flag_at_all_means_the_digits(configured: Callable[..., RunConfig]) -> None:
    config = configured()
    assert config.data.dataset == "digits"
    assert not config.data.mirror


def test_flags_win_over_a_file_and_a_file_over_a_preset(
    configured: Callable[..., RunConfig],
) -> None:
    Path("mine.json").write_text('{"optim": {"lr": 0.3, "momentum": 0.5}}')
    config = configured("--preset", "digits", "--config", "mine.json", "--lr", "0.4")
    assert (config.optim.lr, config.optim.momentum, config.data.dataset) == (0.4, 0.5, "digits")


@pytest.mark.parametrize(
    ("section", "name", "value", "needed", "changes"),
    [
        ("optim", "drop_1", 5, "--schedule step", {"schedule": "step"}),
        ("optim", "drop_2", 300, "--schedule step", {"schedule": "step"}),
        ("network", "bottleneck_factor", 2, "--bottleneck", {"bottleneck": True}),
        ("network", "reduction", 0.5, "--aggregation concat", {"aggregation": "concat"}),
    ],
)
def test_a_setting_that_changes_nothing_is_refused_where_somebody_asks_for_it(
    call: Call,
    configured: Callable[..., RunConfig],
    copied: Path,
    section: str,
    name: str,
    value: float,
    needed: str,
    changes: dict[str, Any],
) -> None:
    network = {"depth": 10, "aggregation": "sum" if name == "reduction" else "concat"}
    run = replace(Run(copied).config(), {"network": network})
    carried = replace(run, {section: {name: value}})
    Path("run.json").write_text(json.dumps(carried.to_dict()))
    Path("section.json").write_text(json.dumps({section: run.to_dict()[section]}))
    Path("mine.json").write_text(json.dumps({section: {name: value}}))
    flags = [f"--{each}={setting}" for each, setting in network.items()]
    asked = (f"--{name}={value}", *flags), ("--config", "mine.json", *flags)
    for each in asked:
        assert f"--{name}: expected {needed}" in call("train", *each, "--out", "none").error
        also = [f"--{other}={setting}" for other, setting in changes.items()]
        assert getattr(getattr(configured(*each, *also), section), name) == value
    assert configured("--config", "run.json") == carried
    assert getattr(configured("--config", "section.json", *flags), section) == getattr(run, section)
    with pytest.raises(ValueError, match=f"--{name}: expected {needed}"):
        compose({name: value}, carried)
    assert compose({}, carried) == carried


@pytest.mark.parametrize(
    "named",
    [
        {"data": {"dataset": "digits"}},
        {"data": {"dataset": "c10", "dataset_dir": "cifar"}},
        {"data": {"dataset_dir": "photos"}},
        {"data": {"dataset_dir": "photos", "labels": "labels.csv"}},
        {"data": {"dataset_dir": "photos"}, "train": {"weights": "sparsenet_40_12"}},
    ],
)
def test_a_file_goes_on_top_of_the_preset_that_flags_go_on_top_of(
    configured: Callable[..., RunConfig], named: dict[str, dict[str, Any]]
) -> None:
    flags = [f"--{name}={value}" for each in named.values() for name, value in each.items()]
    Path("seed.json").write_text('{"train": {"seed": 1}}')
    Path("all.json").write_text(json.dumps({**named, "optim": {"momentum": 0.5}}))
    expected = configured(*flags, "--seed", "1")
    assert configured("--config", "seed.json", *flags) == expected
    expected = configured(*flags, "--momentum", "0.5")
    assert configured("--config", "all.json") == expected


def test_the_settings_of_a_run_on_other_data_do_not_name_its_data(
    configured: Callable[..., RunConfig],
) -> None:
    Path("mine.json").write_text('{"data": {"dataset": "digits", "dataset_name": "Digits!"}}')
    same = configured("--config", "mine.json", "--seed", "1").data
    assert (same.dataset, same.dataset_name) == ("digits", "Digits!")
    other = configured("--config", "mine.json", "--dataset_dir", "photos").data
    assert (other.dataset, other.dataset_dir, other.dataset_name) == ("auto", "photos", "")
    named = configured("--config", "mine.json", "--dataset_dir", "p", "--dataset_name", "P").data
    assert named.dataset_name == "P"
    Path("table.json").write_text('{"data": {"dataset_dir": "p", "labels": "l.csv"}}')
    assert configured("--config", "table.json", "--dataset_dir", "q").data.labels == ""


def test_a_tilde_is_the_home_whether_or_not_a_shell_wrote_it_out(
    call: Call, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(copied.parent))
    run, weights = f"~/{copied.name}", "~/w.safetensors"
    assert call("export", run, "--format", "safetensors", f"--out={weights}").code == 0
    assert (copied.parent / "w.safetensors").exists() and not Path("~").exists()
    assert call("report", run, "--out=~/page.html").code == 0
    assert (copied.parent / "page.html").exists()
    for source in (run, Path(run), weights):
        assert load_trained(source).about.classes == load_trained(copied).about.classes


def test_a_function_of_ones_own_is_a_topology(configured: Callable[..., RunConfig]) -> None:
    Path("mine.py").write_text("def chain(i):\n    return [i - 1]\n")
    mine = configured("--depth", "13", "--fetch", "mine.py:chain").network
    assert [stage.topology.sources for stage in mine.stages] == 3 * [((0,), (1,), (2,), (3,))]
    assert mine.stages == configured("--depth", "13", "--fetch", "windowed:1").network.stages


# --- training -------------------------------------------------------------------------------------


def test_a_run_folder_explains_the_run(trained: Path) -> None:
    for name in FILES:
        assert (trained / name).stat().st_size > 0, name
    log = (trained / "train.log").read_text()
    assert "epoch 1/2" in log and "epoch 2/2" in log
    recipe = describe_recipe(Run(trained).config(), 2)
    assert f"recipe: {recipe}\n" in log and recipe.startswith("2 epochs, ") and "onecycle" in recipe
    assert len((trained / "metrics.csv").read_text().splitlines()) == 3
    for name in ("config.json", "environment.json", "graph.json"):
        json_of((trained / name).read_text())
    kept = {path.suffix for path in (trained / "checkpoints").iterdir()}
    assert kept == {".json", ".safetensors"}


def test_the_config_of_a_run_makes_the_same_weights_and_the_folder_is_the_last_line(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    outcome = call("train", "--config", trained / "config.json", "--out", tmp_path / "again")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.lines[-1] == str(tmp_path / "again")
    assert json_of((tmp_path / "again" / "config.json").read_text()) == json_of(
        (trained / "config.json").read_text()
    )
    refused = call("train", "--preset", "short", "--config", trained)
    assert refused.code == 2 and "--preset: expected none with" in refused.err
    ours, theirs = (
        sorted((run / "checkpoints").glob("*.safetensors")) for run in (trained, tmp_path / "again")
    )
    assert [path.name for path in ours] == [path.name for path in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        first, second = load_file(mine), load_file(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), mine.name


def test_without_out_a_run_gets_a_folder_of_its_own(call: Call) -> None:
    outcome = call("train", *TINY, "--max_epoch", 1, "--time_limit", 0.001)
    assert outcome.code == 0
    folder = Path(outcome.lines[-1])
    assert folder.parent == Path("runs") and folder.name.startswith("digits-sparse-7-4-")
    assert (folder / "config.json").is_file()


def test_resuming_can_extend_the_run(call: Call, copied: Path, trained: Path) -> None:
    outcome = call("train", "--resume", copied, "--max_epoch", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.lines[-1] == str(copied)
    assert "resumed at step 46" in outcome.out
    rows, before = Run.open(copied).metrics(), Run.open(trained).metrics()
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert rows[:2] == before
    assert Run.open(copied).config().train.max_epoch == 3


def test_a_time_limit_ends_the_run_cleanly(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "limited"
    outcome = call("train", *TINY, "--max_epoch", 100000, "--time_limit", 0.2, "--out", run)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.lines[-1] == str(run)
    assert f"--resume {run} --time_limit 0" in outcome.out
    assert (run / "result.json").is_file()
    outcome = call("train", "--resume", run, "--time_limit", 0.2)
    assert outcome.code == 0 and "resumed at step" in outcome.out


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    call: Call, copied: Path, trained: Path
) -> None:
    run = Run.open(copied)
    for path in run.checkpoints.iterdir():
        path.unlink()
    run.write_metrics([])
    (run.path / "result.json").unlink()
    outcome = call("train", "--resume", copied)
    assert (outcome.code, outcome.err) == (0, "")
    name = "checkpoints/last-00000046.safetensors"
    ours, theirs = load_file(copied / name), load_file(trained / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- the real program -----------------------------------------------------------------------------


def test_ctrl_c_saves_and_another_process_stays_out(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*PROGRAM, "train", *TINY, "--max_epoch", "100000", "--out", str(run)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("epoch 1/"):
                    break
            refused = call("train", "--resume", run)
            assert (
                refused.code == 2
                and "another process" in refused.error
                and str(run) in refused.error
            )
            refused = call("train", *TINY, "--out", run)
            assert refused.code == 2 and str(run) in refused.error
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "")
    assert out.splitlines()[-1] == str(run)
    resumed = call("train", "--resume", run, "--time_limit", 0.001)
    assert (resumed.code, resumed.err) == (0, "")
    step = re.search(r"resumed at step (\d+)", resumed.out)
    assert step and int(step[1]) >= 23
    assert call("eval", run, "--json").code == 0


def test_sigterm_at_a_terminal_saves_and_exits_143(call: Call, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    run = tmp_path / "run"
    shown, terminal = pty.openpty()
    command = [*PROGRAM, "train", *TINY, "--max_epoch", "100000", "--out", str(run)]
    environment = {**os.environ, **ONE_THREAD, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(
        command, stdout=terminal, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            os.close(terminal)
            seen, asked = b"", False
            while True:
                try:
                    part = os.read(shown, 1 << 16)
                except OSError:  # how Linux says that nobody writes any more
                    break
                if not part:
                    break
                seen += part
                if not asked and b"images/s" in seen:
                    process.send_signal(signal.SIGTERM)
                    asked = True
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(shown)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert (process.returncode, err) == (143, b"")
    assert text.split("\r\n")[-2].strip() == str(run)
    assert "loss" in text and "left" in text  # the bar
    assert "\x1b" not in (run / "train.log").read_text()
    assert call("train", "--resume", run, "--time_limit", 0.001).code == 0


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_terminal_that_goes_saves_and_exits_129(
    call: Call, tmp_path: Path, at_terminal: bool
) -> None:
    pty = pytest.importorskip("pty")
    run = tmp_path / "run"
    command = [*PROGRAM, "train", *TINY, "--max_epoch", "100000", "--out", str(run)]
    shown, terminal = pty.openpty()
    owned = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    owned += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # also where the tests ignore it
    owned += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", owned, *command],
        stdin=terminal,
        stdout=terminal if at_terminal else subprocess.PIPE,
        stderr=terminal if at_terminal else subprocess.PIPE,
        env=os.environ | ONE_THREAD,
        start_new_session=True,
    )
    with process:
        try:
            os.close(terminal)
            seen = b""
            while b"epoch 2/" not in seen:
                source = shown if at_terminal else process.stdout.fileno()  # type: ignore[union-attr]
                seen += os.read(source, 1 << 16)
            os.close(shown)  # which sends SIGHUP
            if not at_terminal:
                process.send_signal(signal.SIGHUP)  # as the shell does once more
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (129, None if at_terminal else b"")
    assert "saved and stopped: SIGHUP" in (run / "train.log").read_text()
    if not at_terminal:
        assert out.splitlines()[-1] == bytes(run)
    assert call("train", "--resume", run, "--time_limit", 0.001).code == 0


def test_nohup_trains_on_without_its_terminal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*PROGRAM, "train", *TINY, "--max_epoch", "4", "--out", str(run)]
    ignored = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]  # as nohup does
    with subprocess.Popen(
        [*ignored, *command], env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(signal.SIGHUP)
    assert process.returncode == 0 and (run / "result.json").is_file()


def test_a_signal_while_the_result_is_written_stops_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = pictures.draw_samples

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*arguments)

    monkeypatch.setattr(pictures, "draw_samples", interrupted)
    outcome = call("train", *TINY, "--max_epoch", 1, "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.lines[-1] == str(tmp_path / "run") and "--resume" not in outcome.out


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """All that happens in a run on the digits."""
    config = replace(
        preset("digits"),
        {"network": {"depth": 7, "growth_rate": 4}, "train": {"max_epoch": 2, "device": "cpu"}},
    )
    return list(train(config, Run.create(tmp_path_factory.mktemp("events") / "run")))


def printed_at_terminal(columns: int, show: Callable[[], object]) -> str:
    """What *show* prints where the standard output is a terminal of so many columns."""
    pty = pytest.importorskip("pty")
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(shown, 1 << 16):
                seen.append(part)

    reader, before = threading.Thread(target=read), os.dup(1)
    reader.start()
    try:
        os.dup2(terminal, 1)
        with os.fdopen(terminal, "w", encoding="utf-8") as stream, redirect_stdout(stream):
            show()
    finally:
        os.dup2(before, 1)
        reader.join()
        os.close(before)
        os.close(shown)
    return b"".join(seen).decode()


@pytest.mark.parametrize("columns", [40, 60, 80, 110])
def test_a_bar_fits_the_terminal_and_says_at_last_what_the_run_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[Event], columns: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    drawn_each_time = partialmethod(Progress.update, refresh=True)
    monkeypatch.setattr(Progress, "update", drawn_each_time)
    run = Run(tmp_path)
    monkeypatch.setattr(run, "_began", True)  # its lines are written, as where it is described
    seen = printed_at_terminal(columns, lambda: display(events, run))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).replace("\r", "\n").split("\n")
    bars = [line for line in lines if re.search(r"(left|took) (-|\d):", line)]
    assert bars and max(map(len, bars)) <= columns
    assert all("…" not in bar for bar in bars)
    assert all(("images/s" in bar) == (columns >= 84) for bar in bars)
    assert "took" in bars[-1] and "left" not in bars[-1]
    assert sum("left" in bar for bar in bars) >= 45
    assert set((tmp_path / "train.log").read_text().splitlines()) <= set(lines)  # whole lines


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8:strict", "ascii"])
def test_a_stream_takes_any_character(call: Call, tmp_path: Path, encoding: str) -> None:
    data = write_classes(tmp_path / "data", ("cat", "小狗"))
    image = write_image(tmp_path / "images" / "a.png")
    shutil.copy(image, os.fsdecode(b"images/caf\xe9.png"))
    shutil.copy(image, "images/two\nlines.png")
    short = (*TINY, "--max_epoch", "1", "--batch_size", "4")
    assert call("train", *short, "--dataset_dir", data, "--out", "run").code == 0
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*PROGRAM, "predict", "run", "images"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    lines = done.stdout.decode(encoding.split(":")[0]).splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert names == ["images/a.png", r"images/caf\udce9.png", r"images/two\nlines.png"]
    dog = "小狗" if encoding.startswith("utf-8") else r"\u5c0f\u72d7"
    assert all(dog in line for line in lines) and done.stderr == b""


def test_names_reach_no_terminal_as_they_are(call: Call, tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07\u202e\x9b"
    shown = r"\x1b]0;owned\x07\u202e\x9b"
    data = write_classes(tmp_path / name, (f"cat{name}", "dog"))
    image = write_image(Path(f"{name}.png"))
    broken = Path(f"broken{name}.png")
    broken.write_text("")
    (data / f"notes{name}.txt").write_text("")
    run = f"run{name}"
    short = (*TINY, "--max_epoch", "1", "--batch_size", "4")
    outcomes = {
        "train": call("train", *short, "--dataset_dir", data, "--out", run),
        "eval": call("eval", run),
        "predict": call("predict", run, image, broken),
        "report": call("report", run),
        "table": call("report", run, "--markdown"),
        "data": call("check", "--dataset_dir", data),
        "export": call("export", run, "--out", f"{name}/x.onnx"),
        "no run": call("eval", f"no{name}"),
        "no flag": call("train", f"--x{name}"),
    }
    for command, outcome in outcomes.items():
        printed = outcome.out + outcome.err
        assert all(each.isprintable() or each == "\n" for each in printed), command
        assert shown in printed.replace(r"\\", "\\"), command
    codes = [outcomes[each].code for each in ("train", "eval", "predict", "report")]
    assert codes == [0, 0, 1, 0]  # a named picture is broken
    assert f"cat{shown}" in outcomes["train"].out and f"cat{shown}" in outcomes["eval"].out
    assert f"broken{shown}.png" in outcomes["predict"].err
    assert all(each.isprintable() for each in (Path(run) / "train.log").read_text().split("\n"))
    said = call("predict", run, image, "--json").out
    assert said.isascii() and "\x1b" not in said and json_of(said)[0]["path"] == str(image)


def test_a_folder_and_data_whose_names_are_not_utf_8(call: Call, tmp_path: Path) -> None:
    data = write_classes(tmp_path / os.fsdecode(b"ni\xf1o"))
    run = tmp_path / os.fsdecode(b"r\xe9")
    short = (*TINY, "--max_epoch", "1", "--batch_size", "4")
    assert call("train", *short, "--dataset_dir", data, "--out", run).code == 0
    assert "\nni\\udcf1o: " in (tmp_path / run / "train.log").read_text()
    assert call("train", "--resume", run, "--max_epoch", 2).code == 0
    assert Run.open(run).config().data.dataset_dir == str(data)
    assert json_of(call("eval", run, "--json").out)["dataset"] == r"ni\udcf1o"
    assert call("export", run, "--format", "safetensors").code == 0
    assert call("report", run).code == 0
    assert r"ni\udcf1o" in (run / "report.html").read_text()


def test_a_closed_output_ends_in_one_line() -> None:
    def ended(redirection: str) -> tuple[int, str]:
        command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM, "models"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stderr

    code, line = ended(">&-")
    assert code == 2 and re.fullmatch(r"sparsenet: expected a standard output, .*\n", line)
    assert ended(">/dev/null 2>&-") == (0, "")
    if Path("/dev/full").exists():
        code, line = ended(">/dev/full")
        assert code == 1 and re.fullmatch(r"sparsenet: .*No space left on device\n", line)


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    with subprocess.Popen(
        [*PROGRAM, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_a_training_whose_reader_goes_away_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    with subprocess.Popen(
        [*PROGRAM, "train", *TINY, "--max_epoch", "9", "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 1
    expected = "the run broke off: nobody reads what it prints; go on with: "
    assert said.startswith(f"sparsenet: {run}: {expected}") and said.count("\n") == 1
    advice = shlex.split(said.rpartition("go on with: ")[2])
    assert advice == ["sparsenet", "train", "--resume", str(run)]
    assert checkpoints.saved(run / "checkpoints", "last")


@pytest.mark.parametrize(
    ("arguments", "code"), [(["models"], 0), (["models", "no-such"], 2), (["predict"], 2)]
)
def test_the_exit_code_is_that_of_the_process(
    arguments: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # main() sets it where it is not set
    monkeypatch.setattr(sys, "argv", ["sparsenet", *arguments])
    monkeypatch.setattr(cli, "gc", Mock())  # whose settings are those of a process that ends
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == code
    assert capfd.readouterr().err.count("\n") == (code != 0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is loaded is not known")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "77"}, 77), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0)],
)
def test_threads_that_wait_give_their_cores_away(given: dict[str, str], spins: int) -> None:
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("PyTorch has another OpenMP than GNU's here")
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= given | {"OMP_DISPLAY_ENV": "VERBOSE"}  # OpenMP says so when it is loaded
    command = [*PROGRAM, "models", "sparsenet_40_12"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


# --- after training -------------------------------------------------------------------------------


def test_eval_json(call: Call, trained: Path) -> None:
    outcome = call("eval", trained, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json_of(outcome.out)
    assert {"error", "top5_error", "loss", "images", "seconds"} <= found.keys()
    assert found["images"] == 359 and 0 <= found["top5_error"] <= found["error"] <= 100
    assert len(found["class_errors"]) == 10
    result = json_of((trained / "result.json").read_text())
    assert found["error"] == result["error"]
    plain = call("eval", trained)
    assert plain.code == 0 and f"{found['error']:.2f} %" in plain.out
    assert (
        json_of(call("eval", trained, "--json", "--checkpoint", "last").out)["error"]
        == found["error"]
    )


@pytest.mark.parametrize("engine", RUNTIMES)
def test_eval_by_another_engine_finds_the_same(call: Call, trained: Path, engine: str) -> None:
    if find_spec(engine) is None:
        pytest.skip(f"no {engine}")
    before = snapshot(trained)
    exact = ("eval", trained, "--json", "--precision", "fp32")
    outcome = call(*exact, "--engine", engine, "--batch_size", 50)
    assert (outcome.code, outcome.err) == (0, "")
    found, ours = json_of(outcome.out), json_of(call(*exact, "--device", "cpu").out)
    assert (found["engine"], found["precision"], ours["engine"]) == (engine, "fp32", "torch")
    for name in ("error", "top5_error", "images", "class_errors"):
        assert found[name] == ours[name], name
    assert found["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert engine in call("eval", trained, "--engine", engine).lines[0]
    assert snapshot(trained) == before  # nothing is left behind


def test_a_run_finds_its_data_from_any_folder(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_classes(tmp_path / "here" / "insects")
    (tmp_path / "there").mkdir()
    found = []
    for folder, command in (
        (
            "here",
            (
                "train",
                *TINY,
                "--max_epoch",
                1,
                "--batch_size",
                4,
                "--dataset_dir",
                "insects",
                "--out",
                "run",
            ),
        ),
        ("here", ("eval", "run", "--json")),
        ("there", ("eval", "../here/run", "--json")),
        ("there", ("train", "--config", "../here/run", "--out", "again")),
        ("here", ("eval", "../there/again", "--json")),
    ):
        monkeypatch.chdir(tmp_path / folder)
        outcome = call(*command)
        assert (outcome.code, outcome.err) == (0, ""), command
        if command[0] == "eval":
            found.append(json_of(outcome.out)["loss"])
    assert found == [found[0]] * 3
    data.rename(tmp_path / "moved")
    outcome = call("eval", "run")
    assert (
        outcome.code == 2
        and "--dataset_dir" in outcome.error
        and f"nothing at {data}" in outcome.error
    )
    assert call("eval", "run", "--dataset_dir", "../moved").code == 0


def test_predict_json_goes_on_after_a_bad_file(call: Call, trained: Path) -> None:
    good, other = (
        write_image(Path("shown/a.png")),
        write_image(Path("shown/b.png"), seed=1, size=30),
    )
    bad = Path("shown/c.png")
    bad.write_bytes(b"no image")
    outcome = call(
        "predict", trained, "shown", "nothing-here.png", "shown/**", "--json", "--top", 3
    )
    assert outcome.err == ""
    found = json_of(outcome.out)
    paths = [
        "shown/a.png",
        "shown/b.png",
        "shown/c.png",
        "nothing-here.png",
    ]
    assert [each["path"] for each in found] == paths
    for each in found:
        if each["path"] in (str(good), str(other)):
            assert each.keys() == {"path", "classes", "probabilities"}
            assert len(each["classes"]) == 3 and set(each["classes"]) <= set("0123456789")
            assert each["probabilities"] == sorted(each["probabilities"], reverse=True)
        else:
            assert each.keys() == {"path", "error"} and each["error"]


def test_predict_names_the_file_it_cannot_read(call: Call, trained: Path) -> None:
    write_image(Path("good.png"))
    Path("bad.png").write_bytes(b"no image")
    outcome = call("predict", trained, "./bad.png", "good.png")
    assert outcome.code == 1  # though the other one was read
    assert outcome.lines[0].startswith("good.png: ") and len(outcome.lines) == 1
    assert "bad.png" in outcome.error and "expected an image" in outcome.error
    assert call("predict", trained, "good.png").code == 0
    assert call("predict", trained, "*.png").code == 0  # what nobody has named
    outcome = call("predict", trained, "bad.png")
    assert (outcome.code, outcome.out) == (1, "")
    assert "bad.png" in outcome.error


def test_models_json(call: Call) -> None:
    outcome = call("models", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = {each["name"]: each for each in json_of(outcome.out)}
    assert list(found) == zoo.list_models()
    assert (found["sparsenet_100_24"]["parameters"], found["sparsenet_100_24"]["macs"]) == (
        2509354,
        1050072480,
    )
    table = call("models", "densenet_bc*")
    assert table.code == 0 and len(table.lines) == 2 and "769,162" in table.out


def test_check_json(call: Call, folder_data: Path) -> None:
    outcome = call("check", "--json", "--dataset_dir", folder_data)
    assert (outcome.code, outcome.err) == (0, "")
    found = json_of(outcome.out)
    assert {"environment", "devices", "extras", "data"} <= found.keys()
    assert "fp32" in found["devices"]["cpu"]
    assert found["data"]["classes"] == ["ant", "bee"]
    plain = call("check")
    assert plain.code == 0 and "cpu" in plain.out


def test_check_shows_what_auto_takes_and_measures_anew(call: Call, found: Found) -> None:
    found({"shared": 0.02, "reference": 0.01}, shared=0.01, reference=0.02)
    told = json_of(call("check", "--json").out)["auto"]["cpu"]
    taken = {"training": ("reference", 0.01), "inference": ("shared", 0.01)}
    for kinds in told["implementation"].values():
        assert {
            kind: (each["taken"], min(each["seconds"].values())) for kind, each in kinds.items()
        } == taken
    assert set(told["precision"]) == {"training", "inference"}
    found.anew({"shared": 0.01, "reference": 0.04})
    assert json_of(call("check", "--json").out)["auto"]["cpu"] == told
    line = "cpu, fp32, training: auto takes shared (shared 0.0100 s, reference 0.0400 s)"
    assert line not in call("check").out
    assert line in call("check", "--measure").out and line in call("check").out


def test_report_compares_runs_on_one_page(
    call: Call, trained: Path, trained_on_folder: Path
) -> None:
    outcome = call("report", trained, trained_on_folder, "--out", "page.html")
    assert (outcome.code, outcome.err, outcome.out) == (0, "", "page.html\n")
    page = Path("page.html").read_text()
    assert "digits" in page and "insects" in page
    outcome = call("report", trained, "--markdown")
    assert outcome.code == 0 and "digits" in outcome.out and outcome.out.startswith("|")


def test_export_writes_a_checked_file(call: Call, trained: Path) -> None:
    pytest.importorskip("onnxruntime")
    outcome = call("export", trained, "--out", "model.onnx")
    assert (outcome.code, outcome.err) == (0, "")
    assert "model.onnx" in outcome.out
    assert Path("model.onnx").stat().st_size > 0


def test_export_writes_weights_into_the_run_folder(
    call: Call, copied: Path, trained_on_folder: Path
) -> None:
    outcome = call("export", copied, "--format", "safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    file = copied / "model.safetensors"
    size = f"{file.stat().st_size / 1024:.1f} KiB"
    assert re.fullmatch(
        rf"{file}: {size}; error \d+\.\d\d % in fp32.* \(digits: 359 test images\)",
        outcome.lines[0],
    )
    assert len(outcome.lines) == 1 and file.is_file()
    config = Path(shutil.copytree(trained_on_folder, "run")) / "config.json"
    config.write_text(config.read_text().replace("insects", "gone"))
    outcome = call("export", "run", "--format", "safetensors")
    assert (
        outcome.code == 2
        and "--dataset_dir: expected where the images of the run lie now, found" in outcome.error
    )
    assert not Path("run/model.safetensors").exists()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_have_is_never_printed(
    capsys: pytest.CaptureFixture[str], number: float
) -> None:
    with pytest.raises(ValueError, match=r"^--json: expected finite numbers, found one"):
        print_result({"errors": (1.0, number)}, [], as_json=True)
    assert capsys.readouterr().out == ""
