"""Pictures: they come out for any data, show every link, and touch nothing outside."""

from __future__ import annotations

import re
from math import cos, pi
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from sparsenet.architecture import Architecture
from sparsenet.data.dataset import Images
from sparsenet.graph import graph
from sparsenet.pictures import (
    draw_confusion,
    draw_curves,
    draw_errors,
    draw_graph,
    draw_samples,
    figure,
    training,
)
from sparsenet.pictures.figure import drawable, escaped, shorten
from sparsenet.results import EpochMetrics
from sparsenet.summary import MeasuredRun, RunSummary


def is_picture(file: Path) -> bool:
    with Image.open(file) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    return colours is not None and len(colours) > 3


def train(epochs: int, drop: bool = True, test_every: int = 1) -> list[EpochMetrics]:
    rows = []
    for epoch in range(1, epochs + 1):
        rate = 0.1 * (1 + cos(pi * epoch / epochs))
        if drop:
            rate = 0.1 if epoch <= epochs / 2 else 0.01
        tested = epoch % test_every == 0
        rows.append(
            EpochMetrics(
                epoch=epoch,
                step=10 * epoch,
                lr=rate,
                train_loss=1 / epoch,
                train_error=90 / epoch,
                test_loss=2.0 if tested else None,
                test_error=95 / epoch if tested else None,
            )
        )
    return rows


RUNS = {
    "none": [],
    "one": train(1),
    "step": train(12),
    "smooth": train(5, drop=False),
    "long": train(300, test_every=10),
    "perfect": [EpochMetrics(epoch=1, step=1, lr=0.1, val_error=0.0)],
}


@pytest.mark.parametrize("rows", RUNS.values(), ids=RUNS)
def test_curves_of_any_run(tmp_path: Path, rows: list[EpochMetrics]) -> None:
    draw_curves(rows, tmp_path / "curves.png", "a run that costs $5 to $10")
    assert is_picture(tmp_path / "curves.png")


def test_curves_name_the_error_of_the_epoch_whose_weights_are_kept() -> None:
    errors = {1: 40.0, 2: 20.0, 3: 30.0}
    rows = [
        EpochMetrics(epoch=epoch, step=epoch, lr=0.1, test_error=error)
        for epoch, error in errors.items()
    ]
    for chosen, epoch, when in ((2, 2, "\nepoch 2"), (3, 3, ""), (0, 3, ""), (7, 3, "")):
        axis = Figure().subplots()
        training._annotate_error(axis, rows, training.SPLITS, chosen)
        assert [text.get_text() for text in axis.texts] == [f"test\n{errors[epoch]:.2f} %{when}"]
        assert axis.lines[0].get_xydata().tolist() == [[epoch, errors[epoch]]]


def test_errors_of_any_runs(tmp_path: Path) -> None:
    unknown = dict.fromkeys(RunSummary.__annotations__)
    rows = []
    for name, metrics in RUNS.items():
        runs = [MeasuredRun(Path(f"{name} $5"), seed, 5.0, tuple(metrics)) for seed in (0, 1)]
        rows.append(RunSummary(**unknown | {"runs": tuple(runs)}))  # type: ignore[arg-type]
    draw_errors(rows, tmp_path / "errors.png")
    assert is_picture(tmp_path / "errors.png")
    draw_errors(rows[1:2], tmp_path / "one.png")
    assert is_picture(tmp_path / "one.png")


@pytest.mark.parametrize("classes", [1, 2, 10, 21, 100, 150, 20_000])
def test_confusion_of_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    labels = torch.arange(classes - 1).repeat(2)  # no image of the last class
    predicted = labels.clone()
    predicted[:1] = classes - 1
    names = ["$x^2$ and a very long name", "犬", *map(str, range(classes))][:classes]
    draw_confusion(labels, predicted, names, tmp_path / "confusion.png")
    assert is_picture(tmp_path / "confusion.png")


def test_many_classes_share_the_rows_of_a_confusion_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "SQUARES", 10)
    labels, diagonal = torch.arange(95), 100 * torch.eye(10).double()
    for shift, expected in ((0, diagonal), (50, diagonal.roll(5, 1))):
        counts, shared = training._counts(labels, (labels + shift) % 100, 100)
        assert shared == 10 and torch.equal(training._percent(counts), expected)
    counts, shared = training._counts(labels[:10], labels[:10], 10)
    assert shared == 1 and torch.equal(training._percent(counts), diagonal)


@pytest.mark.parametrize(("channels", "wrong"), [(1, 3), (3, 40), (3, 0)])
def test_samples(tmp_path: Path, channels: int, wrong: int) -> None:
    labels = torch.arange(50) % 2
    predicted = torch.where(torch.arange(50) < wrong, 1 - labels, labels)
    pixels = torch.randint(0, 256, (50, channels, 8, 8), dtype=torch.uint8)
    images = Images(pixels, labels)
    draw_samples(images, predicted, torch.rand(50), ["$a", "b" * 40], tmp_path / "samples.png")
    assert is_picture(tmp_path / "samples.png")


def test_a_name_without_a_font_is_a_number_and_nothing_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    font_manager.findfont(font_manager.FontProperties())  # the usual font, once and for all
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])  # there is no other
    figure._fonts.cache_clear()
    names = ["cat", "猫", "é", "고양이", "two\nlines", "half \udce9"]
    assert drawable(names) == ["cat", "#1", "é", "#3", "#4", "#5"]
    assert escaped("r\udce9 of 猫") == r"r\udce9 of \u732b"
    labels = torch.arange(6)
    draw_confusion(labels, labels, names, tmp_path / "numbered.png")
    draw_confusion(labels, labels, list("abcdef"), tmp_path / "plain.png")
    pixels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    images = Images(pixels, labels)
    draw_samples(images, labels.flip(0), torch.rand(6), names, tmp_path / "samples.png", names)
    draw_curves(train(3), tmp_path / "curves.png", "half \udce9 of 猫")
    assert all(is_picture(file) for file in tmp_path.iterdir())
    figure._fonts.cache_clear()


def test_an_installed_font_is_taken_for_what_the_usual_one_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_mathematics = [
        font for font in font_manager.fontManager.ttflist if font.name in ("cmex10", "STIXGeneral")
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", of_mathematics)
    figure._fonts.cache_clear()
    letter = "\U0001d49c"  # a script capital
    usual = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    assert not usual.get_char_index(ord(letter))
    assert figure._fonts(frozenset(letter + "猫")) == (("STIXGeneral",), frozenset("猫"))
    assert drawable([letter, "猫"]) == [letter, "#1"]
    figure._fonts.cache_clear()


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    assert shorten("photos_of_animals_cow", 12) == "photos_…_cow"
    assert shorten("twelve signs", 12) == "twelve signs"


def test_the_callers_own_plots_keep_their_look(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_curves(train(3), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("fetch", ["sparse", "dense", "harmonic", "windowed:3"])
@pytest.mark.parametrize("depth", [7, 40, 100])
def test_the_graph_has_an_arc_for_every_link(tmp_path: Path, fetch: str, depth: int) -> None:
    architecture = Architecture(depth=depth, fetch=fetch)
    draw_graph(graph(architecture), tmp_path / "graph.svg", '<&"> a name')
    text = (tmp_path / "graph.svg").read_text()
    drawing = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f".//{space}path")) == sum(
        stage.topology.edges for stage in architecture.stages
    )
    assert len(drawing.findall(f".//{space}circle")) == sum(architecture.stage_depths)
    assert drawing.get("aria-label") == '<&"> a name'
    assert not re.search("https?://(?!www.w3.org/2000/svg)", text)


def test_pointing_at_a_layer_tells_its_sources(tmp_path: Path) -> None:
    draw_graph(graph(Architecture(depth=40)), tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert "<title>stages.0.layers.4 reads 4, 3, 1, makes 12×32×32: 3,960 parameters" in text
    assert "189,514 parameters" in text


@pytest.mark.parametrize("fetch", ["sparse", "dense"])
def test_a_thousand_layers_stay_a_small_file(tmp_path: Path, fetch: str) -> None:
    draw_graph(graph(Architecture(depth=1000, growth_rate=2, fetch=fetch)), tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert len(text) < 2**20
    assert "links of one layer in" in text
