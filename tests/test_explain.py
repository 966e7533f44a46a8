"""Why a network answers as it does: what is said adds up, and lies where it is drawn."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, write_image
from PIL import Image
from torch import Tensor, nn

from sparsenet import predict
from sparsenet.architecture import Architecture
from sparsenet.data.config import DataConfig
from sparsenet.data.folder import read_folder
from sparsenet.explain import explain, grid, heat_map_png, heat_maps
from sparsenet.model import SparseNet
from sparsenet.pictures.heat_map import overlay

NETWORKS = {
    "sparse": {"depth": 10, "growth_rate": 4},
    "dense": {"depth": 10, "growth_rate": 4, "fetch": "dense"},
    "bottleneck": {"depth": 16, "growth_rate": 4, "bottleneck": True},
    "sum": {"depth": 16, "growth_rate": 8, "aggregation": "sum"},
    "imagenet": {"blocks": (2, 3), "growth_rate": 4, "stem": "imagenet"},
    "grey": {"depth": 10, "growth_rate": 4, "in_chans": 1},
    "many": {"depth": 10, "growth_rate": 4, "in_chans": 5},
}


def network(name: str, **changes: object) -> SparseNet:
    """One of ``NETWORKS`` with statistics and biases as training leaves them."""
    torch.manual_seed(0)
    settings = {"num_classes": 7, **NETWORKS[name], **changes}
    model = SparseNet(Architecture(**settings), "reference")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_mean_of_a_map_and_the_bias_are_the_logit(name: str) -> None:
    model = network(name).double()
    images = torch.randn(3, model.architecture.in_chans, 25, 33, dtype=torch.float64)
    classes = torch.tensor([6, 0, 3])
    maps = heat_maps(model, images, classes)
    logits = model(images)[range(3), classes]
    made = maps.mean((1, 2)) + model.classifier.bias[classes]
    assert maps.shape[1:] == model.forward_features(images).shape[2:]
    assert (made - logits).abs().max() < 1e-10


def scene(name: str) -> tuple[SparseNet, Tensor, Tensor]:
    model = network(name).double()
    images = torch.randn(2, model.architecture.in_chans, 17, 25, dtype=torch.float64)
    return model, images, torch.tensor([6, 2])


@pytest.mark.parametrize("name", NETWORKS)
def test_shares_of_what_the_classifier_reads_add_up_to_the_logit(name: str) -> None:
    model, images, classes = scene(name)
    logits = model(images)[range(2), classes].tolist()
    read = model.architecture.stages[-1].topology.sources[-1]
    found = explain(model, images, classes)
    for each, logit, heat_map in zip(found, logits, heat_maps(model, images, classes), strict=True):
        assert tuple(each.shares) == read
        assert each.bias + each.shift + sum(each.shares.values()) == pytest.approx(logit, abs=1e-10)
        assert each.logit == pytest.approx(logit, abs=1e-10)
        assert torch.equal(each.heat_map, heat_map)
        assert bool(each.shift) == (name == "sum")


def test_a_model_in_training_is_refused() -> None:
    model, images, classes = scene("sparse")
    with pytest.raises(ValueError, match="expected one in evaluation mode"):
        explain(model.train(), images, classes)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="expected a Linear layer"):
        heat_maps(model.eval(), images, classes)


def without(model: SparseNet, stage: int, layers: list[int], images: Tensor) -> Tensor:
    """The logits where hooks replace the outputs of *layers* (0: what the stage reads)."""
    layout, handles = model.architecture.stages[stage], []
    for layer in layers:
        statistics = model.stages[stage].statistics
        mean = statistics[len(layout.branch) * layer].running_mean.view(-1, 1, 1)
        if layout.aggregation == "sum":
            mean = torch.zeros_like(mean)

        def replace(*call: object, mean: Tensor = mean) -> Tensor:
            return mean.expand_as(call[-1])

        before = model.transitions[stage - 1] if stage else model.stem
        module = model.stages[stage].layers[layer - 1][-1] if layer else before
        handles.append(module.register_forward_hook(replace))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", ["sparse", "bottleneck", "sum", "imagenet"])
@pytest.mark.filterwarnings("ignore:sparsenet")  # modules with hooks are called
def test_without_a_layer_the_logit_is_what_was_told(name: str) -> None:
    model, images, classes = scene(name)
    logits = model(images)[range(2), classes]
    found = explain(model, images, classes)
    for number, stage in enumerate(model.architecture.stages):
        layers = range(stage.topology.depth + 1)
        for removed in [[layer] for layer in layers] + [list(layers)[1:]]:
            fall = logits - without(model, number, removed, images)[range(2), classes]
            for each, expected in zip(found, fall.tolist(), strict=True):
                told = each.stages[number]
                value = told.together if removed == list(layers)[1:] else told.layers[removed[0]]
                assert value == pytest.approx(expected, abs=1e-10)


def reach(model: SparseNet, row: int, column: int, size: int) -> tuple[float, float]:
    """The centre of the pixels that a cell of the map looks at, where all of them count alike."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.ones_(model.classifier.weight)
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):  # of which each pixel may be the largest
            module.forward = nn.AvgPool2d(3, 2, 1, count_include_pad=False).forward
    image = torch.ones(1, 3, size, size, requires_grad=True)
    model.forward_features(image)[0, :, row, column].sum().backward()
    assert image.grad is not None
    weight = image.grad.sum((0, 1)).double()
    places = torch.arange(size) + 0.5
    total = weight.sum()
    return ((weight.sum(1) * places).sum() / total).item(), (
        (weight.sum(0) * places).sum() / total
    ).item()


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_cell_lies_where_it_looks(stem: str) -> None:
    sizes = {"cifar": (66, 6, 9), "imagenet": (259, 15, 17)}
    size, row, column = sizes[stem]
    model = SparseNet(Architecture(blocks=(1, 1, 1) if stem == "cifar" else (1, 1), stem=stem))
    first, step, whole = grid(model.eval(), size)
    assert whole == size
    expected = [first + step * (cell + 0.5) for cell in (row, column)]
    assert reach(model, row, column, size) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("implementation", ["reference", "shared", "native"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_implementation_and_precision(implementation: str, precision: torch.dtype) -> None:
    exact = network("sparse")
    images, classes = torch.randn(3, 3, 16, 16), torch.tensor([1, 5, 0])
    truth = heat_maps(exact.double(), images.double(), classes)
    exact.float()
    model = SparseNet(exact.architecture, implementation).eval()
    model.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        maps = heat_maps(model, images, classes)
        found = explain(model, images, classes)
    assert maps.dtype == torch.float32
    # The features of three stages of three layers are each rounded once or twice.
    tolerance = 20 * torch.finfo(precision).eps * truth.abs().max().item()
    assert (maps - truth).abs().max() < tolerance
    for each, heat_map in zip(found, maps, strict=True):
        assert each.logit == pytest.approx(each.bias + heat_map.mean().item(), abs=1e-5)


def test_a_heat_map_is_drawn_over_its_picture() -> None:
    model = network("sparse")
    heat_map = torch.zeros(8, 8)
    heat_map[2, 5], heat_map[6, 1] = 1, -1
    picture = np.full((3, 48, 80), 128, np.uint8)  # of which the square from column 16 on is seen
    content = heat_map_png(picture, heat_map, model, 32)
    drawn = np.asarray(Image.open(io.BytesIO(content)))
    times = drawn.shape[0] // 48
    assert drawn.shape == (48 * times, 80 * times, 3)
    cell = 48 * times / 8  # pixels
    orange = drawn[..., 0].astype(int) - drawn[..., 2]
    for sign, row, column in ((1, 2.5, 5.5), (-1, 6.5, 1.5)):
        strongest = np.unravel_index(np.argmax(sign * orange), orange.shape)
        assert strongest[0] == pytest.approx(row * cell, abs=1)
        assert strongest[1] == pytest.approx(column * cell + 16 * times, abs=1)
    cropped = drawn[:, : 16 * times]
    assert (cropped > 128).all() and (np.ptp(cropped, axis=2) == 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 1, 700), (3, 2000, 50), (1, 33, 32)])
def test_pictures_of_any_shape_have_one(shape: tuple[int, ...]) -> None:
    model = network("sparse")
    drawn = overlay(np.zeros(shape, np.uint8), np.ones((8, 8)), grid(model, 32))
    height, width = drawn.shape[:2]
    assert 256 <= max(height, width) <= 1024
    side = min(height, width)  # of the square that is seen
    coloured = (np.ptp(drawn, axis=2) > 0).sum()
    assert coloured == pytest.approx(side**2, abs=2 * side)  # its edges lie within pixels
    assert (overlay(np.zeros(shape, np.uint8), np.zeros((8, 8)), grid(model, 32)) < 256).all()


def explained(call: Call, run: Path, *arguments: object) -> list[dict[str, object]]:
    outcome = call("predict", run, *arguments, "--explain", "--json")
    assert outcome.code == 0, outcome
    return [each["explanation"] for each in json.loads(outcome.out)]


def test_what_is_explained_is_told_and_drawn_beside_the_picture(
    call: Call, trained_on_folder: Path
) -> None:
    for name, seed in (("a.png", 1), ("a.bmp", 2)):
        write_image(Path("photos", name), seed, 20)
    outcome = call("predict", trained_on_folder, "photos", "--explain")
    assert outcome.code == 0, outcome
    assert [line.split()[0] for line in outcome.lines[:6]] == [
        "photos/a.bmp:",
        "logit",
        "without",
        "without",
        "heat",
        "photos/a.png:",
    ]
    written = {name: Path(f"photos/{name}.explained.png") for name in ("a.bmp", "a.png")}
    before = {name: path.read_bytes() for name, path in written.items()}
    with Image.open(written["a.png"]) as drawn:
        assert drawn.width > 500
    # What was drawn is no picture to be classified, explained or trained on.
    told = explained(call, trained_on_folder, *sorted(map(str, Path("photos").iterdir())))
    assert [each["heat_map"] for each in told] == [str(path) for path in written.values()]
    assert {name: path.read_bytes() for name, path in written.items()} == before
    assert len(list(Path("photos").iterdir())) == 4
    for each in told:
        terms = each["bias"], each["shift"], *each["shares"].values()
        assert sum(terms) == pytest.approx(each["logit"])
        assert [len(stage["layers"]) for stage in each["without"]] == [1, 1, 1]
    only = call("predict", trained_on_folder, written["a.png"])
    assert only.code == 0 and only.out.startswith(str(written["a.png"]))


def test_nobody_trains_on_what_was_drawn(folder_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder_data, tmp_path / "data")
    drawn = data / "ant" / "0.png.explained.png"
    shutil.copy(data / "ant" / "0.png", drawn)
    source = read_folder(data, DataConfig())
    assert sum(map(len, source.splits.values())) == 12
    assert any(str(drawn) in note for note in source.notes)


def test_no_file_of_somebody_else_is_replaced(call: Call, trained_on_folder: Path) -> None:
    for place, seed in (("one", 1), ("two", 2)):
        write_image(Path(place, "a.png"), seed, 20)
    Path("out").mkdir()
    theirs = {
        "a.png.explained.png": write_image(Path("out/a.png.explained.png"), 7),
        "a.png-2.explained.png": Path("out/a.png-2.explained.png"),
    }
    theirs["a.png-2.explained.png"].symlink_to(Path("one/a.png").absolute())
    before = [path.read_bytes() for path in theirs.values()]
    expected = ["out/a.png-3.explained.png", "out/a.png-4.explained.png"]
    for order in (("one", "two"), ("two", "one")):
        told = explained(call, trained_on_folder, *order, "--explain_dir", "out")
        names = [each["heat_map"] for each in told]
        assert names == (expected if order[0] == "one" else expected[::-1])
    assert [path.read_bytes() for path in theirs.values()] == before
    assert theirs["a.png-2.explained.png"].is_symlink()


def refuse(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[Path], bool]) -> None:
    original = Path.open

    def opened(path: Path, mode: str = "r", *rest: object, **more: object) -> object:
        if "x" in mode and is_refused(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)


def test_where_the_folder_cannot_be_written_the_current_one_is_taken(
    call: Call, trained_on_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(Path("locked/a.png"), 1, 20)
    refuse(monkeypatch, lambda path: "locked" in path.parts)
    (told,) = explained(call, trained_on_folder, "locked/a.png")
    assert told["heat_map"] == "a.png.explained.png" and Path("a.png.explained.png").is_file()
    refuse(monkeypatch, lambda path: True)
    outcome = call("predict", trained_on_folder, "locked/a.png", "--explain")
    assert outcome.code == 1 and outcome.out.startswith("locked/a.png: ")
    assert "its heat map was not written" in outcome.error
    outcome = call("predict", trained_on_folder, "locked/a.png", "--explain_dir", "locked/a.png")
    assert outcome.code == 2 and "--explain_dir: expected a folder" in outcome.error


def test_another_picture_of_that_name_is_not_drawn_over(
    call: Call, trained_on_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(Path("a.png"), 1, 20)
    original = predict.file_content

    def changed(example: predict.Example) -> bytes | np.ndarray:
        write_image(Path("a.png"), 2, 20)
        return original(example)

    monkeypatch.setattr(predict, "file_content", changed)
    outcome = call("predict", trained_on_folder, "a.png", "--explain")
    assert outcome.code == 1
    assert "changed while it was read" in outcome.error
