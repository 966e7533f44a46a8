"""Which images come when, shifted and mirrored how: a function of seed, epoch and position alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.data.dataset import Images


def stream(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator of its own for each seed and key."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class EpochPlan:
    """An epoch: at position *p* comes image ``order[p]``, by ``offsets[p]`` and ``flips[p]``.

    Shapes ``(N,)`` int64; ``(N, 2)`` int64, row and column, each from 0 to ``2 * shift``; ``(N,)`` bool.
    """

    order: Tensor
    offsets: Tensor
    flips: Tensor


def plan_epoch(seed: int, epoch: int, count: int, shift: int, mirror: bool) -> EpochPlan:
    """The plan of one epoch over *count* images, on the CPU."""
    order = torch.randperm(count, generator=stream(seed, "order", epoch))
    offsets = torch.randint(2 * shift + 1, (count, 2), generator=stream(seed, "offsets", epoch))
    flips = torch.rand(count, generator=stream(seed, "flips", epoch)) < 0.5
    return EpochPlan(order, offsets, flips & mirror)


def augment(batch: Tensor, offsets: Tensor, flips: Tensor, shift: int, fill: Tensor | None = None) -> Tensor:
    """Pads images uint8 ``(N, C, H, W)`` by *shift*, crops each at its offsets, mirrors it where flipped.

    The padding is *fill*, uint8 ``(C,)``, or zero. The paper pads normalised images with zeros, which is what
    the channel means as *fill* come to.
    """
    n, channels, height, width = batch.shape
    padded = batch.new_zeros(n, channels, height + 2 * shift, width + 2 * shift)
    if fill is not None:
        padded += fill.view(1, -1, 1, 1)
    padded[:, :, shift : shift + height, shift : shift + width] = batch
    columns = torch.arange(width, device=batch.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (N, W)
    rows = torch.arange(height, device=batch.device) + offsets[:, :1]  # (N, H)
    source = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (N, H, W), into the padded image
    source = source.view(n, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, source).view_as(batch)


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of what is kept, and of what is held out: a *fraction* of each class.

    Of a class of two images or more, at least one is kept and one held; a single image is kept.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.bincount(labels).nonzero().flatten().tolist():
        members = (labels == label).nonzero().flatten()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=stream(seed, "split", label))[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


@dataclass(frozen=True)
class Batches:
    """A split, batch by batch: pixels uint8 ``(n, C, H, W)`` and labels int64 ``(n,)`` on *device*.

    With a *plan*: in its order and augmented; without: in the split's order, as they are. Begins at batch
    *start*, so that an interrupted epoch can go on. The last batch may be smaller; ``len`` is of all batches.
    """

    images: Images
    batch_size: int
    plan: EpochPlan | None = None
    shift: int = 0
    fill: Tensor | None = None
    start: int = 0
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        fill = None if self.fill is None else self.fill.to(self.device)
        for pixels, labels, *moves in self.parts():
            if moves:
                offsets, flips = moves
                pixels = augment(pixels, offsets, flips, self.shift, fill)
            yield pixels, labels

    def parts(self) -> Iterator[tuple[Tensor, ...]]:
        """Pixels and labels as they are in the data and, with a plan, what :func:`augment` is to do with them."""
        plan, images, device = self.plan, self.images, torch.device(self.device)
        if plan:
            order = plan.order.to(images.pixels.device)
            offsets, flips = plan.offsets.to(device), plan.flips.to(device)
        for first in range(self.start * self.batch_size, len(images), self.batch_size):
            part = slice(first, first + self.batch_size)
            batch = images[order[part]] if plan else images[part]
            pixels, labels = _move(batch.pixels, device), _move(batch.labels, device)
            yield (pixels, labels, offsets[part], flips[part]) if plan else (pixels, labels)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from other memory a copy waits for the device
    return tensor.to(device)
