"""The networks that are compared, each with its recipe, as texts say them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.defaults.plain import PLAIN
from sparsenet import flags, presets, zoo
from sparsenet.config import RunConfig, changed, settings
from sparsenet.data.sampling import training_size
from sparsenet.graph import count
from sparsenet.model import SparseNet
from sparsenet.texts import nearest

PRESET = "short"
# ResNets are mostly trained by SGD, without an average of their weights, and at lower rates.
PLAIN_RECIPE = {"optimizer": "sgd", "ema": 0.0, "lr": 0.1}
RECIPE = ("lr", "schedule", "momentum", "weight_decay", "label_smoothing")  # which cost nothing
COSTLY = (  # other settings that have their meaning here
    *("optimizer", "ema", "grad_clip", "batch_size", "precision", "implementation", "memory"),
    *("mirror", "shift", "crop", "trivial_augment", "cutout", "mixup", "cutmix", "first_size"),
)
AT_32 = ("resnet20", "resnet9+lr=0.05", "sparsenet_40_12", "sparsenet_22_16_32_64")
AT_96 = (
    *("resnet20_strided", "resnet9_strided+lr=0.05", "sparsenet_40_12"),
    *("sparsenet_40_12+stem=imagenet", "sparsenet_22_16_32_64+stem=imagenet"),
)


@dataclass(frozen=True)
class Candidate:
    """A network and its recipe: ``sparsenet_40_12+lr=0.4+first_size=16``.

    The name is one of ``sparsenet models`` or of ``PLAIN``. What follows changes the preset
    ``short``, or for a plain network that with ``PLAIN_RECIPE``.
    """

    name: str
    changes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Raises ``ValueError`` for a name or a setting that is not known here."""
        name, *words = text.split("+")
        pairs = [word.partition("=")[::2] for word in words]
        found = cls(name, tuple(sorted((key, value) for key, value in pairs)))
        if len(dict(found.changes)) < len(pairs):
            raise ValueError(f"{text}: expected each setting once, found one twice")
        config = found.config
        if found.plain is None:
            _ = config.network.stem_layers  # which no images decide here
        return found

    def __str__(self) -> str:
        return "+".join([self.name, *(f"{key}={value}" for key, value in self.changes)])

    @property
    def measured(self) -> Candidate:
        """The candidate whose costs are those of this one."""
        return Candidate(self.name, tuple(each for each in self.changes if each[0] not in RECIPE))

    @property
    def plain(self) -> Callable[[int], nn.Module] | None:
        return PLAIN.get(self.name)

    @cached_property
    def config(self) -> RunConfig:
        """All settings; those of a plain network have another network, which is not used."""
        base, known = presets.preset(PRESET), [*RECIPE, *COSTLY]
        if self.plain:
            base = changed(base, PLAIN_RECIPE)
        elif self.name in zoo.NETWORKS:
            base = dataclasses.replace(base, network=zoo.architecture(self.name))
            known += [each.name for each in settings() if each.component == "network"]
        else:
            names = [*PLAIN, *zoo.NETWORKS]
            expected = f"{', '.join(PLAIN)} or a name of sparsenet models"
            raise ValueError(f"expected {expected}, found {self.name!r}{nearest(self.name, names)}")
        for key, _ in self.changes:
            if key not in known:
                hint = nearest(key, known)
                raise ValueError(
                    f"{self}: expected some of {', '.join(known)}, found {key!r}{hint}"
                )
        return changed(base, flags.values(dict(self.changes)))

    def build(self, classes: int, implementation: str) -> nn.Module:
        """The network with new weights, which are drawn from PyTorch's own generator."""
        if self.plain:
            return self.plain(classes)
        network = dataclasses.replace(self.config.network, num_classes=classes)
        return SparseNet(network, implementation, self.config.train.memory)

    def macs(self, classes: int, side: int) -> int:
        """Multiply-accumulates of convolutions and classifier for an image of *side* pixels."""
        if not self.plain:
            network = dataclasses.replace(self.config.network, num_classes=classes)
            return count(network, side)[1]
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.plain(classes).eval()(torch.empty(1, 3, side, side))
        return int(counter.get_total_flops()) // 2

    def sizes(self, epochs: int, side: int) -> list[int]:
        """The side in pixels of the training images in each of *epochs*."""
        first = self.config.data.first_size
        return [training_size(epoch, epochs, first, side) for epoch in range(epochs)]
