"""Starting from trained weights: whose they are, what is kept of them, and what stays frozen."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Call, newest, signals_put_back, write_classes, write_image
from safetensors.torch import load_file, save_file
from test_adopt import TWO_STAGES, close, disagree, images, peer, torchvision_state
from torch import Tensor, nn
from torch.optim import swa_utils

from sparsenet import Architecture, SparseNet, addresses, optim
from sparsenet.architecture import LARGE_IMAGES
from sparsenet.composition import compose
from sparsenet.config import RunConfig, replace
from sparsenet.library import fit
from sparsenet.run import Run
from sparsenet.schedule import OptimConfig
from sparsenet.start import read_start
from sparsenet.trained import load_trained

FP32 = ("--precision", "fp32", "--implementation", "shared")
STILL = ("--lr", "1e-12", "--weight_decay", 0, "--max_epoch", 1, "--schedule", "step", "--ema", 0)


def errors_of(run: Path) -> dict[str, float]:
    result = json.loads((run / "result.json").read_text())
    errors: dict[str, float] = result["class_errors"]
    return errors


def test_a_stem_that_is_left_to_the_images_is_that_of_the_weights(call: Call) -> None:
    start = read_start("sparsenet_40_12")
    config = start.settings(RunConfig())
    with pytest.raises(ValueError, match="stem 'cifar' instead of 'imagenet'"):
        start.check(dataclasses.replace(config, network=Architecture(stem="imagenet")))
    left = compose({}, replace(config, {"network": {"stem": "auto"}}))
    assert left == config
    write_classes(Path("data"))
    flags = ("--dataset_dir", "data", "--image_size", LARGE_IMAGES, "--time_limit", 1e-3, *FP32)
    outcome = call("train", "--weights", "sparsenet_40_12", "--stem", "auto", *flags)
    assert outcome.code == 0, outcome.err


def test_weights_in_a_file_or_a_whole_configuration_come_with_how_they_see(
    animals: Path, call: Call
) -> None:
    write_classes(Path("data"), ("dog", "eel"))
    before = load_trained(animals / "run")
    Path("c.json").write_text(json.dumps({"train": {"weights": str(animals / "run")}}))
    flags = ("--config", "c.json", "--dataset_dir", "data", *STILL, *FP32)
    assert call("train", *flags, "--out", "file").code == 0
    whole = replace(
        RunConfig(network=before.model.architecture),
        {
            "data": {"dataset_dir": "data"},
            "train": {"weights": str(animals / "run"), "max_epoch": 1},
        },
    )
    with signals_put_back():
        fit(whole, out="whole", quiet=True)
    for run in (Path("file"), Path("whole")):
        assert load_trained(run).preprocessing == before.preprocessing
        assert compose({}, Run(run).config()) == Run(run).config()
    assert call("train", *flags, "--mean", 0.5, "--std", 0.25, "--out", "flags").code == 0
    assert load_trained(Path("flags")).preprocessing.mean == (0.5,) * 3
    outcome = call("train", *flags, "--in_chans", 1, "--out", "grey")
    assert outcome.code == 0, outcome.err
    grey = Run(Path("grey")).config()
    assert grey.data.mean == () and compose({}, grey) == grey


def test_a_deviation_without_a_mean_is_refused_as_it_is_without_weights(call: Call) -> None:
    write_classes(Path("data"))
    flags = ("--dataset_dir", "data", "--in_chans", 1, "--std", 0.2)
    expected = "--mean: expected numbers, as --std has some, found none"
    for start in ((), ("--weights", "sparsenet_40_12")):
        assert expected in call("train", *flags, *start).error


# --- freezing -------------------------------------------------------------------------------------


def forward_by_hand(model: SparseNet, frozen: list[str], x: Tensor) -> Tensor:
    """*model* in training, module by module, but what is *frozen* in evaluation."""
    twin = SparseNet(model.architecture, "reference").double()
    twin.load_state_dict(model.state_dict())
    for name in frozen:
        twin.get_submodule(name).eval()
    return twin(x)


@pytest.mark.parametrize("implementation", ["reference", "shared", "native"])
@pytest.mark.parametrize(
    ("part", "frozen"),
    [
        ("", []),
        ("stem", ["stem"]),
        ("stage2", ["stem", "stages.0", "transitions.0", "stages.1"]),
        ("all", ["stem", "stages", "transitions"]),
    ],
)
@pytest.mark.filterwarnings("ignore:sparsenet. .* has other settings")  # of update_bn
def test_what_is_frozen_stays_and_normalises_by_what_it_was_trained_on(
    part: str, frozen: list[str], implementation: str
) -> None:
    torch.manual_seed(0)
    model = SparseNet(Architecture(depth=7, growth_rate=4), implementation).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model(x)  # so that running statistics are those of no other batch
    model.freeze(part)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = forward_by_hand(model, frozen, x)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    optimizer = optim.new_optimizer(model, OptimConfig(lr=0.1))
    found.square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    expected_kept = {name for name in before if name.startswith(tuple(f"{f}." for f in frozen))}
    assert kept == expected_kept
    for norm in norms:
        norm.momentum = None  # as ``update_bn`` does, which matters where statistics are tracked
    changed = [stage.change() is not None for stage in model.stages]
    assert changed == [
        f"stages.{number}" not in frozen and "stages" not in frozen
        for number in range(len(changed))
    ]
    swa_utils.update_bn([x, x], model)  # which resets all norms that track their statistics
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in kept)
    model.freeze("")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(norm.track_running_stats for norm in norms)
    swa_utils.update_bn([x, x, x], model)
    assert {int(norm.num_batches_tracked) for norm in norms} == {3}


def test_a_part_that_there_is_not_cannot_be_frozen(call: Call, trained_on_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"freeze: expected one of stem, .*, stage3, all, found"):
        SparseNet(Architecture(depth=7)).freeze("stage4")
    write_classes(Path("data"))
    flags = ("--dataset_dir", "data", "--freeze", "stage4")
    assert "--freeze: expected --weights" in call("train", *flags).error
    outcome = call("train", "--weights", trained_on_folder, *flags, "--out", "run")
    assert outcome.code == 2 and "--freeze: expected one of stem" in outcome.error
    assert not Path("run").exists()


def test_the_backbone_learns_at_its_own_rate(call: Call, trained_on_folder: Path) -> None:
    write_classes(Path("data"), ("cat", "dog"))
    steps = {}
    for rate in (0.0, 0.001):
        run = Path(f"run{rate}")
        flags = ("--dataset_dir", "data", "--lr", 0.01, "--backbone_lr", rate, "--weight_decay", 0)
        flags += ("--schedule", "step", "--ema", 0, "--max_epoch", 1, "--batch_size", 9, *FP32)
        flags += ("--test_fraction", 0.1, "--seed", 3)
        assert call("train", "--weights", trained_on_folder, *flags, "--out", run).code == 0
        start = load_trained(trained_on_folder).model.state_dict()
        end = newest(run / "checkpoints", "last")[0].part("model.")
        steps[rate] = {n: end[n] - start[n] for n in ("stem.0.weight", "stages.2.norm.weight")}
    for name, moved in steps[0.0].items():
        assert moved.abs().max() > 1e-6
        torch.testing.assert_close(steps[0.001][name], moved / 10, rtol=1e-2, atol=1e-7)


# --- what is kept ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in brightness alone, and a run that knows them well enough."""
    from conftest import _trained

    root = tmp_path_factory.mktemp("animals")
    for number, name in enumerate(("ant", "bee", "cow")):
        for i in range(12):
            pixels = torch.full((8, 8), 40 + 80 * number + i, dtype=torch.uint8)
            path = root / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pillow = pytest.importorskip("PIL.Image")
            pillow.fromarray(pixels.numpy()).convert("RGB").save(path)
    flags = ("--dataset_dir", root / "data", *TINY, "--max_epoch", 8, "--lr", 0.1, "--shift", 0)
    _trained(root / "run", *flags, *FP32)
    return root


def test_the_same_classes_in_another_order_keep_their_rows(animals: Path, call: Call) -> None:
    shutil.copytree(animals / "data", "data")
    labels = [f"{path},{path.parent.name}" for path in sorted(Path("data").rglob("*.png"))]
    # A CSV file numbers classes by the names, so new names in another order are given.
    renamed = {"ant": "cow", "bee": "ant", "cow": "bee"}
    start = read_start(str(animals / "run"))
    other = dataclasses.replace(start, classes=tuple(renamed[name] for name in start.classes))
    assert other.classes == ("cow", "ant", "bee") and labels
    model = SparseNet(start.architecture)
    other.load_into(model, ("ant", "bee", "cow"))
    theirs = start.tensors["classifier.weight"]
    assert torch.equal(model.classifier.weight, theirs[[1, 2, 0]])
    outcome = call(
        "train",
        "--weights",
        animals / "run",
        "--dataset_dir",
        "data",
        *STILL,
        *FP32,
        "--out",
        "run",
    )
    assert outcome.code == 0, outcome.err
    assert "with its classifier for 3 classes (ant, bee, cow)" in outcome.out
    before = load_trained(animals / "run").model.state_dict()
    after = load_trained(Path("run")).model.state_dict()
    for name, tensor in after.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_images_are_taken_as_before_and_other_classes_get_a_new_classifier(
    animals: Path, call: Call
) -> None:
    for name in ("dog", "eel"):
        for i in range(6):
            write_image(Path("data") / name / f"{i}.png", seed=i, size=21)
    outcome = call(
        "train",
        "--weights",
        animals / "run",
        "--dataset_dir",
        "data",
        *STILL,
        *FP32,
        "--out",
        "run",
    )
    assert outcome.code == 0, outcome.err
    assert "a new classifier for 2 classes instead of 3" in outcome.out
    before, after = load_trained(animals / "run"), load_trained(Path("run"))
    assert after.preprocessing == before.preprocessing
    assert after.classes == ("dog", "eel")
    assert after.about.recipe["train"]["weights"] == "run"  # and not where it lies
    stem = after.model.get_parameter("stem.0.weight")
    torch.testing.assert_close(stem, before.model.get_parameter("stem.0.weight"))
    # What flags say counts: images of another size, normalised as their own training images are.
    flags = ("--image_size", 12, "--mean", "0.5", "--std", "0.25", "--model", "sparsenet_40_12")
    outcome = call(
        "train", "--weights", animals / "run", "--dataset_dir", "data", *STILL, *FP32, *flags
    )
    assert outcome.code == 2 and "instead of" in outcome.error and "--weights" in outcome.error
    outcome = call(
        "train",
        "--weights",
        animals / "run",
        "--dataset_dir",
        "data",
        *STILL,
        *FP32,
        *flags[:-2],
        "--out",
        "other",
    )
    assert outcome.code == 0, outcome.err
    preprocessing = load_trained(Path("other")).preprocessing
    assert (preprocessing.size, preprocessing.mean, preprocessing.std) == (
        12,
        (0.5,) * 3,
        (0.25,) * 3,
    )


@pytest.mark.parametrize(("channels", "data"), [(3, "L"), (1, "RGB"), (3, "in_chans 1")])
def test_channels_are_summed_or_repeated(
    channels: int, data: str, animals: Path, call: Call
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    start = read_start(str(animals / "run"))
    if channels == 1:
        call(
            "train",
            "--dataset_dir",
            animals / "data",
            "--in_chans",
            1,
            *TINY,
            *STILL,
            *FP32,
            "--out",
            "grey",
        )
        start = read_start("grey")
    for name in ("dog", "eel"):
        for i in range(6):
            path = write_image(Path("data") / name / f"{i}.png", seed=i)
            pillow.open(path).convert("L" if data == "L" else "RGB").save(path)
    flags = ("--in_chans", 1) if data == "in_chans 1" else ()
    arguments = ("--weights", start.source, "--dataset_dir", "data", *STILL, *FP32, *flags)
    outcome = call("train", *arguments, "--out", "run")
    assert outcome.code == 0, outcome.err
    trained = load_trained(Path("run"))
    before, after = start.tensors["stem.0.weight"], trained.model.get_parameter("stem.0.weight")
    expected = {
        "L": before,  # greys are taken as colours, exactly
        "RGB": before.repeat(1, 3, 1, 1) / 3,
        "in_chans 1": before.sum(1, keepdim=True),
    }[data]
    torch.testing.assert_close(after, expected)
    assert start.preprocessing is not None
    assert (trained.preprocessing.mean == start.preprocessing.mean) == (data == "L")


def test_a_run_goes_on_without_the_weights_that_it_started_from(animals: Path, call: Call) -> None:
    shutil.copytree(animals / "run", "before")
    write_classes(Path("data"), ("dog", "eel"), 10)
    settings = ("--weights", "before", "--dataset_dir", "data", "--freeze", "stage1")
    settings += ("--backbone_lr", "0.001", "--max_epoch", 3, "--batch_size", 5, *FP32)
    assert call("train", *settings, "--out", "whole").code == 0
    assert call("train", *settings, "--out", "halves", "--time_limit", "1e-3").code == 0
    Path("before").rename("gone")
    outcome = call("train", "--resume", "halves", "--time_limit", 0)
    assert outcome.code == 0, outcome.err
    whole, halves = (newest(Path(run) / "checkpoints", "last")[0] for run in ("whole", "halves"))
    assert whole.tensors.keys() == halves.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, halves.tensors[name]), name
    stem = whole.part("model.")["stem.0.weight"]
    assert torch.equal(stem, load_trained("gone").model.state_dict()["stem.0.weight"])
    # Before the first checkpoint there is nothing else to go on from.
    shutil.rmtree("halves/checkpoints")
    for name in ("result.json", "metrics.csv"):
        Path("halves", name).unlink()
    Path("halves/checkpoints").mkdir()
    outcome = call("train", "--resume", "halves")
    assert outcome.code == 2 and "before: expected" in outcome.error


@pytest.mark.parametrize("freeze", ["stage3", "all"])
@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("--backbone_lr", 0.001, "--backbone_lr: expected layers before the classifier"),
        ("--optimizer", "muon", "--optimizer muon: expected convolutions that learn"),
    ],
)
def test_a_setting_for_layers_that_all_stay_is_refused(
    freeze: str, setting: str, value: object, expected: str, animals: Path, call: Call
) -> None:
    settings = ("--weights", animals / "run", "--dataset_dir", animals / "data", "--freeze", freeze)
    outcome = call("train", *settings, setting, value, "--out", "run")
    assert outcome.code == 2 and f"--freeze {freeze}" in outcome.error
    assert expected in outcome.error


@pytest.mark.parametrize("source", ["run", "weights file"])
def test_images_that_the_weights_were_trained_on_are_no_test(
    source: str, animals: Path, call: Call
) -> None:
    weights = animals / "run"
    if source == "weights file":
        call("export", animals / "run", "--format", "safetensors", "--out", "w.safetensors")
        weights = Path("w.safetensors")
    flags = ("--weights", weights, "--dataset_dir", animals / "data", *STILL, *FP32)
    trained = animals / "run" / "images.safetensors"
    known = set(load_file(trained)["train.ids"].tolist())
    for number, fractions in enumerate((("0.2", "0"), ("0.5", "0"), ("0.2", "0.3"))):
        run = Path(f"again{number}")
        held_out = ("--test_fraction", fractions[0], "--val_fraction", fractions[1])
        said = call("train", *flags, *held_out, "--out", run).out
        now = load_file(run / "images.safetensors")
        for split, name in (("test", "held-out"), ("val", "validation")):
            ids = now.get(f"{split}.ids", torch.empty(0)).tolist()
            count = len(known.intersection(ids))
            line = f"was trained on {count} of the {len(ids)} {name} images"
            assert (line in said) == bool(count), said
        assert ("was trained on" in said) == (number > 0)


@pytest.mark.parametrize("source", ["run", "weights file"])
def test_validation_images_that_were_trained_on_are_told_beside_a_test_split(
    source: str, animals: Path, call: Call
) -> None:
    shutil.copytree(animals / "data", "data/train")
    write_classes(Path("data/test"), ("ant", "bee", "cow"), 2)
    flags = ("--dataset_dir", "data", *STILL, *FP32)
    assert call("train", *flags, *TINY, "--val_fraction", 0.2, "--out", "before").code == 0
    call("export", "before", "--format", "safetensors", "--out", "w.safetensors")
    start = "before" if source == "run" else "w.safetensors"
    known = set(load_file("before/images.safetensors")["train.ids"].tolist())
    for number, fraction in enumerate((0.2, 0.5)):
        run = Path(f"again{number}")
        said = call("train", "--weights", start, *flags, "--val_fraction", fraction, "--out", run)
        ids = load_file(run / "images.safetensors")["val.ids"].tolist()
        count = len(known.intersection(ids))
        assert bool(count) == (number > 0)
        line = f"was trained on {count} of the {len(ids)} validation images"
        assert (line in said.out) == bool(count), said.out


# --- other libraries' files -----------------------------------------------------------------------


def other_libraries_file(kind: str, path: Path) -> tuple[Path, nn.Module]:
    theirs = disagree(peer(blocks=(2, 2), stem=8, growth=4).eval())
    state = torchvision_state(theirs, (2, 2))
    if kind == "monai":
        state = {
            name.replace("classifier.", "class_layers.out.")
            .replace(".norm1", ".layers.norm1")
            .replace(".norm2", ".layers.norm2")
            .replace(".conv1", ".layers.conv1")
            .replace(".conv2", ".layers.conv2"): tensor
            for name, tensor in state.items()
        }
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "wrapped":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": {**wrapped, "loss.weight": torch.ones(3)}}, path)
    else:
        torch.save(state, path)
    return path, theirs


@pytest.mark.parametrize("kind", ["torchvision", "monai", "safetensors", "wrapped"])
def test_densenets_of_other_libraries_are_read_for_what_they_are(kind: str, tmp_path: Path) -> None:
    path, theirs = other_libraries_file(kind, tmp_path / "file")
    start = read_start(str(path))
    assert start.architecture.stages == TWO_STAGES.stages
    assert start.preprocessing is None and start.classes == ()
    model = SparseNet(start.architecture).double().eval()
    start.load_into(model, ("a", "b", "c"))
    assert not torch.equal(model.classifier.weight, start.tensors["classifier.weight"])  # whose?
    dataclasses.replace(start, classes=("a", "b", "c")).load_into(model, ("a", "b", "c"))
    batch = images(theirs)
    close(model(batch), theirs(batch), 1e-5)  # the file is fp32


@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_averaged_weights_are_taken_where_a_file_has_some(plain: str, tmp_path: Path) -> None:
    path, _ = other_libraries_file("torchvision", tmp_path / "file.pth")
    tensors = torch.load(path)
    average = tensors | {"classifier.bias": tensors["classifier.bias"] + 1}
    for kept, expected in ((average, average), (None, tensors), ({}, tensors)):
        torch.save({plain: tensors, f"{plain}_ema": kept}, path)
        found = read_start(str(path)).tensors["classifier.bias"]
        assert torch.equal(found, expected["classifier.bias"])


def test_a_densenets_batches_are_counted_from_the_start(tmp_path: Path) -> None:
    path, _ = other_libraries_file("torchvision", tmp_path / "file.pth")
    torch.use_deterministic_algorithms(True)  # fills memory that is not written to yet
    try:
        tensors = read_start(str(path)).tensors
    finally:
        torch.use_deterministic_algorithms(False)
    counts = [count for name, count in tensors.items() if name.endswith("num_batches_tracked")]
    assert counts and not any(counts)


def test_a_densenets_file_is_trained_on_as_imagenets_images_are(call: Call, tmp_path: Path) -> None:
    path, _ = other_libraries_file("torchvision", tmp_path / "file.pth")
    write_classes(Path("data"), ("dog", "eel"))
    flags = ("--dataset_dir", "data", "--image_size", 32, *STILL, *FP32)
    outcome = call("train", "--weights", path, *flags, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "normalised as ImageNet's" in outcome.out
    assert load_trained(Path("run")).preprocessing.mean == (0.485, 0.456, 0.406)
    outcome = call("train", "--weights", path, *flags, "--mean", 0.5, "--std", 0.25)
    assert outcome.code == 0 and "ImageNet" not in outcome.out
    outcome = call("train", "--weights", path, "--model", "densenet121", *flags)
    assert outcome.code == 2 and "blocks" in outcome.error


@pytest.mark.parametrize("channels", [2, 4])
def test_weights_for_channels_that_no_image_has_are_refused(
    channels: int, call: Call, tmp_path: Path
) -> None:
    path, _ = other_libraries_file("torchvision", tmp_path / "file.pth")
    tensors = torch.load(path)
    stem = tensors["features.conv0.weight"]
    torch.save(tensors | {"features.conv0.weight": stem.repeat(1, 2, 1, 1)[:, :channels]}, path)
    write_classes(Path("data"), ("dog", "eel"))
    flags = ("--dataset_dir", "data", "--image_size", 32, *STILL, *FP32)
    outcome = call("train", "--weights", path, *flags, "--out", "run")
    assert outcome.code == 2 and not Path("run").exists()
    assert f"expected a network for images of 1 or 3 channels, found {channels}" in outcome.error


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_other_files_are_refused_in_one_line(call: Call, tmp_path: Path) -> None:
    path, _ = other_libraries_file("torchvision", tmp_path / "whole.pth")
    whole = torch.load(path)
    files: dict[str, tuple[object, str]] = {
        "harm.pth": ({"a": Harmful()}, "tensors alone, found .*mkdir"),
        "resnet.pth": (
            {"conv1.weight": torch.ones(3)},
            "DenseNet of torchvision.* found 'conv1.weight'",
        ),
        "list.pth": ([1, 2], "names and tensors of a network"),
        "nan.pth": (
            {**whole, "classifier.bias": torch.full((3,), torch.nan)},
            "NaN or infinity in classifier.bias",
        ),
        "less.pth": (
            {n: t for n, t in whole.items() if "conv2" not in n},
            "expected .*denselayer1.conv2.weight.*found no such",
        ),
        "twice.pth": (
            {**whole, "features.denseblock1.denselayer1.conv.2.weight": torch.ones(1)},
            "found two for features.denseblock1.denselayer1.conv2.weight",
        ),
        "more.pth": ({**whole, "features.x": torch.ones(1)}, "no place for 'features.x'"),
    }
    for name, (content, expected) in files.items():
        torch.save(content, name)
        with pytest.raises(ValueError, match=expected) as caught:
            read_start(name)
        assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
    assert not Path("harm").exists()
    for content in (b"", b"PK", path.read_bytes()[:900], b"\x80\x02}q\x00.", b"{" * 99):
        Path("damaged").write_bytes(content)
        with pytest.raises(ValueError, match=r"^damaged: expected "):
            read_start("damaged")
    outcome = call("train", "--weights", "sparsenet_40_13")
    assert outcome.code == 2 and re.search("sparsenet_40_12", outcome.error)


def test_addresses_of_the_hub_are_those_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    place = addresses._on_the_web
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert place("https://a.org/b#sha256=1") == "https://a.org/b#sha256=1"
    hub = "https://huggingface.co/timm/densenet121.ra_in1k/resolve"
    assert place("hf://timm/densenet121.ra_in1k") == f"{hub}/main/model.safetensors"
    assert (
        place("hf://timm/densenet121.ra_in1k@v1/a/b.bin#sha256=2") == f"{hub}/v1/a/b.bin#sha256=2"
    )
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME"):
        place("hf://densenet121")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.org/")
    assert place("hf://me/birds") == "https://mirror.org/me/birds/resolve/main/model.safetensors"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.org")
    with pytest.raises(ValueError, match=r"^HF_ENDPOINT: expected an address .* https://"):
        place("hf://me/birds")
