"""Trained weights that a run starts from, and the settings that come with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparsenet import addresses, weights, zoo
from sparsenet.adoption.files import read_densenet
from sparsenet.architecture import Architecture
from sparsenet.config import RunConfig
from sparsenet.data.dataset import Dataset, Images, Part
from sparsenet.data.errors import shortened
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.data.selection import Known
from sparsenet.data.splits import IMAGES_OF
from sparsenet.model import SparseNet
from sparsenet.run import Run
from sparsenet.trained import load_trained
from sparsenet.validation import expect
from sparsenet.weights import About

# That torchvision's and timm's DenseNets were trained with, of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224


@dataclass(frozen=True)
class Start:
    """A trained network as a run starts from it."""

    source: str  # what names it
    architecture: Architecture
    tensors: dict[str, Tensor]  # a state dict
    preprocessing: Preprocessing | None  # ``None`` where the file does not say
    classes: tuple[str, ...]  # empty where it does not
    images: Mapping[str, Tensor] = field(default_factory=dict)  # of a run: ``Run.images``
    about: About | None = None  # what a file or a run of this library says of it
    passed_over: tuple[str, ...] = ()  # damaged checkpoints

    def settings(self, config: RunConfig, in_chans: int = 0) -> RunConfig:
        """*config* for this network and for images as it takes them, or of so many channels."""
        network = dataclasses.replace(self.architecture, dropout=config.network.dropout)
        known, colours = self.preprocessing, self.architecture.in_chans == 3
        mean, std = (known.mean, known.std) if known else (MEAN * colours, STD * colours)
        fitting = not in_chans or len(mean) in (1, in_chans)
        data = dataclasses.replace(
            config.data,
            image_size=known.size if known else SIZE,
            in_chans=3 if colours else 0,  # greys are colours, but colours are no greys
            mean=mean if fitting else (),
            std=std if fitting else (),
            grey_range=known.grey_range if known else (),
        )
        train = dataclasses.replace(config.train, weights=self.source)
        return dataclasses.replace(config, network=network, data=data, train=train)

    def completed(self, config: RunConfig, in_chans: int = 0) -> RunConfig:
        """*config*, but for images as this network takes them where it leaves open how."""
        taken = self.settings(config, in_chans or config.data.in_chans)
        data = {
            name: getattr(config.data, name) or getattr(taken.data, name)
            for name in ("image_size", "in_chans", "mean", "std", "grey_range")
        }
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, **data), train=taken.train
        )

    def check(self, config: RunConfig) -> None:
        """Raises ``ValueError`` where *config* is of another network, or no image fits this one."""
        own, source = self.architecture, f"--weights {self.source}"
        expected = "a network for images of 1 or 3 channels"
        expect(own.in_chans in (1, 3), source, expected, own.in_chans)
        wanted = dataclasses.replace(config.network, in_chans=own.in_chans)
        zoo.check_same_network(wanted, own, source)

    def load_into(self, model: SparseNet, classes: tuple[str, ...]) -> None:
        """Gives *model* these weights.

        The classifier is that of the file where its *classes* are the same in any order, and else
        stays as it is, a new one.
        """
        tensors = dict(self.tensors)
        channels = model.architecture.in_chans
        if channels != self.architecture.in_chans:
            tensors["stem.0.weight"] = zoo.for_channels(tensors["stem.0.weight"], channels)
        rows = self._rows(classes)
        for name in ("classifier.weight", "classifier.bias"):
            tensor = tensors.pop(name, None)
            own = model.get_parameter(name)
            tensors[name] = own if rows is None or tensor is None else tensor[rows]
        model.load_state_dict(tensors)

    def warnings(self, data: Dataset) -> Iterator[str]:
        """Lines on images of *data* that are tested on, and that these weights were trained on.

        Of a weights file they are known where *data* are what it was trained on, perhaps with other
        images held out.
        """
        known = Known(self.images, self.about.data if self.about else None)
        if self.about and not self.images:
            held_out = data.tested_on == "held-out"
            names = [name for name in data.ids if name != "test" or held_out]
            ids = torch.cat([data.ids[name] for name in names])
            labels = torch.cat([data.labels(name).cpu() for name in names])
            whole = Part(Images(torch.empty(len(ids), 0), labels), ids, torch.arange(len(ids)))
            known = known.with_drawn(whole, self.about.data_settings())
        called = {**IMAGES_OF, "val": data.chosen_on, "test": data.tested_on}
        for name in ("val", "test"):
            if name not in data.ids or "train.ids" not in known.images:
                continue
            count = int(torch.isin(data.ids[name], known.images["train.ids"]).sum())
            if count:
                yield (
                    f"warning: {self.source} was trained on {count} of the {len(data.ids[name])} "
                    f"{called[name]} images: their error is lower than that of others will be"
                )

    def describe(
        self, model: SparseNet, classes: tuple[str, ...], used: Preprocessing
    ) -> Iterator[str]:
        """Lines for the user on what *model* starts with, for images as *used*."""
        before = f" instead of {len(self.classes)}" if self.classes else ""
        classifier = f"a new classifier for {len(classes)} classes{before}"
        if self._rows(classes) is not None:
            classifier = f"with its classifier for {len(classes)} classes ({shortened(classes)})"
        yield f"starts from {self.source}: {classifier}"
        yield from (f"warning: {self.source}: {each}" for each in self.passed_over)
        if self.preprocessing is None and (used.mean, used.std) == (MEAN, STD):
            yield "images are normalised as ImageNet's, as the file does not say (--mean, --std)"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if frozen := sum(p.numel() for p in model.parameters()) - trained:
            yield f"{trained:,} parameters are trained and {frozen:,} are frozen (--freeze)"

    def _rows(self, classes: tuple[str, ...]) -> Tensor | None:
        """The rows of the classifier for *classes*; ``None`` where it is of others."""
        if sorted(self.classes) != sorted(classes):
            return None
        return torch.tensor([self.classes.index(name) for name in classes])


def read_start(source: str) -> Start:
    """The trained network that *source* names.

    Besides what ``load_trained`` takes, that is a DenseNet's file of torchvision, timm or MONAI, or
    its address. Raises ``ValueError`` in one line.
    """
    path = Path(source)
    if addresses.can_fetch(source):
        found, path = addresses.fetch(source, _foreign)
    else:
        found = _foreign(path, source) if os.path.isfile(source) else None  # noqa: PTH113
    if found:
        return Start(source, *found, None, ())
    trained = load_trained(source)
    return Start(
        source,
        trained.model.architecture,
        dict(trained.model.state_dict()),
        trained.preprocessing,
        trained.classes,
        Run.open(trained.path).images() if trained.path.is_dir() else {},
        trained.about,
        trained.warnings,
    )


def _foreign(path: Path, source: str) -> tuple[Architecture, dict[str, Tensor]] | None:
    """Another library's network in a file; ``None`` where it is one of this library's."""
    if weights.is_our_own(path):
        return None
    return read_densenet(path, source)
