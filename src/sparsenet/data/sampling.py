"""Which images come when, how large and augmented how, as functions of seed, epoch and position."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet.data.augment import OPERATIONS, RATIO, Moves
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images
from sparsenet.data.stored import StoredImages
from sparsenet.ranks import ALONE, Ranks

T = TypeVar("T")
U = TypeVar("U")
TRIES = 10  # crops that are drawn for an image, of which the first that fits is taken
AHEAD, MOST_AHEAD = 1 << 26, 8  # bytes of pixels, and batches, that are read before their step


def stream(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that is a function of *seed* and *key*."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class EpochPlan:
    """At position *p* of an epoch comes image ``order[p]``, changed as entry *p* of *moves* says.

    *order* is int64 ``(N,)``.
    """

    order: Tensor
    moves: Moves


def plan_epoch(seed: int, epoch: int, count: int, config: DataConfig) -> EpochPlan:
    """The plan of one epoch over *count* images, on the CPU.

    Each purpose has a generator of its own, so that no setting changes what others draw.
    """

    def uniform(purpose: str, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=stream(seed, purpose, epoch))

    def integers(purpose: str, below: int, *shape: int) -> Tensor:
        return torch.randint(below, (count, *shape), generator=stream(seed, purpose, epoch))

    order = torch.randperm(count, generator=stream(seed, "order", epoch))
    offsets = integers("offsets", 2 * config.shift + 1, 2)
    moves = Moves(offsets, (uniform("flips") < 0.5) & config.mirror)
    if config.crop:
        areas = config.crop + (1 - config.crop) * uniform("areas", TRIES)
        ratios = RATIO ** (2 * uniform("ratios", TRIES) - 1)
        moves = moves._replace(crops=_crops(areas, ratios, uniform("crops", 2)))
    if config.trivial_augment:
        operations = integers("operations", len(OPERATIONS))
        moves = moves._replace(operations=operations, strengths=2 * uniform("strengths") - 1)
    if config.cutout:
        moves = moves._replace(holes=uniform("holes", 2))
    if config.mixup or config.cutmix:
        cuts = uniform("cuts") < bool(config.cutmix) / (bool(config.mixup) + bool(config.cutmix))
        alphas = np.where(cuts, config.cutmix, config.mixup)
        # NumPy's generator, as PyTorch's Beta distribution takes none.
        generator = np.random.default_rng(stream(seed, "shares", epoch).initial_seed())
        shares = torch.from_numpy(generator.beta(alphas, alphas)).float()
        moves = moves._replace(shares=shares, cuts=cuts, boxes=uniform("boxes", 2))
    return EpochPlan(order, moves)


def images_of_epoch(seed: int, epoch: int, labels: Tensor, sampler: str) -> Tensor:
    """The images of an epoch, int64 ``(N,)``, before they are mixed: all, or ``balanced`` ones.

    For these the epochs of a run are one row of places, which go to the classes that there are in
    turns; so each has as many as any other, to within one. A class draws its images in an order of
    its own, and once all have come in another, so that each has come as often as any other of the
    class, to within one.
    """
    if sampler == "shuffled":
        return torch.arange(len(labels))
    labels = labels.cpu()
    present, sizes = labels.unique(return_counts=True)
    chosen = []
    members = labels.argsort(stable=True).split(sizes.tolist())
    for turn, (label, images) in enumerate(zip(present.tolist(), members, strict=True)):
        size, classes = len(images), len(present)
        # How many of the places before this epoch and before its end are this class's.
        first, end = (-((turn - each * len(labels)) // classes) for each in (epoch, epoch + 1))
        rounds = range(first // size, -(-end // size))
        orders = [
            torch.randperm(size, generator=stream(seed, "balanced", label, each)) for each in rounds
        ]
        if end > first:
            row = torch.cat(orders)[first - rounds[0] * size :][: end - first]
            chosen.append(images[row])
    return torch.cat(chosen)


def _crops(areas: Tensor, ratios: Tensor, places: Tensor) -> Tensor:
    """``Moves.crops``: the first of each image's areas and ratios that fit into it, else all of it.

    *areas* and *ratios* (height to width) are ``(N, TRIES)``; *places* ``(N, 2)`` from 0 to 1.
    """
    sides = torch.stack(((areas * ratios).sqrt(), (areas / ratios).sqrt()), 2)  # (N, TRIES, 2)
    fits = (sides <= 1).all(2)
    first = fits.int().argmax(1)
    sides = torch.where(fits.any(1)[:, None], sides[torch.arange(len(sides)), first], 1.0)
    return torch.cat((places * (1 - sides), sides), 1)


def growing_epochs(max_epoch: int) -> int:
    """In how many of the first epochs training images that grow are not whole."""
    return 3 * max_epoch // 4


def training_size(epoch: int, max_epoch: int, first: int, full: int) -> int:
    """Side of the training images in *epoch* (from 0), or always *full* where *first* is 0.

    They grow from *first* in steps of 4 to *full* over the ``growing_epochs``, and from then on
    are whole. Each smaller size has its equal part of these epochs, to within one; of more sizes
    than epochs, as many as there are epochs are used, evenly spread, *first* among them.
    """
    growing = growing_epochs(max_epoch)
    if not first or epoch >= growing:
        return full
    smaller = -(-(full - first) // 4)  # sizes; the last step may be of less than 4
    return first + 4 * (smaller * epoch // growing)


def resized(images: Images, size: int) -> Images:
    """The same images with *size* pixels a side, antialiased, on the device they lie on."""
    if images.shape[-1] == size:
        return images
    small, first = images.like(size), 0
    for part in images.parts():
        exact = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        small.write(first, exact.round().to(torch.uint8))
        first += len(part)
    return small


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of what is left, and of what is held out: a *fraction* of each class.

    Of a class of two images or more, at least one goes to either; a single image is left.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.bincount(labels).nonzero().flatten().tolist():
        members = (labels == label).nonzero().flatten()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        order = torch.randperm(len(members), generator=stream(seed, "split", label))
        held_out[members[order[:count]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def hold_out(ids: Tensor, labels: Tensor, fraction: float, purpose: str) -> Tensor:
    """Which images are held out, bool ``(N,)``: about a *fraction* of each class.

    Each image is drawn by its id alone, and copies stay together, in whatever classes they are.
    Only where all or none of a class would be held out, as of one with two or three images, one is
    left or taken: the one whose draw comes nearest.
    """
    draws = torch.tensor([_draw(purpose, each) for each in ids.tolist()], dtype=torch.float64)
    held = draws < fraction
    ordered, places = draws.sort()

    def copies(draw: Tensor) -> Tensor:
        first, end = (
            torch.searchsorted(ordered, draw),
            torch.searchsorted(ordered, draw, right=True),
        )
        return places[first:end]

    for members in labels.argsort().split(labels.unique(return_counts=True)[1].tolist()):
        own = draws[members]
        if own.min() == own.max() or held[members].all():
            held[copies(own.max())] = False  # a class of one image and its copies has none to spare
        elif not held[members].any():
            held[copies(own.min())] = True
    return held


def _draw(purpose: str, image_id: int) -> float:
    """A number from 0 to 1 that is a function of the image and of what it is drawn for."""
    key = purpose.encode() + image_id.to_bytes(8, "big", signed=True)
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64


def batch_ends(images: int, batch_size: int) -> list[int]:
    """How many of so many images have come after each batch of an epoch.

    The last batch may be smaller, but a single image, which has no variance, joins the batch
    before it.
    """
    ends = [*range(batch_size, images, batch_size), images]
    if len(ends) > 1 and batch_size > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


@dataclass(frozen=True)
class Batches:
    """A split, batch by batch: pixels uint8 ``(n, C, H, W)`` and labels int64 ``(n,)`` on *device*.

    With a *plan* they come in its order, followed by the tensors of ``Moves``; without, in
    the split's order. Iteration begins at batch *start*, so that an interrupted epoch can go on.
    The last batch may have another size (``batch_ends``); ``len`` counts all batches. With several
    *ranks*, each takes its part of every batch.
    """

    images: Images
    batch_size: int
    plan: EpochPlan | None = None
    start: int = 0
    device: torch.device | str = "cpu"
    ranks: Ranks = ALONE

    def __len__(self) -> int:
        return len(batch_ends(len(self.images), self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        device, images = torch.device(self.device), self.images
        if self.plan:
            order = self.plan.order.to(images.device)
            moves = [each.to(device) for each in self.plan.moves]
        ends = [0, *batch_ends(len(images), self.batch_size)]
        parts: list[slice | Tensor] = []
        for first, end in pairwise(ends[self.start :]):
            whole = self.ranks.size == 1
            parts.append(slice(first, end) if whole else first + self.ranks.part(end - first))

        def gathered(part: slice | Tensor) -> tuple[Tensor, Tensor]:
            batch = images[order[part]] if self.plan else images[part]
            return batch.pixels, batch.labels

        is_slow = isinstance(images, StoredImages) or images.device != device
        found: Iterator[tuple[Tensor, Tensor]] = map(gathered, parts)
        if is_slow and images.device.type == "cpu":
            count = AHEAD // max(1, self.batch_size * math.prod(images.shape))
            found = read_ahead(gathered, parts, min(max(count, 1), MOST_AHEAD))
        for part, tensors in zip(parts, found, strict=True):
            pixels, labels = (_to_device(each, device) for each in tensors)
            if self.plan:
                # Moves that are not made have no entries.
                yield pixels, labels, *(each[part] if len(each) else each for each in moves)
            else:
                yield pixels, labels


def read_ahead(work: Callable[[T], U], items: Iterable[T], count: int) -> Iterator[U]:
    """Does *work* with *items* in a thread that is *count* of them ahead, and yields its results.

    One thread: reading from the system's cache is several times as fast as any network here.
    """
    ahead: deque[Future[U]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for each in ahead:
                each.cancel()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From memory that is not pinned, a copy waits for the device.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
