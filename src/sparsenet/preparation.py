"""What a run needs before its first step: data, device, and the settings that follow from them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from sparsenet import __version__
from sparsenet.arithmetic import Arithmetic, choose_arithmetic, describe_choice
from sparsenet.config import RunConfig, TrainConfig, recipe
from sparsenet.data.dataset import Dataset
from sparsenet.data.errors import shortened, unreadable
from sparsenet.data.identity import in_order, record
from sparsenet.data.load import loading_dataset, reporting
from sparsenet.data.preprocessing import ChannelStatistics, Preprocessing, measuring_channels
from sparsenet.data.sampling import batch_ends
from sparsenet.device import choose_device
from sparsenet.events import Message, Reading
from sparsenet.graph import Node, graph, totals
from sparsenet.memory import free_memory, total_memory
from sparsenet.ops import dispatch
from sparsenet.presets import describe_recipe
from sparsenet.ranks import ALONE, Ranks
from sparsenet.weights import Description

BATCH_SIZE = 64  # the paper's
EPOCHS, EPOCHS_OF = 30, 50_000  # so many by default of so many images
FEWEST_EPOCHS, MOST_EPOCHS = 10, 400  # that the number of images can come to
SMALL_BATCH = 32  # images of a process, for which statistics are in common by default


@dataclass(frozen=True)
class Setup:
    """What stays the same while a run goes on."""

    asked: RunConfig  # what the data decide is still open
    config: RunConfig  # with the network, the batch size and the epochs that they decided
    data: Dataset
    preprocessing: Preprocessing
    device: torch.device
    arithmetic: Arithmetic
    ranks: Ranks = ALONE

    @property
    def synchronised(self) -> bool:
        """Whether processes have the statistics of batches in common."""
        settings, size = self.config.train, self.ranks.size
        small = settings.batch_size < SMALL_BATCH * size
        return size > 1 and {"auto": small, "on": True, "off": False}[settings.sync_statistics]

    @property
    def repeatable(self) -> RunConfig:
        """The settings for config.json: with the batch size as asked, since others may not fit."""
        size = self.asked.train.batch_size
        train = dataclasses.replace(self.config.train, batch_size=size)
        return dataclasses.replace(self.config, train=train)

    @cached_property
    def nodes(self) -> list[Node]:
        """The pieces of the network."""
        return graph(self.config.network, self.preprocessing.size)

    @cached_property
    def about(self) -> Description:
        """What a checkpoint says of its weights."""
        precision = self.arithmetic.precision  # and not ``auto``, which is another elsewhere
        train = dataclasses.replace(self.config.train, precision=precision)
        return Description(
            sparsenet=__version__,
            architecture=self.config.network.to_dict(),
            preprocessing=self.preprocessing,
            classes=tuple(self.data.classes),
            dataset=self.data.name,
            recipe=recipe(dataclasses.replace(self.config, train=train)),
            data=record(self.data),
        )


def preparing(
    config: RunConfig,
    previous: Arithmetic,
    images: Mapping[str, Tensor],
    ranks: Ranks = ALONE,
) -> Generator[Reading | Message, None, Setup]:
    """Loads the data and decides what only the data and the device can say.

    *previous* is the arithmetic of a run that is resumed, *images* are what it kept of them
    (``sparsenet.data.identity.to_tensors``), and empty else. Yields how far the reading has come.
    Raises ``ValueError`` in one line where settings do not fit the data or the device.
    """
    if config.optim.freeze and not config.train.weights:
        expected = "--weights, which has what is to stay"
        raise ValueError(f"--freeze: expected {expected}, found none")
    device = choose_device(config.train.device)
    if config.train.implementation != "auto":  # refused before the data is loaded
        dispatch.choose(config.train.implementation, device)
    data = in_order((yield from loading_dataset(config.data)), images)
    _check_choices(config, data)
    channels, _, size = data.test.shape
    asked, network = config, config.network.for_images(size)
    network = dataclasses.replace(network, in_chans=channels, num_classes=len(data.classes))
    train = _with_batch_size(config.train, len(data.train), ranks)
    train = dataclasses.replace(train, max_epoch=train.max_epoch or epochs_for(len(data.train)))
    config = dataclasses.replace(config, network=network, train=train)
    _check_sizes(config, size, len(data.train))
    if config.data.mean:
        mean, std = _for_all_channels(config, channels)
    else:
        measuring = measuring_channels(data.train)
        mean, std = yield from reporting("statistics", len(data.train), measuring)
    limit = config.data.max_megapixels
    preprocessing = Preprocessing(size, channels, mean, std, data.grey_range, limit)
    if problem := preprocessing.problem():
        raise ValueError(f"--mean, --std: expected those of images, found {problem}")
    _check_same_images(data, ranks)
    arithmetic = previous
    if ranks.is_first:
        arithmetic = choose_arithmetic(config.train, device, previous, ranks.size)
    arithmetic = ranks.tell(arithmetic)
    dispatch.choose(arithmetic.implementation, device, memory=config.train.memory)
    data = _on_device(data, device)
    setup = Setup(asked, config, data, preprocessing, device, arithmetic, ranks)
    if device.type == "cpu" and sys.platform == "linux":  # others say themselves what they cannot
        _check_memory(setup)
    return setup


def _for_all_channels(config: RunConfig, channels: int) -> ChannelStatistics:
    """The mean and standard deviation that are asked for, of each of the *channels*."""
    mean, std = config.data.mean, config.data.std
    for name, given in (("mean", mean), ("std", std)):
        if len(given) not in (1, channels):
            expected = f"1 number or {channels}, as images have channels"
            raise ValueError(f"--{name}: expected {expected}, found {len(given)}")
    return (mean * channels)[:channels], (std * channels)[:channels]


def _check_choices(config: RunConfig, data: Dataset) -> None:
    """Raises ``ValueError`` where settings do not go with each other or with the data."""
    if config.train.patience and not data.val:
        raise ValueError(
            f"--patience: expected validation images, such as those of --val_fraction 0.1, found "
            f"none; --patience {config.train.patience} never waits for the {data.tested_on} error"
        )
    if config.optim.class_weights == config.data.sampler == "balanced":
        raise ValueError(
            "--class_weights: expected none with --sampler balanced, which already makes up for "
            "classes with few images, found balanced"
        )


def epochs_for(images: int) -> int:
    """How many epochs are trained by default: of a quarter of the *images* twice as many."""
    found = round(EPOCHS * math.sqrt(EPOCHS_OF / images))
    return min(max(found, FEWEST_EPOCHS), MOST_EPOCHS)


def _with_batch_size(settings: TrainConfig, images: int, ranks: Ranks) -> TrainConfig:
    """*settings* with a batch size: by default the paper's, or a quarter of fewer images."""
    fitting, least = min(BATCH_SIZE, max(images // 4, 2)), 2 * ranks.size
    if ranks.size > 1 and (settings.batch_size or fitting) < least:
        raise ValueError(
            f"--batch_size: expected at least {least}, 2 images for each of {ranks.size} "
            f"processes, found {settings.batch_size or fitting}"
        )
    if settings.batch_size > images:
        raise ValueError(
            f"--batch_size: expected at most the {images} training images, "
            f"found {settings.batch_size}; --batch_size {fitting} fits"
        )
    return dataclasses.replace(settings, batch_size=settings.batch_size or min(fitting, images))


def _check_sizes(config: RunConfig, size: int, images: int) -> None:
    """Raises ``ValueError`` where a setting does not fit *images* of *size* pixels a side."""
    sizes = config.network.sizes(size)
    for flag, largest in (("shift", size - 1), ("cutout", size), ("first_size", size)):
        value = getattr(config.data, flag)
        if value > largest:
            raise ValueError(
                f"--{flag}: expected at most {largest} for images of {size} pixels a side, "
                f"found {value}"
            )
    if config.data.first_size:
        try:
            sizes = config.network.sizes(config.data.first_size)
        except ValueError as error:
            raise ValueError(str(error).replace("image_size", "--first_size")) from None
    if config.train.batch_size == 1 and (config.data.mixup or config.data.cutmix):
        expected = "at least 2 images a step, of which --mixup and --cutmix make pairs"
        raise ValueError(f"--batch_size: expected {expected}, found 1")
    ends = [0, *batch_ends(images, config.train.batch_size)]
    if 1 in sizes and any(end - start == 1 for start, end in pairwise(ends)):
        raise ValueError(
            "--batch_size: expected at least 2 images a step, since the last stage of this network "
            "reduces an image to 1x1 pixels, which have no variance of their own, found 1"
        )


def _check_same_images(data: Dataset, ranks: Ranks) -> None:
    records = ranks.gather(record(data), patient=True)
    others = [rank for rank, each in enumerate(records) if each != records[0]]
    if others:
        raise ValueError(
            f"--dataset_dir: expected the same images in all processes, found others in rank "
            f"{others[0]} than in rank 0"
        )


def _check_memory(setup: Setup) -> None:
    """Raises ``ValueError`` where not even what every implementation keeps fits into memory.

    A system that gives memory before it has it ends a process that uses it without a word.
    """
    parameters, _ = totals(setup.nodes)
    network = 3 * 4 * parameters  # weights, gradients and momenta
    features = sum(math.prod(node.shape) for node in setup.nodes)
    batch_size, bf16 = setup.config.train.batch_size, setup.arithmetic.precision == "bf16"
    least, most = network + batch_size * features * (2 if bf16 else 4), total_memory()
    if least > most:
        raise ValueError(
            f"--batch_size: expected a step within the {most / 1e9:.1f} GB of memory, found one of "
            f"{least / 1e9:.1f} GB at least: {network / 1e9:.1f} GB for {parameters:,} parameters, "
            f"the rest for the features of {batch_size} images"
        )


def _on_device(data: Dataset, device: torch.device) -> Dataset:
    """The dataset on the device where its pixels fill at most half of what is free there."""
    free = None if device.type == "cpu" else free_memory(device)
    return data.to(device) if free is not None and data.nbytes <= free // 2 else data


def introduce(setup: Setup, previous: Arithmetic) -> Iterator[str]:
    """Lines for the user that say what is trained on what, and how."""
    data, nodes = setup.data, setup.nodes
    validation = f", {len(data.val)} {data.chosen_on}" if data.val else ""
    counts = f"{len(data.train)} training{validation} and {len(data.test)} {data.tested_on} images"
    shape = data.train.shape
    classes = f"{len(data.classes)} classes ({shortened(data.classes)})"
    yield f"{data.name}: {counts}, {classes}, {shape}"
    if crop := setup.config.data.crop:
        part, size = f"{100 * crop:g} % or more of their area", setup.preprocessing.size
        yield f"training images are cropped to {part} and resized to {size}x{size}"
    yield from data.notes
    if data.tested_on == "held-out":
        total = len(data.train) + len(data.test) + (len(data.val) if data.val else 0)
        fraction = f"about --test_fraction {setup.config.data.test_fraction:g}"
        held_out = f"{len(data.test)} of {total} images are held out ({fraction})"
        yield f"the data has no test split: {held_out}"
    elif data.tested_on == "validation":
        yield "the data has no test split: the validation images are tested on"
    yield from unreadable(data.skipped)
    settings, asked = setup.config.train, setup.asked
    if not asked.train.batch_size and settings.batch_size < BATCH_SIZE:
        yield f"batches of {settings.batch_size} images, since there are few (--batch_size)"
    if not asked.train.max_epoch:
        yield f"{settings.max_epoch} epochs, for {len(data.train)} training images (--max_epoch)"
    drop = setup.config.optim.drop_1
    if setup.config.optim.schedule == "step" and drop >= settings.max_epoch:
        yield (
            f"warning: the learning rate never falls: --drop_1 {drop} does not come within "
            f"{settings.max_epoch} epochs"
        )
    network = setup.config.network
    parameters, macs = totals(nodes)
    size, stem = setup.preprocessing.size, ""
    if asked.network.stem == "auto" and network.stem_layers.stride > 1:
        stem = f", {network.stem} stem for images of {size} pixels a side (--stem)"
    yield (
        f"{network.fetch if isinstance(network.fetch, str) else 'custom'} network, "
        f"{network.stage_depths} layers, growth {network.growth_rates}{stem}: "
        f"{parameters:,} parameters, {macs:,} MACs"
    )
    yield f"recipe: {describe_recipe(setup.config, settings.max_epoch)}"
    yield from describe_choice(setup.arithmetic, settings, setup.device, previous)
    if setup.synchronised:
        yield "statistics of batches are those of all processes together (--sync_statistics)"
