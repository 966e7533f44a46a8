"""Why a network answers as it does: what is said adds up, and lies where it is drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sparsenet.architecture import Architecture
from sparsenet.explain import heat_map_png, heat_maps
from sparsenet.model import SparseNet

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
