"""Counts equal the published tables, and the modules that are built from the same architecture."""

import dataclasses
import json

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsenet.architecture import Architecture
from sparsenet.graph import count, graph
from sparsenet.model import SparseNet
from sparsenet.zoo import NETWORKS, architecture, image_size

# Parameters with 10 and with 100 classes, and multiply-accumulates at 32x32 with 10: computed from
# the papers' definitions; DenseNet's agree with arXiv:1608.06993, table 2.
CIFAR = {
    "sparsenet_40_12": (189_514, 193_924, 78_345_696),
    "sparsenet_40_24": (748_522, 757_252, 312_054_720),
    "sparsenet_100_24": (2_509_354, 2_522_404, 1_050_072_480),
    "sparsenet_100_36": (5_626_378, 5_645_908, 2_361_666_672),
    "sparsenet_22_16_32_64": (771_914, 789_284, 118_851_456),
    "sparsenet_100_16_32_64": (7_183_498, 7_218_148, 1_046_056_704),
    "sparsenet_bc_100_24": (1_450_234, 1_461_124, 640_992_432),
    "sparsenet_bc_100_16_32_64": (4_336_538, 4_365_428, 638_160_000),
    "sparsenet_bc_100_32_64_128": (17_282_090, 17_339_780, 2_550_864_128),
    "densenet_40_12": (1_059_298, 1_100_428, 282_917_328),
    "densenet_100_12": (7_083_538, 7_189_468, 1_816_743_408),
    "densenet_100_24": (28_071_706, 28_283_476, 7_265_623_008),
    "densenet_bc_100_12": (769_162, 800_032, 287_929_692),
}
# pytorchcv's sparsenets and torchvision's densenets
IMAGENET = {
    "sparsenet121": 3_250_824,
    "sparsenet161": 9_853_288,
    "sparsenet169": 4_709_864,
    "sparsenet201": 5_703_144,
    "sparsenet264": 7_717_224,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
}

ODD = [
    Architecture(
        fetch="harmonic", depth=22, growth_rate=5, bottleneck=True, in_chans=1, num_classes=7
    ),
    Architecture(fetch="windowed:2", depth=13, growth_rate=(3, 5, 7), reduction=0.3),
    Architecture(aggregation="sum", depth=22, growth_rate=(8, 16, 24)),
    Architecture(aggregation="sum", depth=22, growth_rate=8, bottleneck=True, fetch="dense"),
    Architecture(
        blocks=(2, 3), growth_rate=4, stem="imagenet", bottleneck=True, stem_width=6, num_classes=3
    ),
]


@pytest.mark.parametrize("name", CIFAR)
def test_the_published_table(name):
    small, large, macs = CIFAR[name]
    assert count(architecture(name)) == (small, macs)
    assert count(architecture(name, num_classes=100))[0] == large


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenet_networks(name):
    assert count(architecture(name), 224)[0] == IMAGENET[name]


def test_every_named_network_is_counted():
    for name in NETWORKS:
        assert min(count(architecture(name), image_size(name))) > 0


@pytest.mark.parametrize(
    "arch", [*ODD, architecture("sparsenet_bc_100_24"), architecture("densenet_40_12")]
)
@pytest.mark.parametrize("size", [16, 19])
def test_counts_are_those_of_the_modules(arch, size):
    with torch.device("meta"):
        model = SparseNet(arch, "reference").eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, arch.in_chans, size, size))
    parameters, macs = count(arch, size)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert 2 * macs == counter.get_total_flops()


def test_the_graph_follows_the_topology():
    arch = Architecture(depth=40, growth_rate=12)
    nodes = graph(arch, 32)
    for node in (node for node in nodes if node.kind == "layer"):
        assert node.sources == arch.stages[node.stage].topology.sources[node.index - 1]
    assert [node.shape for node in nodes if node.kind == "stem"] == [(24, 32, 32)]
    assert [node.kind for node in nodes][-1] == "classifier"
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize("arch", ODD)
def test_an_architecture_survives_json(arch):
    assert Architecture(**json.loads(json.dumps(arch.to_dict()))) == arch


def test_a_function_becomes_a_table():
    arch = Architecture(fetch=lambda i: [i - 1] + ([0] if i > 2 else []), depth=13)
    assert arch.fetch == ((0,), (1,), (2, 0), (3, 0))
    assert Architecture(**json.loads(json.dumps(arch.to_dict()))) == arch
    with pytest.raises(ValueError, match="expected sources for 5 layers"):
        dataclasses.replace(arch, depth=19)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": 41}, ["depth", "40 or 43", "41"]),
        ({"depth": 3}, ["depth", "7"]),
        ({"depth": 43, "bottleneck": True}, ["depth", "40 or 46"]),
        ({"blocks": (3, 3, 3), "depth": 22}, ["depth", "13", "22"]),
        ({"growth_rate": (1, 2)}, ["growth_rate", "(1, 2)"]),
        ({"growth_rate": 0}, ["growth_rate"]),
        ({"fetch": "exponential"}, ["fetch", "exponential"]),
        ({"fetch": lambda i: [i - 3]}, ["layer 1"]),
        ({"aggregation": "mean"}, ["aggregation", "mean"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"dropout": "0.1"}, ["dropout", "a number", "'0.1'"]),
        ({"reduction": None}, ["reduction", "a number", "None"]),
        ({"growth_rate": "x"}, ["growth_rate", "a whole number", "'x'"]),
        ({"growth_rate": 12.5}, ["growth_rate", "a whole number", "12.5"]),
        ({"growth_rate": (4, "8", 4)}, ["growth_rate", "a whole number", "'8'"]),
        ({"blocks": "6,12"}, ["blocks", "a whole number", "'6,12'"]),
        ({"depth": "40"}, ["depth", "a whole number", "'40'"]),
        ({"depth": 40.0}, ["depth", "a whole number", "40.0"]),
        ({"depth": True}, ["depth", "a whole number", "True"]),
        ({"num_classes": "10"}, ["num_classes", "a whole number", "'10'"]),
        ({"num_classes": -1}, ["num_classes", "-1"]),
        ({"in_chans": 3.5}, ["in_chans", "a whole number", "3.5"]),
        ({"bottleneck": "false"}, ["bottleneck", "True or False", "'false'"]),
        ({"fetch": None}, ["fetch", "None"]),
        ({"fetch": [1, 2]}, ["fetch", "list of sources", "[1, 2]"]),
        ({"fetch": lambda i: i - 1}, ["sequence", "layer 1", "found 0"]),
        ({"aggregation": "sum", "growth_rate": 8, "stem_width": 9}, ["stem_width"]),
    ],
)
def test_what_fits_no_network_is_named(settings, words):
    with pytest.raises(ValueError) as error:
        Architecture(**settings)
    assert all(word in str(error.value) for word in words)


def test_whole_numbers_of_numpy_are_whole_numbers():
    numbers = numpy.array([4, 8, 16])
    arch = Architecture(depth=numpy.int64(7), growth_rate=numbers)
    assert arch == Architecture(depth=7, growth_rate=(4, 8, 16))
    assert json.loads(json.dumps(arch.to_dict()))["depth"] == 7


def test_images_too_small_for_the_stages():
    with pytest.raises(ValueError, match="image_size: expected at least 4"):
        Architecture().sizes(3)
    assert Architecture().sizes(8) == (8, 4, 2)
