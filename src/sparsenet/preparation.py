"""What a run needs before its first step: data, device, and the settings that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparsenet import __version__
from sparsenet.arithmetic import Arithmetic, choose_arithmetic, explain
from sparsenet.config import RunConfig, recipe
from sparsenet.data.dataset import Dataset
from sparsenet.data.load import load_dataset
from sparsenet.data.preprocessing import Preprocessing, channel_statistics
from sparsenet.device import choose_device
from sparsenet.graph import Node, graph, totals
from sparsenet.memory import free_memory
from sparsenet.ops import dispatch


@dataclass(frozen=True)
class Setup:
    """What stays the same while a run goes on."""

    config: RunConfig  # with the channels and classes of the data
    data: Dataset
    preprocessing: Preprocessing
    device: torch.device
    arithmetic: Arithmetic

    @cached_property
    def nodes(self) -> list[Node]:
        """The pieces of the network."""
        return graph(self.config.network, self.preprocessing.size)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its weights."""
        return {
            "sparsenet": __version__,
            "architecture": self.config.network.to_dict(),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "classes": list(self.data.classes),
            "dataset": self.data.name,
            "recipe": recipe(self.config),
        }


def prepare(config: RunConfig, previous: Arithmetic) -> Setup:
    """Loads the data and decides what only the data and the device can say.

    *previous* is the arithmetic of a run that is resumed. Raises ``ValueError`` in one line where
    settings do not fit the data or the device.
    """
    device = choose_device(config.train.device)
    if config.train.implementation != "auto":  # refused before the data is loaded
        dispatch.choose(config.train.implementation, device)
    data = load_dataset(config.data)
    if config.train.batch_size > len(data.train):
        raise ValueError(
            f"--batch_size: expected at most the {len(data.train)} training images, "
            f"found {config.train.batch_size}; --batch_size {max(len(data.train) // 4, 1)} fits"
        )
    channels, size = data.train.pixels.shape[1], data.train.pixels.shape[-1]
    network = dataclasses.replace(config.network, in_chans=channels, num_classes=len(data.classes))
    config = dataclasses.replace(config, network=network)
    _check_sizes(config, size)
    mean, std = channel_statistics(data.train)
    preprocessing = Preprocessing(size, channels, mean, std)
    arithmetic = choose_arithmetic(config.train, device, previous)
    return Setup(config, _on_device(data, device), preprocessing, device, arithmetic)


def _check_sizes(config: RunConfig, size: int) -> None:
    config.network.sizes(size)
    for flag, largest in (("shift", size - 1), ("cutout", size), ("first_size", size)):
        value = getattr(config.data, flag)
        if value > largest:
            raise ValueError(
                f"--{flag}: expected at most {largest} for images of {size} pixels a side, "
                f"found {value}"
            )
    if config.data.first_size:
        try:
            config.network.sizes(config.data.first_size)
        except ValueError as error:
            raise ValueError(str(error).replace("image_size", "--first_size")) from None


def _on_device(data: Dataset, device: torch.device) -> Dataset:
    """The dataset on the device where its pixels fill at most half of what is free there."""
    free = None if device.type == "cpu" else free_memory(device)
    return data.to(device) if free is not None and data.nbytes <= free // 2 else data


def introduce(setup: Setup, previous: Arithmetic) -> Iterator[str]:
    """Lines for the user that say what is trained on what, and how."""
    data, nodes = setup.data, setup.nodes
    validation = f", {len(data.val)} validation" if data.val else ""
    yield (
        f"{data.name}: {len(data.train)} training{validation} and {len(data.test)} test images, "
        f"{len(data.classes)} classes, {tuple(data.train.pixels.shape[1:])}"
    )
    if data.skipped:
        yield f"skipped {len(data.skipped)} corrupt images, the first: {data.skipped[0]}"
    network = setup.config.network
    parameters, macs = totals(nodes)
    yield (
        f"{network.fetch if isinstance(network.fetch, str) else 'custom'} network, "
        f"{network.stage_depths} layers, growth {network.growth_rates}: "
        f"{parameters:,} parameters, {macs:,} MACs"
    )
    settings = setup.config.train
    yield from explain(setup.arithmetic, settings, setup.device, previous)
