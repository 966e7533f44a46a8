"""Weights files: what a run becomes in one, what names it, and that nothing wrong is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
import torch
from conftest import TINY, Call, Outcome, newest, write_classes, write_image
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_data_archives import Server

import sparsenet
from sparsenet import Architecture, SparseNet, addresses, checkpoints, downloads, weights, zoo
from sparsenet.data.selection import Known, select_images
from sparsenet.export.onnx import ExportReport
from sparsenet.export.safetensors import export
from sparsenet.run import Run
from sparsenet.trained import load_trained

NAME = "sparsenet_7_4"
ROOT = Path(__file__).parent.parent
FLAGS = {"in_chans": 1}  # the digits are grey


def passed(outcome: Outcome) -> Outcome:
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits run as a weights file. Read only."""
    path, data = (
        tmp_path_factory.mktemp("exported") / "mine.safetensors",
        Run.open(trained).config().data,
    )
    network = load_trained(trained)
    data = dataclasses.replace(data, image_size=8, in_chans=1)
    images = select_images(data, "", network.classes, Known({}, network.about.data))
    export(network, path, images)
    return path


@pytest.fixture
def file(call: Call, exported: Path) -> Path:
    """The same as ``mine.safetensors`` in the folder where the program runs."""
    return Path(shutil.copy(exported, Path.cwd()))


@pytest.fixture
def shipped(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as if it came with the package, as the weights of ``NAME``."""
    path = tmp_path / "package" / f"{NAME}.safetensors"
    path.parent.mkdir()
    path.write_bytes(file.read_bytes())
    index = {NAME: hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr(weights, "SHIPPED", path.parent)
    monkeypatch.setitem(zoo.NETWORKS, NAME, {"fetch": "sparse", "depth": 7, "growth_rate": (4,)})
    return path


@pytest.fixture
def changed(file: Path) -> Callable[..., Path]:
    """The weights file with something else in what it says of itself, or with other tensors."""

    def change(tensors: dict[str, torch.Tensor | None] | None = None, **about: Any) -> Path:
        with safe_open(file, "pt") as opened:
            said = json.loads(opened.metadata()["sparsenet"])
        for name, value in about.items():
            said[name] = said[name] | value if isinstance(value, dict) else value
        all_tensors = {
            name: value
            for name, value in (load_file(file) | (tensors or {})).items()
            if value is not None
        }
        path = Path("changed.safetensors").absolute()
        path.write_bytes(save(all_tensors, {"sparsenet": json.dumps(said)}))
        return path

    return change


def said(file: Path) -> Any:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["sparsenet"])


# --- what is in a file ----------------------------------------------------------------------------


def test_a_file_holds_the_runs_numbers_rounded(file: Path, trained: Path) -> None:
    ours, theirs = load_file(file), load_trained(trained).model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        kept = torch.float32 if value.is_floating_point() else torch.int64
        assert ours[name].dtype == (torch.float16 if value.ndim >= 2 else kept)
        torch.testing.assert_close(ours[name].to(value), value, rtol=2**-11, atol=2**-25)
    checkpoint, _ = newest(Run.open(trained).checkpoints, "best")
    about, manifest = said(file), checkpoint.manifest
    of_run = json.loads(json.dumps(dataclasses.asdict(manifest.about)))
    assert about | of_run == about and about["epoch"] == manifest.epoch == 2
    assert str(trained) not in file.read_bytes().decode("latin-1")


def test_what_is_given_back_is_what_is_in_the_file(file: Path) -> None:
    stored, found = load_file(file), weights.load(file).tensors
    assert all(value.dtype in (torch.float32, torch.int64) for value in found.values())
    assert all(torch.equal(found[name], stored[name].to(found[name])) for name in stored)
    assert all(
        torch.equal(value, stored[name]) for name, value in weights.rounded(found).items()
    )  # once is enough


def test_counters_stay_as_they_are() -> None:
    state = SparseNet(Architecture(stem="imagenet", blocks=(1, 1))).state_dict()
    found = weights.rounded(state)
    counters = {name for name, value in state.items() if value.dtype == torch.int64}
    assert (
        counters == {name for name, value in found.items() if value.dtype == torch.int64}
        and counters
    )


def test_the_stated_error_is_that_of_the_file(call: Call, file: Path) -> None:
    stated = said(file)["measured"]
    assert "fp32" in stated
    for precision, result in stated.items():
        arguments = ("eval", file, "--dataset", "digits", "--precision", precision)
        found = json.loads(passed(call(*arguments, "--json")).out)
        assert found["stated_error"] == result["error"]
        assert {name: found[name] for name in result} == result
        images = f"{result['images']} test images of digits"
        line = f"stated: {result['error']:.2f} % ({precision}), for {images}"
        assert passed(call(*arguments)).lines[-1] == line


def test_what_is_measured_is_what_is_written(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights.rounded
    with monkeypatch.context() as patch:  # a rounding that nobody would overlook
        patch.setattr(
            weights,
            "rounded",
            lambda tensors: {
                n: t.sign().half() if t.is_floating_point() else t
                for n, t in whole(tensors).items()
            },
        )
        passed(call("export", trained, "--format", "safetensors", "--out", "coarse.safetensors"))
    found = json.loads(
        passed(call("eval", "coarse.safetensors", "--dataset", "digits", "--json")).out
    )
    assert (
        found["error"]
        == found["stated_error"]
        > json.loads((trained / "result.json").read_text())["error"]
    )


def test_the_stated_error_is_on_the_images_that_the_run_was_tested_on(
    call: Call, folder_data: Path, tmp_path: Path
) -> None:
    data = ("--dataset_dir", folder_data)
    half = (*data, "--test_fraction", 0.5, "--batch_size", 4)
    passed(call("train", *TINY, "--max_epoch", 1, *half, "--out", "run"))
    passed(call("export", "run", "--format", "safetensors"))
    arguments = ("eval", "run/model.safetensors", *data, "--json", "--precision", "fp32")
    outcome = call(*arguments)
    assert "left out: 5 images" in outcome.err and outcome.code == 0
    found, result = json.loads(outcome.out), json.loads(Path("run/result.json").read_text())
    assert found["images"] == result["images"] == 7 and found["split"] == "held-out"
    assert found["error"] == found["stated_error"]


def test_the_stated_error_names_the_images_it_was_found_on(
    call: Call, trained_on_folder: Path, tmp_path: Path
) -> None:
    write_classes(tmp_path / "others", seed=1)
    data = ("--dataset_dir", "others")
    target = ("--format", "safetensors", "--out", "w.safetensors")
    passed(call("export", trained_on_folder, *data, *target))
    about = said(tmp_path / "w.safetensors")
    assert {result["dataset"] for result in about["measured"].values()} == {"others"}
    assert about["dataset"] == "insects"
    outcome = call("eval", "w.safetensors", *data)
    assert "which of these images the network was trained on" in outcome.err
    assert outcome.lines[0].startswith("others: 12 images in others, ")
    assert outcome.lines[-1].endswith(" for 12 images of others")


def test_a_run_states_no_error(call: Call, trained: Path) -> None:
    assert json.loads(passed(call("eval", trained, "--json")).out)["stated_error"] is None
    assert "stated" not in call("eval", trained).out


def test_predictions_are_those_of_the_rounded_weights(
    call: Call, trained: Path, file: Path
) -> None:
    write_image(Path("a.png"))
    rounded = load_trained(trained)
    rounded.model.load_state_dict(weights.rounded(rounded.model.state_dict()))
    ours = load_trained(file)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(ours.model(images), rounded.model(images))
    assert dataclasses.replace(ours.about, measured={}) == rounded.about
    assert "a.png: " in passed(call("predict", "mine.safetensors", "a.png")).out


def test_numbers_that_fp16_has_not_are_refused(call: Call, copied: Path) -> None:
    run = Run.open(copied)
    checkpoint, _ = newest(run.checkpoints, "best")
    tensors = {
        **checkpoint.tensors,
        "model.stem.0.weight": checkpoint.tensors["model.stem.0.weight"] + 1e5,
    }
    checkpoints.save(run.checkpoints, checkpoint.manifest, tensors)
    outcome = call("export", copied, "--format", "safetensors")
    assert outcome.code == 2 and "stem.0.weight" in outcome.error and "65504" in outcome.error
    assert not (copied / "model.safetensors").exists()


# --- who may be named -----------------------------------------------------------------------------


def test_weights_of_the_package_are_found_by_name(call: Call, shipped: Path, file: Path) -> None:
    write_image(Path("a.png"))
    assert passed(call("predict", NAME, "a.png")).out == passed(call("predict", file, "a.png")).out
    assert "stated: " in passed(call("eval", NAME, "--dataset", "digits")).out
    assert zoo.list_models(pretrained=True) == [NAME]
    assert zoo.list_models("densenet*", pretrained=True) == []
    stated = said(shipped)["measured"]
    rows = {
        row["name"]: row["pretrained"] for row in json.loads(passed(call("models", "--json")).out)
    }
    assert rows.pop(NAME)["measured"] == stated and set(rows.values()) == {None}
    shown = passed(call("models", "sparsenet_*4*")).lines
    assert [line.split()[0] for line in shown if "%" in line] == [NAME]
    assert f"{stated['fp32']['error']:.2f} % on digits" in shown[-1]


def test_a_changed_byte_of_the_packages_weights_is_found(call: Call, shipped: Path) -> None:
    content = bytearray(shipped.read_bytes())
    for place in (9, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        shipped.write_bytes(damaged)
        outcome = call("eval", NAME, "--dataset", "digits")
        assert (
            outcome.code == 2
            and str(shipped) in outcome.error
            and "install it again" in outcome.error
        )
        with pytest.raises(ValueError, match="install it again"):
            zoo.create_model(NAME, pretrained=True, **FLAGS)


def test_what_is_there_goes_before_a_name(
    call: Call, shipped: Path, trained_on_folder: Path
) -> None:
    passed(call("export", trained_on_folder, "--format", "safetensors", "--out", NAME))
    assert load_trained(NAME).about.dataset == "insects"
    assert (
        zoo.create_model(NAME, pretrained=True, **FLAGS).num_classes == 10
    )  # which asks for the package's
    Path(NAME).unlink()
    assert load_trained(NAME).about.dataset == "digits"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "not-here",
            r"not-here: expected a run folder, a weights file, its https:// address or a name .*"
            r"sparsenet_7_4",
        ),
        ("sparsenet_7_5", r"did you mean sparsenet_7_4\?"),
        (
            "http://127.0.0.1/x.safetensors",
            "expected an address that begins with https:// or hf://, found http://",
        ),
        ("ftp://127.0.0.1/x.safetensors", "begins with https:// or hf://, found ftp://"),
        ("https://127.0.0.1/x#sha256=12ab", "64 hexadecimal digits"),
        ("https://127.0.0.1/x#main", "64 hexadecimal digits"),
        ("https://[::1/x", "expected a weights file"),
        ("https://127.0.0.1/ä", "expected a weights file"),
        ("x" * 300, "nothing of that name"),
        ("\0", "nothing of that name"),
    ],
)
@pytest.mark.parametrize(
    "command", [("eval", "--dataset", "digits"), ("export",), ("predict", "x.png")]
)
def test_what_names_nothing_is_one_line(
    call: Call, shipped: Path, name: str, expected: str, command: tuple[str, ...]
) -> None:
    outcome = call(command[0], name, *command[1:])
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(expected, outcome.error), outcome.error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("eval", "mine.safetensors"), "--dataset_dir: expected the folder of the test images"),
        (
            ("eval", "mine.safetensors", "--dataset", "c10"),
            "--dataset_dir: expected the folder of the test images",
        ),
        (
            ("eval", "mine.safetensors", "--dataset_dir", "DATA"),
            "expected images of the 10 classes .* found also ant, bee",
        ),
        (
            ("eval", "mine.safetensors", "--dataset", "digits", "--checkpoint", "last"),
            "--checkpoint: expected none",
        ),
        (
            ("export", "mine.safetensors", "--format", "safetensors"),
            "--dataset_dir: expected the folder",
        ),
        (
            ("export", "mine.safetensors", "--dataset_dir", "DATA"),
            "expected images of the 10 classes .* found also ant, bee",
        ),
        (("export", "mine.safetensors", "--device", "meta"), "--device: expected auto or cpu"),
        (
            ("export", "mine.safetensors", "--format", "safetensors", "--opset", "20"),
            "--opset: expected none with --format safetensors, found 20",
        ),
        (
            ("export", "mine.safetensors", "--format", "safetensors", "--dataset", "digits"),
            "--out: expected a name, as mine.safetensors is there already, found none",
        ),
        (
            (
                *("export", "mine.safetensors", "--format", "safetensors", "--dataset", "digits"),
                *("--out", "mine.safetensors"),
            ),
            "--out: expected another file than the weights",
        ),
        (
            (
                "export",
                "mine.safetensors",
                "--format",
                "safetensors",
                "--dataset",
                "digits",
                "--out",
                "no/x",
            ),
            "in a folder that exists",
        ),
    ],
)
def test_what_weights_cannot_do_is_one_line(
    call: Call, file: Path, folder_data: Path, arguments: tuple[str, ...], expected: str
) -> None:
    before = file.read_bytes()
    outcome = call(*(folder_data if argument == "DATA" else argument for argument in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(expected, outcome.error), outcome.error
    assert [path.name for path in Path().iterdir()] == [file.name] and file.read_bytes() == before


def test_weights_become_onnx_in_the_folder_where_one_is(
    call: Call, file: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def export(*arguments: Any) -> ExportReport:
        asked.append(arguments)
        return ExportReport(arguments[1], 20, 0, 0.0, 0.0, 0)

    monkeypatch.setattr("sparsenet.export.onnx.export_onnx", export)
    outcome = call("export", file.rename(shipped.parent / "far.safetensors"))
    assert outcome.code == 0 and "random inputs only" in outcome.error
    passed(call("export", NAME, "--dataset", "digits"))
    passed(call("export", NAME, "--dataset", "digits", "--out", "cat.onnx"))
    assert [target for _, target, *_ in asked] == [
        Path("far.onnx"),
        Path(f"{NAME}.onnx"),
        Path("cat.onnx"),
    ]
    assert [None if real is None else len(real) for _, _, real, _ in asked] == [None, 64, 64]
    Path(f"{NAME}.onnx").write_text("somebody's")
    outcome = call("export", NAME, "--dataset", "digits")
    assert outcome.code == 2 and f"--out: expected a name, as {NAME}.onnx is there" in outcome.error
    assert len(asked) == 3
    passed(call("export", NAME, "--dataset", "digits", "--out", f"{NAME}.onnx"))


# --- damaged and foreign files --------------------------------------------------------------------


def refused(file: Path, expected: str) -> None:
    for load in (load_trained, lambda path: zoo.create_model("sparsenet_40_12", pretrained=path)):
        with pytest.raises(ValueError, match=expected) as found:
            load(file)
        assert str(found.value).startswith(str(file)) and "\n" not in str(found.value)


def test_a_damaged_file_is_one_line(file: Path) -> None:
    content = file.read_bytes()
    for damaged in (
        b"",
        b"no weights",
        content[:100],
        content[:-1],
        content + b"x",
        b"\xff" * 8 + content[8:],
    ):
        file.write_bytes(damaged)
        refused(file, "expected a safetensors file, found another kind or damage")


def test_a_foreign_file_is_one_line(file: Path, trained: Path) -> None:
    checkpoint = next((trained / "checkpoints").glob("best-*.safetensors"))
    refused(checkpoint, "expected a file from sparsenet export")
    for metadata in (None, {"format": "pt"}, {"sparsenet": "[]"}):
        file.write_bytes(save({"x": torch.zeros(3)}, metadata))
        refused(file, "expected a file from sparsenet export .*found no description")


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"epoch": "two"}, r"Expected `int`, got `str` - at `\$\.epoch`"),
        ({"classes": ["ant", "bee"]}, "2 names for 10 classes"),
        ({"measured": {"bf16": 3}}, r"Expected `object`, got `int` - at `\$\.measured"),
        ({"recipe": {"data": {}}}, "'recipe' that does not say which images"),
        ({"preprocessing": {"mean": [0.1, 0.1, 0.1]}}, "'preprocessing' with 3 means and 1 stds"),
        ({"architecture": {"in_chans": [1]}}, "'preprocessing' that does not fit"),
        (
            {"preprocessing": {"std": [0.0]}},
            r"'preprocessing' with a std of 0, expected one from 1e-06 to 1e\+06",
        ),
        ({"preprocessing": {"std": [1e-320]}}, "'preprocessing' with a std of .*e-321"),
        ({"preprocessing": {"std": [-0.3]}}, "'preprocessing' with a std of -0.3"),
        ({"preprocessing": {"std": [1e7]}}, r"'preprocessing' with a std of 1e\+07"),
        (
            {"preprocessing": {"mean": [1e308]}},
            r"'preprocessing' with a mean of 1e\+308, expected one within ±1000",
        ),
        ({"preprocessing": {"mean": [-1001.0]}}, "'preprocessing' with a mean of -1001"),
        ({"preprocessing": {"grey_range": [9.0, 9.0]}}, "expected two rising numbers"),
        ({"preprocessing": {"grey_range": [0.0]}}, "expected two rising numbers"),
        (
            {"preprocessing": {"crop": 7}},
            "'preprocessing' with 'crop', which this version does not know",
        ),
        (
            {"architecture": {"colour": "red"}},
            "an architecture that this version knows, found: .*colour",
        ),
        (
            {"architecture": {"fetch": "no_such"}},
            "an architecture that this version knows, found: fetch",
        ),
        ({"classes": [*"abcdefghi", "\x1b[2J"]}, "which has what is no character of a text"),
        ({"preprocessing": {"size": 10**6}}, "a size of 1000000, expected one from 1 to 4096"),
        ({"architecture": {"depth": 3004}}, "found: 3000 layers for "),
        (
            {"architecture": {"growth_rate": [10**12]}},
            "the tensors of its network|architecture that this version",
        ),
    ],
)
def test_a_wrong_description_is_one_line(
    changed: Callable[..., Path], about: Any, expected: str
) -> None:
    path = changed(**about)
    with pytest.raises(ValueError, match=expected) as found:
        load_trained(path)
    assert str(found.value).startswith(str(path)) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("extra", torch.zeros(5)),
        ("classifier.bias", None),
        ("classifier.bias", torch.zeros(5)),
        ("classifier.bias", torch.zeros(10).int()),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_shape_is_named(
    changed: Callable[..., Path], name: str, wrong: torch.Tensor | None
) -> None:
    path = changed({name: wrong})
    with pytest.raises(
        ValueError, match=f"expected the tensors of its network, found {re.escape(name)} of "
    ):
        load_trained(path)


@pytest.mark.parametrize(
    ("name", "number", "found"),
    [
        ("classifier.weight", float("nan"), "NaN or infinity in classifier.weight"),
        ("classifier.bias", float("-inf"), "NaN or infinity in classifier.bias"),
        ("RUNNING_VAR", float("inf"), "NaN or infinity in RUNNING_VAR"),
        ("RUNNING_VAR", -1e-9, "a negative variance in RUNNING_VAR"),
    ],
)
def test_numbers_that_no_network_computes_with_are_refused(
    call: Call, changed: Callable[..., Path], file: Path, name: str, number: float, found: str
) -> None:
    stored = load_file(file)
    variance = next(name for name in stored if name.endswith("running_var"))
    name, found = (text.replace("RUNNING_VAR", variance) for text in (name, found))
    tensor = stored[name].clone()
    tensor.view(-1)[-1] = number
    path = changed({name: tensor})
    refused(path, f"expected numbers to compute with, found {re.escape(found)}$")
    outcome = call("eval", path, "--dataset", "digits", "--json")
    assert (outcome.code, outcome.out) == (2, "") and found in outcome.error


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_a_checkpoint_with_such_numbers_is_refused(call: Call, copied: Path, number: float) -> None:
    folder = Run.open(copied).checkpoints
    for kind in ("best", "last"):
        checkpoint, _ = newest(folder, kind)
        name = next(name for name in checkpoint.tensors if name.endswith("running_var"))
        tensor = checkpoint.tensors[name].clone()
        tensor[0] = number
        checkpoints.save(folder, checkpoint.manifest, {**checkpoint.tensors, name: tensor})
        outcome = call("eval", copied, "--checkpoint", kind)
        # Of "last", the one before is used.
        assert outcome.code == (2 if kind == "best" else 0)
        assert name in outcome.error and "nan" not in outcome.out
        assert ("a negative variance" if number < 0 else "NaN or infinity") in outcome.error
    assert name in call("train", "--resume", copied).out


def test_a_checkpoint_with_statistics_of_no_images_is_refused(copied: Path) -> None:
    folder = Run.open(copied).checkpoints
    checkpoint, _ = newest(folder, "best")
    about = checkpoint.manifest.about
    for wrong in ({"std": (1e-320,)}, {"mean": (1e308,)}, {"size": 10**9}, {"channels": 3}):
        statistics = dataclasses.replace(about.preprocessing, **wrong)
        changed = dataclasses.replace(about, preprocessing=statistics)
        manifest = dataclasses.replace(checkpoint.manifest, about=changed)
        checkpoints.save(folder, manifest, checkpoint.tensors)
        with pytest.raises(checkpoints.RunError, match=r"damaged .*preprocessing"):
            load_trained(copied)


@pytest.mark.parametrize("weights", [(-6e4, -6e4), (6e4, 6e4), (6e4, -6e4)])
def test_finite_weights_with_logits_that_are_not_give_no_error_and_no_class(
    call: Call, changed: Callable[..., Path], file: Path, weights: tuple[float, float]
) -> None:
    """Of class 0 alone, so that the most probable class and most losses would be numbers."""
    stored = load_file(file)
    last = "stages.2.norm.bias"
    classifier, bias = stored["classifier.weight"] * 0, stored[last] * 0
    classifier[0, :2], bias[:2] = torch.tensor(weights), 1e37
    path = changed({"classifier.weight": classifier, last: bias})
    write_image(Path("a.png"))
    logits = load_trained(path).model(torch.rand(1, 1, 8, 8))
    assert logits.isfinite().tolist() == [[False] + 9 * [True]]
    for form in ((), ("--json",)):
        outcome = call("eval", path, "--dataset", "digits", *form)
        assert (outcome.code, outcome.out) == (2, "")
        assert "image 0: expected finite logits and loss, found NaN or infinity" in outcome.error
    outcome = call("predict", path, "a.png")
    assert (outcome.code, outcome.out) == (1, "")
    assert "a.png: expected finite logits, found NaN or infinity" in outcome.error
    (said,) = json.loads(call("predict", path, "a.png", "--json").out)
    assert said.keys() == {"path", "error"}


def test_a_file_too_large_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LIMIT", file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"found: more than the .* that are read"):
        weights.load(file)


# --- as a library ---------------------------------------------------------------------------------


def test_a_model_by_name_has_the_weights_and_its_classifier(shipped: Path, file: Path) -> None:
    for pretrained in (True, NAME, str(file), file):
        model = sparsenet.create_model(NAME, pretrained=pretrained, **FLAGS)
        stored = load_file(file)
        assert model.num_classes == 10 and model.training
        for name, value in model.state_dict().items():
            assert value.dtype in (torch.float32, torch.int64)
            assert torch.equal(value, stored[name].to(value))
        assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.rand(2, 1, 8, 8)).sum().backward()


@pytest.mark.parametrize("classes", [0, 3, 10])
def test_other_classes_get_a_new_classifier_and_the_rest_stays(shipped: Path, classes: int) -> None:
    model = sparsenet.create_model(NAME, num_classes=classes, pretrained=True, **FLAGS)
    stored, found = load_file(shipped), model.state_dict()
    assert model.num_classes == model.architecture.num_classes == classes
    stored |= {name: value[:classes] for name, value in stored.items() if "classifier" in name}
    same = {name for name in found if torch.equal(found[name], stored[name].to(found[name]))}
    of_classifier = {"classifier.weight", "classifier.bias"} if classes == 3 else set()
    assert found.keys() - same == of_classifier
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, classes or model.num_features)


def test_weights_of_greys_give_as_much_for_colours_that_are_grey(shipped: Path) -> None:
    grey = sparsenet.create_model(NAME, pretrained=True, **FLAGS).stem[0].weight
    colour = sparsenet.create_model(NAME, pretrained=True, in_chans=3).stem[0].weight
    assert colour.shape[1] == 3
    torch.testing.assert_close(colour.sum(1, keepdim=True), grey)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depth": 10}, "depth 7 instead of 10"),
        ({"growth_rate": 5}, r"growth_rate \(4,\) instead of \(5,\)"),
        ({"fetch": lambda i: [0]}, "fetch 'sparse' instead of"),
    ],
)
def test_weights_of_another_network_are_one_line(
    shipped: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(
        ValueError, match=f"^{NAME}: expected weights of this network, .*{expected}"
    ) as found:
        sparsenet.create_model(NAME, pretrained=True, **(FLAGS | changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "changes", [{"growth_rate": 4}, {"growth_rate": (4, 4, 4)}, {"fetch": "sparse:2"}]
)
def test_the_same_network_in_other_words_fits(shipped: Path, changes: dict[str, Any]) -> None:
    model = sparsenet.create_model(NAME, pretrained=True, dropout=0.1, **(FLAGS | changes))
    assert model.architecture.dropout == 0.1


def test_a_network_without_weights_is_told_those_that_have_some(shipped: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"a network that has weights \({NAME}\), found 'densenet121'"
    ):
        sparsenet.create_model("densenet121", pretrained=True)
    with pytest.raises(ValueError, match="expected a name such as sparsenet_7_4"):
        sparsenet.create_model("sparsenet_7_5", pretrained=True)


# --- from the network -----------------------------------------------------------------------------


@pytest.fixture
def server(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Serves the weights file; without TLS, which no test can have, hence the other scheme."""
    monkeypatch.setattr(addresses, "SCHEME", "http://")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Server(file.read_bytes())


def kept(tmp_path: Path) -> list[Path]:
    return [
        path
        for path in (tmp_path / "cache").rglob("*")
        if path.name != "weights" and path.name != "sparsenet"
    ]


def test_an_address_is_fetched_once(server: Server, file: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(server.content).hexdigest()
    with server.url() as url:
        for number, address in enumerate(
            (f"{url}a.safetensors", f"{url}a.safetensors#sha256={digest}"), 1
        ):
            for _ in range(2):
                model = sparsenet.create_model(
                    "sparsenet_40_12", depth=7, growth_rate=4, pretrained=address, **FLAGS
                )
                assert torch.equal(model.stem[0].weight, load_file(file)["stem.0.weight"].float())
            assert len(server.asked) == len(kept(tmp_path)) == number
        for path in kept(tmp_path):
            path.write_bytes(server.content[:-1])
        about = weights.load(file).about
        assert weights.load(address).about == about  # damaged meanwhile: downloaded again
    assert weights.load(address).about == about  # and a file in the cache is not asked for


@pytest.mark.parametrize("pinned", [False, True])
def test_flipped_bits_of_a_file_that_was_fetched_are_found(
    server: Server, file: Path, tmp_path: Path, pinned: bool
) -> None:
    with server.url() as url:
        digest = hashlib.sha256(server.content).hexdigest()
        address = f"{url}a.safetensors" + (f"#sha256={digest}" if pinned else "")
        for asked in (1, 2):
            loaded = weights.load(address)
            (path,) = kept(tmp_path)
            assert loaded.path == path and path.read_bytes() == server.content
            assert len(server.asked) == asked
            damaged = bytearray(server.content)
            damaged[-2] ^= 0x40  # a number that stays one
            path.write_bytes(damaged)
            assert load_file(path).keys() == load_file(file).keys()
    with pytest.raises(ValueError, match=f"^{re.escape(address)}: .*refused"):
        weights.load(address)
    assert kept(tmp_path) == []


def test_a_damaged_file_gives_way_to_what_the_address_has_now(
    server: Server, changed: Callable[..., Path], tmp_path: Path
) -> None:
    with server.url() as url:
        address = f"{url}a.safetensors"
        weights.load(address)
        (path,) = kept(tmp_path)
        server.content = changed(epoch=9).read_bytes()
        server.limit = len(server.content)
        assert weights.load(address).about.epoch == 2  # what was asked for once stays
        path.write_bytes(b"")
        assert weights.load(address).about.epoch == 9
    (path,) = kept(tmp_path)
    assert path.read_bytes() == server.content


def test_what_is_fetched_and_wrong_is_not_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server.content
    with server.url() as url:
        for content, limit, fragment, expected in (
            (whole, len(whole) - 9, "", rf"{len(whole) - 9} of {len(whole)} bytes"),
            (
                whole,
                len(whole),
                f"#sha256={64 * 'a'}",
                f"#sha256=a*: expected SHA256 {64 * 'a'} of .*, found [0-9a-f]{{64}}: deleted",
            ),
            (b"<html>", 6, "", "expected a safetensors file"),
            (b"", 0, "", "expected a weights file, found: HTTP Error 416"),
        ):
            server.content, server.limit = content, limit
            with pytest.raises(ValueError, match=expected) as found:
                load_trained(f"{url}a.safetensors{fragment}")
            assert str(found.value).startswith(url) and "\n" not in str(found.value)
            assert kept(tmp_path) == []
        server.content, server.limit = whole, len(whole)
        monkeypatch.setattr(addresses, "LIMIT", len(whole) - 1)
        with pytest.raises(ValueError, match="more than 0 MiB"):
            weights.load(f"{url}a.safetensors")
    with pytest.raises(ValueError, match=r"expected a weights file, found: .*refused"):
        weights.load(f"{url}a.safetensors")
    assert kept(tmp_path) == []


def test_a_server_that_does_not_say_how_much_comes_is_stopped_at_the_limit(tmp_path: Path) -> None:
    class Endless:
        status, headers, given = 200, dict[str, str](), 0

        def read1(self, size: int) -> bytes:
            self.given += size
            assert self.given <= 5 * 2**20
            return bytes(size)

    watch = downloads._Watch()
    with pytest.raises(OSError, match="more than 3 MiB"):
        downloads._append(Endless(), tmp_path / "file", 0, 3 * 2**20, watch)  # type: ignore[arg-type]


def test_a_redirection_stays_with_https() -> None:
    handler = downloads._Redirections()
    for start, end in (("https://a/x", "http://b/y"), ("https://a/x", "ftp://b/y")):
        with pytest.raises(OSError, match="not https"):
            handler.redirect_request(Request(start), None, 302, "", {}, end)  # type: ignore[arg-type]
    for start, end in (("https://a/x", "https://b/y"), ("http://a/x", "http://b/y")):
        followed = handler.redirect_request(Request(start), BytesIO(), 302, "", {}, end)  # type: ignore[arg-type]
        assert followed is not None and followed.full_url == end


# --- what comes with the package ------------------------------------------------------------------


def test_the_packages_weights_are_listed_small_and_in_the_wheel() -> None:
    found = {path.stem: path for path in weights.SHIPPED.glob("*.safetensors")}
    assert found.keys() == weights.shipped().keys()
    assert {path.name for path in weights.SHIPPED.iterdir()} == {
        "index.json",
        *(p.name for p in found.values()),
    }
    assert sum(path.stat().st_size for path in found.values()) <= 12e6
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["sparsenet"]
    package = weights.SHIPPED.parent
    inside = {path for pattern in packed for path in package.glob(pattern)}
    assert set(weights.SHIPPED.iterdir()) <= inside


def test_every_network_gets_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "download", None)  # offline
    for name in weights.shipped():
        about = weights.load_shipped(name).about
        model = sparsenet.create_model(name, in_chans=about.preprocessing.channels, pretrained=True)
        assert model.num_classes == len(about.classes)
        assert all(0 <= result.error < 100 for result in about.measured.values())
