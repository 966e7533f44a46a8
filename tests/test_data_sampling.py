"""Order, shifts and flips are a function of seed, epoch and position; splits are stratified."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenet.data import Images
from sparsenet.data.sampling import Batches, augment, plan_epoch, stratified_split, stream


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
    plan = plan_epoch(3, 7, 1000, 4, True)
    assert torch.equal(plan.order.sort().values, torch.arange(1000))
    assert plan.offsets.shape == (1000, 2) and plan.offsets.unique().tolist() == list(range(9))
    assert 400 < int(plan.flips.sum()) < 600
    assert not plan_epoch(3, 7, 1000, 4, False).flips.any()
    again, other = plan_epoch(3, 7, 1000, 4, True), plan_epoch(3, 8, 1000, 4, True)
    assert torch.equal(plan.order, again.order) and torch.equal(plan.offsets, again.offsets)
    assert not torch.equal(plan.order, other.order) and not torch.equal(plan.offsets, other.offsets)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    shift=st.integers(0, 8),
    filled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_augment_equals_pad_crop_mirror_image_by_image(
    count: int, channels: int, height: int, width: int, shift: int, filled: bool, seed: int
) -> None:
    batch = torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=stream(seed))
    plan = plan_epoch(seed, 0, count, shift, True)
    fill = torch.arange(7, 7 + channels, dtype=torch.uint8) if filled else None
    found = augment(batch, plan.offsets, plan.flips, shift, fill)
    for image, (row, column), flip, result in zip(batch, plan.offsets.tolist(), plan.flips, found, strict=True):
        padded = torch.zeros(channels, height + 2 * shift, width + 2 * shift, dtype=torch.uint8)
        padded += 0 if fill is None else fill.view(-1, 1, 1)
        padded[:, shift : shift + height, shift : shift + width] = image
        crop = padded[:, row : row + height, column : column + width]
        assert torch.equal(result, crop.flip(-1) if flip else crop)
    assert found.shape == batch.shape and found.dtype == torch.uint8


def test_centre_offset_without_flip_is_the_identity() -> None:
    pixels = some_images(4).pixels
    same = augment(pixels, torch.full((4, 2), 3), torch.zeros(4, dtype=torch.bool), 3)
    assert torch.equal(same, pixels)


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
    assert all(torch.equal(a, b) for a, b in zip(stratified_split(tensor, fraction, seed), (kept, held), strict=True))


def test_batches_without_a_plan_are_the_split() -> None:
    images = some_images(10)
    batches = list(Batches(images, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.pixels)
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)


def test_batches_follow_the_plan() -> None:
    images, plan, fill = some_images(10), plan_epoch(0, 0, 10, 2, True), torch.tensor([1, 2, 3], dtype=torch.uint8)
    batches = list(Batches(images, 4, plan, 2, fill))
    assert torch.equal(torch.cat([labels for _, labels in batches]), plan.order)
    whole = augment(images.pixels[plan.order], plan.offsets, plan.flips, 2, fill)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), whole)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("start", range(5))
def test_batches_resume_in_mid_epoch(start: int, planned: bool) -> None:
    images, plan = some_images(13), plan_epoch(5, 2, 13, 1, True) if planned else None
    whole, rest = (Batches(images, 4, plan, 1, start=first) for first in (0, start))
    assert len(whole) == len(rest) == 4
    for expected, found in zip(list(whole)[start:], rest, strict=True):
        assert all(map(torch.equal, expected, found))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("resident", [True, False])
def test_accelerator_gives_the_same_batches(resident: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    images, plan, fill = some_images(10), plan_epoch(0, 0, 10, 2, True), torch.tensor([1, 2, 3], dtype=torch.uint8)
    there = Images(images.pixels.to(device), images.labels.to(device)) if resident else images
    found = Batches(there, 4, plan, 2, fill, device=device)
    for (p, k), (q, m) in zip(Batches(images, 4, plan, 2, fill), found, strict=True):
        assert q.device.type == device.type and torch.equal(p, q.cpu()) and torch.equal(k, m.cpu())
