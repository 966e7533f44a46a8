"""A whole epoch as the program trains it: data, augmentation, optimizer and evaluation, on random images."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench.measure import Spread, spread
from benchmarks.bench.variants import THEIRS, Variant
from sparsenet.architecture import Architecture
from sparsenet.config import RunConfig, TrainConfig
from sparsenet.data.config import DataConfig
from sparsenet.events import EpochDone, Event, Message
from sparsenet.run import Run
from sparsenet.train import train

TRAIN, TEST = 50_000, 10_000  # images of CIFAR-10
EPOCHS = 3  # measured, after one that records, tunes and fills caches
RECORD = 1 + 3 * 32 * 32  # bytes of a label and an image


def trained(variant: Variant) -> bool:
    """Whether the program has this way to train: all but what is here to be compared with."""
    return variant.implementation not in THEIRS and set(variant.options) <= {"lean", "captured"}


def epochs(
    variants: Sequence[Variant],
    architecture: Architecture,
    batch_size: int,
    image_size: int,
    device: torch.device,
    images: int,
) -> dict[Variant, dict[str, Any]]:
    """Seconds of a training epoch over *images* and of a pass over a fifth of them; they take turns epoch by epoch.

    Other numbers than CIFAR-10's are scaled to its 50,000 and 10,000 and say so.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "data"), images, -(-images * TEST // TRAIN))
        data = DataConfig(
            dataset="c10", dataset_dir=str(Path(folder, "data")), image_size=image_size
        )
        runs = {}
        for variant in variants:
            how = TrainConfig(
                batch_size=batch_size, max_epoch=2 + EPOCHS, device=str(device), precision=variant.precision,
                implementation=variant.implementation, capture="captured" in variant.options, save_every=1e9,
                memory="lean" if "lean" in variant.options else "normal",
            )  # fmt: skip
            run = Run.create(Path(folder, str(variant)))
            runs[variant] = train(RunConfig(network=architecture, data=data, train=how), run)
        rows: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _ in range(1 + EPOCHS):
            for variant, events in runs.items():
                rows[variant].append(_next_row(variant, events))
        for events in runs.values():
            events.close()  # type: ignore[attr-defined]
    return {variant: _summary(found[1:], images, batch_size) for variant, found in rows.items()}


def _next_row(variant: Variant, events: Iterator[Event]) -> dict[str, Any]:
    """Of the next epoch; ``ValueError`` where one that was to be recorded was not."""
    for event in events:
        if isinstance(event, EpochDone):
            return dataclasses.asdict(event.metrics)
        if (
            isinstance(event, Message)
            and "captured" in variant.options
            and "not captured" in event.text
        ):
            raise ValueError(f"bench: an epoch of {variant}: {event.text}")
    raise AssertionError("training ended before its last epoch")


def _summary(rows: Sequence[Mapping[str, float]], images: int, batch_size: int) -> dict[str, Any]:
    scale = TRAIN / images
    found: dict[str, Any] = {"batch_size": batch_size, "images": images}
    for name, column in (("train_seconds", "seconds"), ("test_seconds", "eval_seconds")):
        taken: Spread = spread([row[column] * scale for row in rows])
        found[name] = taken
    return {**found, "estimated_from_steps": None if images == TRAIN else -(-images // batch_size)}


def write_images(folder: Path, train_images: int, test_images: int) -> None:
    """Random pixels and labels in the binary layout of CIFAR-10, unpacked."""
    target, random = folder / "cifar-10-batches-bin", np.random.default_rng(0)
    target.mkdir(parents=True)
    counts = {
        f"data_batch_{i}": len(part)
        for i, part in enumerate(np.array_split(np.empty(train_images), 5), 1)
    }
    for name, count in (counts | {"test_batch": test_images}).items():
        records = random.integers(0, 256, (count, RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        (target / f"{name}.bin").write_bytes(records.tobytes())
    (target / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)))
