"""docs/scaling.md: its counts are those of the modules, its tables those of the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.scaling import (
    ETHERNET,
    NETWORKS,
    NVLINK,
    Cluster,
    Device,
    Link,
    all_reduce,
    ring,
    tables,
    traffic,
    tree,
)
from sparsenet.model import SparseNet
from sparsenet.zoo import architecture

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def test_the_page_shows_what_is_computed() -> None:
    page = PAGE.read_text()
    for table in tables():  # if it fails: python -m benchmarks.scaling
        assert table.strip() in page


@pytest.mark.parametrize("name", NETWORKS.values())
def test_what_is_sent_is_counted_from_the_modules(name: str) -> None:
    with torch.device("meta"):
        model = SparseNet(architecture(name))
    state = model.state_dict()
    counted = traffic(architecture(name))
    means = [tensor for key, tensor in state.items() if key.endswith("running_mean")]
    assert (counted.features, counted.channels) == (len(means), sum(map(len, means)))
    assert counted.statistics == 4 * sum(2 * (2 * len(mean) + 1) for mean in means)
    # A reader has a scale for each channel that it reads, and nothing else here is a vector.
    scales = [p for key, p in model.named_parameters() if key.endswith("weight") and p.dim() == 1]
    assert (counted.readers, counted.read_channels) == (len(scales), sum(map(len, scales)))
    assert counted.gradients == 4 * sum(p.numel() for p in model.parameters())


def test_a_feature_of_sparsenet_100_24_has_four_readers() -> None:
    counted = traffic(architecture("sparsenet_100_24"))
    assert counted.reads / counted.features == pytest.approx(4.27, abs=0.005)
    assert counted.read_channels / counted.channels == pytest.approx(4.45, abs=0.005)
    assert counted.sync_batch_norm / counted.statistics == pytest.approx(4.37, abs=0.005)
    assert counted.reductions == 198


@pytest.mark.parametrize("algorithm", [ring, tree, all_reduce])
@pytest.mark.parametrize("link", [ETHERNET, NVLINK])
def test_sums_of_many_devices_need_their_time(
    algorithm: Callable[[float, int, Link], float], link: Link
) -> None:
    assert algorithm(1e6, 1, link) == 0
    for devices in (2, 3, 8, 1000):
        seconds = algorithm(1e6, devices, link)
        # Every device sends and receives all but its own share; news takes a hop for each doubling.
        assert seconds >= 2 * (devices - 1) / devices * 1e6 / link.bandwidth
        assert seconds >= math.ceil(math.log2(devices)) * link.hop
        assert algorithm(2e6, devices, link) < 2 * seconds
    free = Link("without latency", 0.0, 1e9)
    assert ring(1e6, 8, free) == pytest.approx(2 * 7 / 8 * 1e-3)
    assert tree(1e6, 8, free) == pytest.approx(2e-3)
    assert all_reduce(1e6, 8, free) == ring(1e6, 8, free)
    assert all_reduce(8.0, 1024, link) == tree(8.0, 1024, link)


def test_devices_that_wait_for_nothing_are_fully_used() -> None:
    network, device = traffic(architecture("sparsenet_100_24")), Device("any", 50.0)
    ideal = Link("ideal", 0.0, math.inf)
    assert Cluster(device, ideal, 8).efficiency(network, 64, True) == pytest.approx(1)
    assert Cluster(device, ideal, 3).step(network, 64, True) == pytest.approx(22e-3)  # of 64 images
    for synchronised in (False, True):
        assert Cluster(device, ETHERNET, 1).step(network, 64, synchronised) == pytest.approx(64e-3)
        shares = [
            Cluster(device, ETHERNET, 2**k).efficiency(network, 1024, synchronised)
            for k in range(11)
        ]
        assert shares == sorted(shares, reverse=True)
