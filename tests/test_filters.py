"""What a network learned to read: each weight stands at its link, and nothing where no link is."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image

from sparsenet import Architecture, SparseNet
from sparsenet.pictures.filters import COLOURS, NO_LINK, draw_filters, link_weights

NETWORKS = {
    "sparse": Architecture(depth=40, growth_rate=3),
    "dense": Architecture(fetch="dense", depth=22, growth_rate=(2, 3, 4)),
    "bottleneck": Architecture(fetch="dense", depth=22, growth_rate=3, bottleneck=True),
    "own topology": Architecture(
        fetch=lambda i: [0, i - 1] if i > 1 else [0], blocks=(2, 4, 1, 3), growth_rate=2
    ),
    "imagenet": Architecture(
        fetch="harmonic", blocks=(3, 5), growth_rate=2, bottleneck=True, stem="imagenet"
    ),
}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> SparseNet:
    torch.manual_seed(0)
    return SparseNet(NETWORKS[request.param]).double().eval()


def readers(model, number):
    """The norm and the first weight of each layer, and of what reads the stage output."""
    stage = model.stages[number]
    last = model.transitions[number].conv if number < len(model.transitions) else model.classifier
    return [
        *((layer[0].norm, layer[0].conv.weight) for layer in stage.layers),
        (stage.norm, last.weight),
    ]


def constant(stage: int, reader: int, source: int) -> float:
    return 1 + stage + reader / 64 + source / 4096


def test_every_link_has_its_weight_and_nothing_else_has_one(model: SparseNet) -> None:
    """Weights have either sign and one size for each link, which lies where the widths say."""
    for number, stage in enumerate(model.stages):
        # The last unit of each layer makes its feature.
        features = stage.statistics[:: len(stage.layers[0])]
        sources = model.architecture.stages[number].topology.sources
        for reader, (read, (_, weight)) in enumerate(
            zip(sources, readers(model, number), strict=True), start=1
        ):
            sizes = [
                torch.full_like(features[j].running_mean, constant(number, reader, j)) for j in read
            ]
            size = torch.cat(sizes).view(1, -1, *[1] * (weight.ndim - 2))
            weight.data.copy_(size * weight.sign())
    for number, weights in enumerate(link_weights(model)):
        sources = model.architecture.stages[number].topology.sources
        assert weights.shape == (len(sources), len(sources))
        for reader, read in enumerate(sources, start=1):
            for source, value in enumerate(weights[:, reader - 1].tolist()):
                expected = constant(number, reader, source) if source in read else float("nan")
                assert value == pytest.approx(expected, nan_ok=True, rel=1e-12)


def test_equal_networks_have_equal_values(model: SparseNet) -> None:
    """ReLU lets a factor pass: scale and shift times what weights are divided by change nothing."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    logits, weights = model(images), link_weights(model)
    for number in range(len(model.stages)):
        for norm, weight in readers(model, number):
            factor = 0.5 + torch.rand_like(norm.weight)
            norm.weight.data.mul_(factor)
            norm.bias.data.mul_(factor)
            weight.data.div_(factor.view(1, -1, *[1] * (weight.ndim - 2)))
    torch.testing.assert_close(model(images), logits)
    torch.testing.assert_close(link_weights(model), weights, equal_nan=True)


def test_a_network_without_classifier_has_no_reader_of_its_output() -> None:
    *_, last = link_weights(SparseNet(Architecture(depth=13, growth_rate=2, num_classes=0)))
    assert last[:, -1].isnan().all()
    assert not last[0, 0].isnan()


def test_a_network_that_sums_is_refused_in_one_line(tmp_path: Path) -> None:
    model = SparseNet(Architecture(aggregation="sum", depth=10, growth_rate=2))
    with pytest.raises(
        ValueError,
        match=r"^filters: expected a network that concatenates, found aggregation 'sum'.*$",
    ):
        draw_filters(model, tmp_path / "filters.png")
    assert not list(tmp_path.iterdir())


def colours(file: Path) -> set[tuple[int, ...]]:
    """The colours that fill cells: more pixels than a letter or a shade of the bar has."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        return {colour for count, colour in image.convert("RGB").getcolors(1 << 24) if count >= 100}


@pytest.mark.parametrize("fetch", ["sparse", "dense"])
@pytest.mark.parametrize("depth", [40, 100])
def test_a_picture_tells_no_link_from_no_weight(tmp_path: Path, fetch: str, depth: int) -> None:
    shades = matplotlib.colormaps[COLOURS]([0.0, 1.0])[:, :3]
    weakest, strongest = (tuple(shade) for shade in (255 * shades).round().tolist())
    no_link = tuple(bytes.fromhex(NO_LINK[1:]))
    model = SparseNet(Architecture(fetch=fetch, depth=depth, growth_rate=1))
    draw_filters(model, tmp_path / "new.png", "costs $5 to $10")
    for parameter in model.parameters():
        parameter.data.zero_()
    draw_filters(model, tmp_path / "zero.png")
    new, zero = colours(tmp_path / "new.png"), colours(tmp_path / "zero.png")
    assert strongest in new - zero
    assert weakest in zero - new
    assert (no_link in new) == (no_link in zero) == (fetch == "sparse")


def test_networks_of_one_stage_and_of_many(tmp_path: Path) -> None:
    for blocks in ((2,), (1, 2, 3, 2)):
        draw_filters(
            SparseNet(Architecture(blocks=blocks, growth_rate=2)),
            tmp_path / "filters.png",
            "a title",
        )
        assert len(colours(tmp_path / "filters.png")) > 3
