"""On a device that PyTorch knows from a plug-in, as an Ascend NPU, the whole program works.

The plug-in (``npu_backend``) refuses operations that mix the device with the host, and counts what
is computed on it and copied to and from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import npu_backend
import pytest
import torch
from conftest import TINY, newest, write_cifar10, write_image

from sparsenet.device import choose_device
from sparsenet.ops import dispatch, measured, shared

HERE = Path(__file__).parent
DATA = "--dataset", "c10", "--dataset_dir", "data"
# The command that the project is measured by, on a hundred images of another size.
SEED = (
    *("--fetch", "sparse", "--depth", "100", "--growth_rate", "24", "--batch_size", "64"),
    *("--drop_1", "150", "--drop_2", "225", "--max_epoch", "1", "--image_size", "8"),
)
SMALL = (
    *(*TINY, "--batch_size", "32", "--max_epoch", "2", "--lr", "0.02", "--image_size", "12"),
    *("--optimizer", "muon"),
    *("--first_size", "8", "--ema", "0.9", "--dropout", "0.1", "--grad_clip", "1"),
    *("--trivial_augment", "--cutout", "3", "--mixup", "0.5", "--cutmix", "0.5"),
)
ENGINES = "shared", "reference"
FP32 = "--precision", "fp32"


def training(name: str, *flags: str, device: str = "npu") -> list[str]:
    return ["train", *DATA, "--device", device, "--out", name, *flags]


def commands() -> dict[str, list[str]]:
    """By name, what autocast does and the arguments."""
    found = {"check": ["check"], "seed": training("seed", *SEED)}
    for engine in ENGINES:
        flags = *SMALL, *FP32, "--implementation", engine
        found[engine] = training(engine, *flags)
        found[f"part-{engine}"] = training(f"part-{engine}", *flags, "--time_limit", "1e-9")
        found[f"resumed-{engine}"] = ["train", "--resume", f"part-{engine}", "--time_limit", "0"]
    shared = *SMALL, "--implementation", "shared"
    on_npu, weights = ("--device", "npu", *FP32), "shared.safetensors"
    found |= {
        "cpu": training("cpu", *shared, *FP32, device="cpu"),
        "bf16": training("bf16", *shared, "--precision", "bf16"),
        "eval": ["eval", "shared", *on_npu, "--json"],
        "eval-cpu": ["eval", "shared", "--device", "cpu", *FP32, "--json"],
        "predict": ["predict", "shared", "picture.png", *on_npu[:2], "--explain", "--json"],
        "predict-cpu": ["predict", "shared", "picture.png", "--device", "cpu", "--json"],
        "export": ["export", "shared", "--format", "safetensors", "--out", weights, *on_npu[:2]],
        "eval-weights": ["eval", weights, *DATA, *on_npu, "--json"],
        "onnx": ["export", "shared", "--format", "onnx", "--out", "shared.onnx"],
    }
    with_autocast = {name: ["casts", *arguments] for name, arguments in found.items()}
    return with_autocast | {
        "bf16-without": ["nothing", *training("none", *shared, "--precision", "bf16")],
        "check-without": ["nothing", "check"],
        "without": ["absent", *training("without", *shared)],
    }


def python(folder: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python in *folder*, where PyTorch finds the plug-in that was installed there."""
    path = [str(folder / "plug-in"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, text=True
    )


def environment_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return found


def losses(run: Path) -> list[float]:
    """Of training, by epoch."""
    rows = newest(run / "checkpoints", "last")[0].manifest.rows
    assert rows
    return [row.train_loss for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return newest(run / "checkpoints", "last")[0].tensors


def assert_computed_on_the_device(run: Path, done: dict[str, Any], steps: int) -> None:
    """Images were copied to the device once, and nothing that was computed from them came back."""
    tensors = weights(run)
    convolutions = sum(name.startswith("model") and tensors[name].ndim == 4 for name in tensors)
    assert done["ran"]["aten::convolution_backward"] == steps * convolutions
    pixels = [(shape, times) for dtype, shape, times in done["to_device"] if dtype == "torch.uint8"]
    assert [times for shape, times in pixels if len(shape) == 4] == [1, 1]  # for training and test
    of_state = [list(tensor.shape) for tensor in tensors.values()]
    back = [shape for dtype, shape, _ in done["to_host"] if "float" in dtype and len(shape) > 1]
    assert back and all(shape in of_state for shape in back)


def test_every_command_works_on_a_plug_in_s_device(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "data")
    write_image(tmp_path / "picture.png")
    npu_backend.install(tmp_path / "plug-in")
    given = json.dumps(list(commands().values()))
    ended = python(tmp_path, str(HERE / "npu_commands.py"), given=given)
    assert ended.returncode == 0, ended.stderr
    done = dict(zip(commands(), json.loads(ended.stdout), strict=True))
    refused = done.pop("bf16-without")
    assert [name for name in done if done[name]["code"]] == [], done
    assert refused["code"] == 2 and "--precision: expected fp32 on npu" in refused["err"]

    assert "device npu: fp32, bf16, fp64" in done["check"]["out"]
    assert f"npu is {npu_backend.NAME}" in done["check"]["out"]
    used = environment_of(tmp_path / "seed")
    assert used["device_name"] == npu_backend.NAME
    assert used["driver"] == {"npu-backend": "1.0", "cann": npu_backend.CANN}
    assert_computed_on_the_device(tmp_path / "seed", done["seed"], steps=2)
    for engine in ENGINES:
        assert_computed_on_the_device(tmp_path / engine, done[engine], steps=2 * 4)
        assert "stopped: the time limit" in done[f"part-{engine}"]["out"]
        assert "resumed at step 1 (epoch 1)" in done[f"resumed-{engine}"]["out"]
        whole, resumed = weights(tmp_path / engine), weights(tmp_path / f"part-{engine}")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert losses(tmp_path / engine) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    in_fp32, in_bf16 = losses(tmp_path / "shared"), losses(tmp_path / "bf16")
    assert in_bf16 == pytest.approx(in_fp32, rel=0.02) and in_bf16 != in_fp32
    # Where bf16 would be a name only.
    assert "npu, training: auto precision is fp32" in done["check-without"]["out"]
    assert environment_of(tmp_path / "without")["precision"] == "fp32"
    assert losses(tmp_path / "without") == in_fp32

    on_npu, on_cpu, rounded = (
        json.loads(done[name]["out"]) for name in ("eval", "eval-cpu", "eval-weights")
    )
    assert on_npu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-5)
    assert rounded["stated_error"] == rounded["error"]
    assert done["export"]["ran"]["aten::convolution"]
    probabilities, expected = (
        json.loads(done[name]["out"])[0]["probabilities"] for name in ("predict", "predict-cpu")
    )
    assert probabilities == pytest.approx(expected, rel=1e-4)
    assert done["predict"]["ran"]["aten::convolution"] and (tmp_path / "shared.onnx").exists()


def test_a_plug_in_that_cannot_be_loaded_ends_in_one_line(tmp_path: Path) -> None:
    """As ``torch_npu`` where the libraries of its device are not found."""
    npu_backend.install(tmp_path / "plug-in", "npu_backend:NAME")
    ended = python(tmp_path, "-m", "sparsenet.cli", "check")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in ended.stderr
    assert "'str' object is not callable" in ended.stderr


def test_an_npu_without_its_plug_in_is_told_what_it_needs() -> None:
    with pytest.raises(ValueError, match="found 'npu:0'; an Ascend NPU needs torch_npu installed"):
        choose_device("npu:0")


def test_a_batch_norm_that_saves_something_else_leaves_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("xpu")  # of which nothing is known, nor asked
    for saved, expected in ((0.5, "shared"), (4.0, "shared"), (8.0, "reference")):
        monkeypatch.setattr(shared, "_saved_statistic", lambda device, saved=saved: saved)
        monkeypatch.setattr(measured, "_known", {})
        monkeypatch.setattr(measured, "_read", lambda conditions: None)
        monkeypatch.setattr(measured, "device_name", str)
        assert dispatch.choose("auto", device) == expected
    with pytest.raises(ValueError, match="'shared' cannot run here: expected a batch norm on xpu"):
        dispatch.choose("shared", device)
