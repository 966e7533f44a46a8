"""Which images come when, how large and augmented how: a function of seed, epoch and position alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet.data.augment import OPERATIONS, Moves
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images


def stream(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator of its own for each seed and key."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class EpochPlan:
    """An epoch: at position *p* comes image ``order[p]``, int64 ``(N,)``, with what entry *p* of *moves* says."""

    order: Tensor
    moves: Moves


def plan_epoch(seed: int, epoch: int, count: int, config: DataConfig) -> EpochPlan:
    """The plan of one epoch over *count* images, on the CPU."""

    def uniform(purpose: str, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=stream(seed, purpose, epoch))

    order = torch.randperm(count, generator=stream(seed, "order", epoch))
    offsets = torch.randint(
        2 * config.shift + 1, (count, 2), generator=stream(seed, "offsets", epoch)
    )
    moves = Moves(offsets, (uniform("flips") < 0.5) & config.mirror)
    if config.trivial_augment:
        operations = torch.randint(
            len(OPERATIONS), (count,), generator=stream(seed, "operations", epoch)
        )
        moves = moves._replace(operations=operations, strengths=2 * uniform("strengths") - 1)
    if config.cutout:
        moves = moves._replace(holes=uniform("holes", 2))
    if config.mixup or config.cutmix:
        cuts = uniform("cuts") < bool(config.cutmix) / (bool(config.mixup) + bool(config.cutmix))
        alphas = np.where(cuts, config.cutmix, config.mixup)
        random = np.random.default_rng(
            stream(seed, "shares", epoch).initial_seed()
        )  # torch's takes no generator
        shares = torch.from_numpy(random.beta(alphas, alphas)).float()
        moves = moves._replace(shares=shares, cuts=cuts, boxes=uniform("boxes", 2))
    return EpochPlan(order, moves)


def training_size(epoch: int, max_epoch: int, first: int, full: int) -> int:
    """Side of the training images in *epoch* (from 0): from *first* in steps of 4 to *full*; *first* 0: full always.

    They grow over the first 3/4 of the run, ``3 * max_epoch // 4`` epochs, and the last epoch sees them whole. Each
    smaller size has its equal part of these epochs, to within one; of more sizes than epochs, as many as there are
    epochs are used, evenly spread, *first* among them.
    """
    growing = 3 * max_epoch // 4  # epochs
    if not first or epoch >= growing:
        return full
    smaller = -(-(full - first) // 4)  # sizes; the last step may be of less than 4
    return first + 4 * (smaller * epoch // growing)


def resized(images: Images, size: int) -> Images:
    """The same images with *size* pixels a side, antialiased, on the device they lie on."""
    if images.pixels.shape[-1] == size:
        return images
    pixels = images.pixels.new_empty(*images.pixels.shape[:2], size, size)
    for part, small in zip(images.pixels.split(256), pixels.split(256), strict=True):
        small.copy_(
            F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round()
        )
    return Images(pixels, images.labels)


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of what is kept, and of what is held out: a *fraction* of each class.

    Of a class of two images or more, at least one is kept and one held; a single image is kept.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.bincount(labels).nonzero().flatten().tolist():
        members = (labels == label).nonzero().flatten()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[
            members[torch.randperm(len(members), generator=stream(seed, "split", label))[:count]]
        ] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


@dataclass(frozen=True)
class Batches:
    """A split, batch by batch: pixels uint8 ``(n, C, H, W)`` and labels int64 ``(n,)`` on *device*.

    With a *plan* in its order, and after them what is to be done to the images, a :class:`Moves`; without in the
    split's order. Begins at batch *start*, so that an interrupted epoch can go on. The last batch may be smaller;
    ``len`` is of all batches.
    """

    images: Images
    batch_size: int
    plan: EpochPlan | None = None
    start: int = 0
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        plan, images, device = self.plan, self.images, torch.device(self.device)
        if plan:
            order = plan.order.to(images.pixels.device)
            moves = [each.to(device) for each in plan.moves]
        for first in range(self.start * self.batch_size, len(images), self.batch_size):
            part = slice(first, first + self.batch_size)
            batch = images[order[part]] if plan else images[part]
            pixels, labels = _move(batch.pixels, device), _move(batch.labels, device)
            yield (pixels, labels, *(each[part] for each in moves)) if plan else (pixels, labels)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(
            device, non_blocking=True
        )  # from other memory a copy waits for the device
    return tensor.to(device)
