"""Order, sizes and draws are a function of seed, epoch and position; splits are stratified."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sparsenet.data.augment import OPERATIONS, Moves, augment
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images
from sparsenet.data.sampling import (
    Batches,
    batch_ends,
    images_of_epoch,
    plan_epoch,
    resized,
    stratified_split,
    stream,
    training_size,
)


def some_images(count: int, side: int = 6) -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count))


def test_streams_are_reproducible_and_their_own() -> None:
    keys: list[tuple[int | str, ...]] = [(), ("a",), ("a", 1), ("a", "1"), ("a1",), (1, "a")]
    draws = [torch.rand(4, generator=stream(seed, *key)) for seed in (0, 1) for key in keys]
    assert all(
        torch.equal(a, torch.rand(4, generator=stream(s, *k)))
        for a, (s, k) in zip(draws, [(s, k) for s in (0, 1) for k in keys], strict=True)
    )
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_plan_is_a_permutation_within_bounds() -> None:
    config = DataConfig(shift=4, mirror=True)
    plan = plan_epoch(3, 7, 1000, config)
    assert torch.equal(plan.order.sort().values, torch.arange(1000))
    assert plan.moves.offsets.shape == (1000, 2)
    assert plan.moves.offsets.unique().tolist() == list(range(9))
    assert 400 < int(plan.moves.flips.sum()) < 600
    assert not plan_epoch(3, 7, 1000, DataConfig(mirror=False)).moves.flips.any()


EVERYTHING = DataConfig(shift=1, crop=0.08, trivial_augment=True, cutout=2, mixup=0.4, cutmix=1.0)


def test_a_plan_is_a_function_of_seed_and_epoch() -> None:
    plan, again = (plan_epoch(3, 7, 100, EVERYTHING) for _ in range(2))
    assert torch.equal(plan.order, again.order) and all(map(torch.equal, plan.moves, again.moves))
    for other in (plan_epoch(3, 8, 100, EVERYTHING), plan_epoch(4, 7, 100, EVERYTHING)):
        assert not torch.equal(plan.order, other.order) and not any(
            map(torch.equal, plan.moves, other.moves)
        )


@given(
    st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 1, 4]), min_size=1, max_size=60),
    st.integers(0, 99),
)
def test_a_balanced_epoch_has_equally_many_of_each_class(labels: list[int], seed: int) -> None:
    """And over the epochs each image of a class comes as often as any other, to within one."""
    given = torch.tensor(labels)
    counts = torch.zeros(len(labels))
    for epoch in range(4):
        order = images_of_epoch(seed, epoch, given, "balanced")
        assert torch.equal(order, images_of_epoch(seed, epoch, given, "balanced"))
        assert order.shape == (len(labels),)
        counts += torch.bincount(order, minlength=len(labels))
        own = [counts[given == label] for label in given.unique()]
        places = torch.stack([each.sum() for each in own])
        for each in (*own, places, given[order].unique(return_counts=True)[1]):
            assert each.max() - each.min() <= 1
    assert torch.equal(images_of_epoch(seed, 3, given, "shuffled"), torch.arange(len(labels)))


def test_balanced_epochs_are_other_ones() -> None:
    labels = (torch.arange(200) < 20).long()
    first, second = (
        images_of_epoch(seed, epoch, labels, "balanced") for seed, epoch in ((0, 0), (0, 1))
    )
    common, rare = (labels == label for label in (0, 1))
    assert len(torch.cat([first[common[first]], second[common[second]]]).unique()) == 180
    assert not torch.equal(first[rare[first]], second[rare[second]])
    assert not torch.equal(first, images_of_epoch(1, 0, labels, "balanced"))


MIXED = ("shares", "cuts")  # what mixup and CutMix draw together


@pytest.mark.parametrize("name", ["crop", "trivial_augment", "cutout", "mixup", "cutmix"])
def test_what_is_not_asked_for_is_not_drawn_and_changes_no_other_draw(name: str) -> None:
    """So that a run without it goes on as it would have before there was such a thing."""
    plan, off = (
        plan_epoch(3, 7, 100, config) for config in (EVERYTHING, replace(EVERYTHING, **{name: 0}))
    )
    none = plan_epoch(3, 7, 100, DataConfig(shift=1)).moves
    assert torch.equal(plan.order, off.order)
    for field, whole in plan.moves._asdict().items():
        rest = getattr(off.moves, field)
        assert (
            torch.equal(rest, whole)
            or not len(rest)
            or (name.startswith(("mix", "cutmix")) and field in MIXED)
        )
        assert (len(getattr(none, field)) == 0) == (field not in ("offsets", "flips"))
    assert torch.equal(none.flips, torch.rand(100, generator=stream(3, "flips", 7)) < 0.5)
    assert torch.equal(none.offsets, torch.randint(3, (100, 2), generator=stream(3, "offsets", 7)))


def test_draws_are_in_their_ranges() -> None:
    moves = plan_epoch(0, 0, 2000, EVERYTHING).moves
    assert moves.operations.unique().tolist() == list(range(len(OPERATIONS)))
    assert moves.strengths.abs().max() <= 1 and abs(moves.strengths.mean()) < 0.1
    for places in (moves.holes, moves.boxes, moves.shares):
        assert 0 <= places.min() < 0.1 and 0.9 < places.max() <= 1
    assert 900 < int(moves.cuts.sum()) < 1100
    assert (
        moves.shares[moves.cuts].std() < 0.35 < moves.shares[~moves.cuts].std()
    )  # Beta(1, 1) and Beta(0.4, 0.4)
    assert not plan_epoch(0, 0, 100, DataConfig(mixup=0.2)).moves.cuts.any()
    assert plan_epoch(0, 0, 100, DataConfig(cutmix=0.2)).moves.cuts.all()


def assert_spread(shares: Tensor) -> None:
    """Evenly from 0 to 1: the statistic of Kolmogorov and Smirnov, exceeded once in 10,000 times.

    The numbers depend on the seed alone, so this is so or not, always.
    """
    ordered = shares.double().sort().values
    even = torch.linspace(0, 1, len(ordered), dtype=torch.float64)
    assert (ordered - even).abs().max() < 2.23 / len(ordered) ** 0.5


def test_crops_are_spread_evenly_over_those_that_fit() -> None:
    """As a crop of area *a* fits where its ratio is from *a* to 1/*a*, large ones are rarer."""
    least, steepest = 0.08, math.log(4 / 3)
    top, left, height, width = (
        plan_epoch(0, 0, 100_000, DataConfig(crop=least)).moves.crops.double().unbind(1)
    )
    for first, side in ((top, height), (left, width)):
        assert first.min() >= 0 and (first + side).max() <= 1 + 1e-6
        assert_spread(first / (1 - side))
    areas, ratios = height * width, (height / width).log()
    assert least - 1e-6 < areas.min() < least + 0.01 and areas.max() > 0.99
    widest = (-areas.log()).clamp(max=steepest)  # logarithm of the largest ratio that fits
    assert_spread((ratios / widest + 1) / 2)

    def integral(area: Tensor) -> Tensor:
        """Of the part of ratios that fit, from no area to *area*."""
        rest = area.clamp(min=0.75)
        fitting = (rest - rest * rest.log() - 0.75 + 0.75 * math.log(0.75)) / steepest
        return area.clamp(max=0.75) + fitting

    low, high = integral(torch.tensor([least, 1.0], dtype=torch.float64))
    assert_spread((integral(areas) - low) / (high - low))


def test_where_no_crop_fits_the_image_is_whole() -> None:
    crops = plan_epoch(0, 0, 50, DataConfig(crop=1.0)).moves.crops
    assert torch.equal(crops, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(50, 4))


@given(st.integers(1, 400), st.integers(1, 30), st.integers(0, 100))
def test_training_images_grow_to_their_full_size(max_epoch: int, quarter: int, more: int) -> None:
    first, full = 4 * quarter, 4 * quarter + more
    sizes = [training_size(epoch, max_epoch, first, full) for epoch in range(max_epoch)]
    assert sizes == sorted(sizes) and sizes[-1] == full
    assert max_epoch == 1 or sizes[0] == first
    assert all(size == full for epoch, size in enumerate(sizes) if 4 * epoch >= 3 * max_epoch)
    assert {training_size(epoch, max_epoch, 0, full) for epoch in range(max_epoch)} == {full}
    smaller, growing = range(first, full, 4), 3 * max_epoch // 4
    epochs = [sizes[:growing].count(size) for size in smaller]
    assert sum(epochs) == (growing if more else 0)  # no other size is seen before the full one
    assert sum(map(bool, epochs)) == min(
        growing, len(smaller)
    )  # all of them, where there is an epoch for each
    assert max(epochs, default=0) - min(epochs, default=0) <= 1


@pytest.mark.parametrize(
    ("max_epoch", "sizes"),
    [(5, [16, 20, 24, 32, 32]), (6, [16, 20, 24, 28, 32, 32]), (8, [16, 16, 20, 24, 24, 28])],
)
def test_runs_go_on_with_the_sizes_they_began_with(max_epoch: int, sizes: list[int]) -> None:
    """A stopped run may be resumed by a later version, so steps of 4 stay where they are."""
    actual = [training_size(epoch, max_epoch, 16, 32) for epoch in range(max_epoch)]
    assert actual == sizes + [32] * (max_epoch - len(sizes))


@pytest.mark.parametrize("size", [4, 8, 28])
def test_smaller_images_are_those_of_pillow(size: int) -> None:
    images = some_images(3, side=32)
    actual = resized(images, size)
    assert actual.pixels.shape == (3, 3, size, size) and actual.pixels.dtype == torch.uint8
    assert torch.equal(actual.labels, images.labels)
    for image, small in zip(images.pixels, actual.pixels, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        levels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert (small.int() - levels.int()).abs().max() <= 1
    assert resized(images, 32) is images


def test_many_images_are_resized_as_few() -> None:
    images = some_images(600)
    whole, last = resized(images, 4), resized(images[500:], 4)
    assert torch.equal(whole.pixels[500:], last.pixels)


def test_shift_and_cutout_keep_their_proportions() -> None:
    config = DataConfig(shift=4, cutout=12)
    for size, shift, cutout in ((16, 2, 6), (20, 2, 8), (32, 4, 12)):
        expected = DataConfig(image_size=size, shift=shift, cutout=cutout)
        assert config.scaled(size, 32) == expected


@given(st.integers(1, 300), st.data())
def test_a_crop_of_images_that_are_kept_larger_has_the_size_of_the_epoch(
    full: int, data: st.DataObject
) -> None:
    kept, size = data.draw(st.integers(full, 2 * full)), data.draw(st.integers(1, full))
    scaled = DataConfig(crop=0.1, stored_size=kept).scaled(round(size * kept / full), full)
    assert scaled.image_size == size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_is_stratified(labels: list[int], fraction: float, seed: int) -> None:
    tensor = torch.tensor(labels, dtype=torch.int64)
    kept, held = stratified_split(tensor, fraction, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert torch.equal(kept, kept.sort().values) and torch.equal(held, held.sort().values)
    for label in set(labels):
        total, part = labels.count(label), int((tensor[held] == label).sum())
        assert part == 0 if total == 1 else 1 <= part <= total - 1
        assert abs(part - fraction * total) <= 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(stratified_split(tensor, fraction, seed), (kept, held), strict=True)
    )


def test_batches_without_a_plan_are_the_split() -> None:
    images = some_images(10)
    batches = list(Batches(images, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.pixels)
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)


def test_batches_follow_the_plan() -> None:
    images, plan = some_images(10), plan_epoch(0, 0, 10, EVERYTHING)
    batches = list(Batches(images, 4, plan))
    pixels, labels, *moves = (torch.cat(column) for column in zip(*batches, strict=True))
    assert torch.equal(labels, plan.order) and torch.equal(pixels, images.pixels[plan.order])
    assert all(map(torch.equal, moves, plan.moves))


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("start", range(5))
def test_batches_resume_in_mid_epoch(start: int, planned: bool) -> None:
    images, plan = some_images(14), plan_epoch(5, 2, 14, EVERYTHING) if planned else None
    whole, rest = (Batches(images, 4, plan, first) for first in (0, start))
    assert len(whole) == len(rest) == 4
    for expected, actual in zip(list(whole)[start:], rest, strict=True):
        assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize(
    ("images", "batch_size", "ends"),
    [
        (8, 4, [4, 8]),
        (10, 4, [4, 8, 10]),
        (9, 4, [4, 9]),
        (5, 4, [5]),
        (1, 4, [1]),
        (3, 1, [1, 2, 3]),
        (3, 2, [3]),
    ],
)
def test_a_single_last_image_joins_the_batch_before(
    images: int, batch_size: int, ends: list[int]
) -> None:
    assert batch_ends(images, batch_size) == ends
    batches = list(Batches(some_images(images), batch_size))
    assert len(batches) == len(Batches(some_images(images), batch_size)) == len(ends)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(images))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("resident", [True, False])
def test_accelerator_gives_the_same_batches(resident: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    images, plan = some_images(10), plan_epoch(0, 0, 10, DataConfig(shift=2))
    there = Images(images.pixels.to(device), images.labels.to(device)) if resident else images
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)
    for here, actual in zip(
        Batches(images, 4, plan), Batches(there, 4, plan, device=device), strict=True
    ):
        assert all(
            a.device.type == device.type and torch.equal(a.cpu(), b)
            for a, b in zip(actual, here, strict=True)
        )
        pixels = augment(actual[0], Moves(*actual[2:]), DataConfig(shift=2), fill.to(device))
        assert torch.equal(
            pixels.cpu(), augment(here[0], Moves(*here[2:]), DataConfig(shift=2), fill)
        )
