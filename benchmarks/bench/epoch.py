"""A whole epoch as the program trains it: data, augmentation, optimizer and evaluation."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.bench.record import Epoch, Spread
from benchmarks.bench.variants import TORCHVISION, Variant
from benchmarks.bench.workload import Case
from sparsenet.config import RunConfig, TrainConfig
from sparsenet.data.config import DataConfig
from sparsenet.events import EpochDone, Event, Message
from sparsenet.run import Run
from sparsenet.train import train

TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # of CIFAR-10
EPOCHS = 3  # that are measured, after one that records, tunes and fills caches
RECORD_BYTES = 1 + 3 * 32 * 32  # a label and an image


def can_train(variant: Variant) -> bool:
    """Says whether the program itself can train this way."""
    return variant.implementation != TORCHVISION and set(variant.options) <= {"captured"}


def measure_epochs(
    variants: Sequence[Variant], case: Case, images: int = TRAIN_IMAGES
) -> dict[Variant, Epoch]:
    """Times epochs of *images* random images, and test passes over a fifth; variants take turns.

    Times of other numbers of images are scaled to those of CIFAR-10.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data", images, -(-images * TEST_IMAGES // TRAIN_IMAGES))
        runs = {variant: Run.create(folder / str(variant)) for variant in variants}
        trainings = {
            variant: train(_run_config(variant, case, folder / "data"), run)
            for variant, run in runs.items()
        }
        for _ in range(1 + EPOCHS):
            for variant, events in trainings.items():
                _train_one_epoch(variant, events)
        for events in trainings.values():
            events.close()  # type: ignore[attr-defined]
        return {variant: _summary(run, images, case.batch_size) for variant, run in runs.items()}


def _run_config(variant: Variant, case: Case, data: Path) -> RunConfig:
    return RunConfig(
        network=case.network,
        data=DataConfig(dataset="c10", dataset_dir=str(data), image_size=case.image_size),
        train=TrainConfig(
            batch_size=case.batch_size,
            max_epoch=2 + EPOCHS,
            device=str(case.device),
            precision=variant.precision,
            implementation=variant.implementation,
            capture="captured" in variant.options,
            save_every=1e9,
        ),
    )


def _train_one_epoch(variant: Variant, events: Iterator[Event]) -> None:
    for event in events:
        if isinstance(event, EpochDone):
            return
        text = event.text if isinstance(event, Message) else ""
        if "not captured" in text and "captured" in variant.options:
            raise ValueError(f"an epoch of {variant}: {text}")
    raise AssertionError("training ended before its last epoch")


def _summary(run: Run, images: int, batch_size: int) -> Epoch:
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[1:]
    scale = TRAIN_IMAGES / images
    return Epoch(
        batch_size=batch_size,
        images=images,
        train_seconds=Spread.of([float(row["seconds"]) * scale for row in rows]),
        test_seconds=Spread.of([float(row["eval_seconds"]) * scale for row in rows]),
        estimated_from_steps=None if images == TRAIN_IMAGES else -(-images // batch_size),
    )


def write_images(folder: Path, train_images: int, test_images: int) -> None:
    """Writes random pixels and labels in the binary layout of CIFAR-10."""
    target, random = folder / "cifar-10-batches-bin", np.random.default_rng(0)
    target.mkdir(parents=True)
    counts = {f"data_batch_{i}": (train_images + 5 - i) // 5 for i in range(1, 6)}
    for name, count in (counts | {"test_batch": test_images}).items():
        records = random.integers(0, 256, (count, RECORD_BYTES), dtype=np.uint8)
        records[:, 0] %= 10
        (target / f"{name}.bin").write_bytes(records.tobytes())
    (target / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)))
