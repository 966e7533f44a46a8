"""Classes of image files, decoded by many threads and classified batch by batch, in the order given."""

# os.path and glob: pathlib raises where a folder may not be entered, which here is the error of one file only.
# ruff: noqa: PTH111, PTH112, PTH207
from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sparsenet.data.dataset import Example, Images
from sparsenet.data.errors import BadImage
from sparsenet.data.images import SUFFIXES, read_image, read_images
from sparsenet.trained import Trained


@dataclass(frozen=True)
class Prediction:
    """The most probable *classes* of the image at *path*, best first, or the one-line *error* that it met."""

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()  # from 0 to 1, of all classes, in the order of *classes*
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object: ``path`` and either ``classes`` and ``probabilities``, or ``error``."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "classes": self.classes, "probabilities": self.probabilities}


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The image files that *patterns* (files, folders, globs; ``**`` goes deep) name, in the order given.

    A folder gives every image file in it and below, hidden ones left out, sorted. What names nothing stays in
    the list as it is, so that :func:`predict` reports it in its place and goes on with the others.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        images = [
            image
            for match in matches
            for image in (_inside(match) if os.path.isdir(match) else [Path(match)])
        ]
        found += images or [Path(path)]
    return found


def _inside(folder: str) -> list[Path]:
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(where, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found)


def predict(
    trained: Trained, paths: Iterable[Path], top: int = 5, batch_size: int = 64
) -> Iterator[Prediction]:
    """The *top* classes of the images at *paths*, one :class:`Prediction` a path and in their order.

    It runs where the model lies and holds one batch of images at a time. A file that cannot be read gives a
    prediction with an error. Raises ``ValueError`` for a *top* or *batch_size* below 1.
    """
    for flag, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{flag}: expected at least 1, found {value}")
    rest = iter(paths)
    batches = iter(lambda: list(islice(rest, batch_size)), [])
    return (prediction for batch in batches for prediction in _predict_batch(trained, batch, top))


def _predict_batch(trained: Trained, paths: list[Path], top: int) -> list[Prediction]:
    # The label of an example is its place in the batch: those missing afterwards could not be read.
    examples = [Example(str(path), path, place) for place, path in enumerate(paths)]
    preprocessing = trained.preprocessing
    images, _ = read_images(examples, preprocessing.size, preprocessing.channels, skip_corrupt=True)
    predictions = dict(
        zip(images.labels.tolist(), _classify(trained, images, paths, top), strict=True)
    )
    return [predictions.get(place) or _failure(trained, path) for place, path in enumerate(paths)]


@torch.inference_mode()
def _classify(
    trained: Trained, images: Images, paths: list[Path], top: int
) -> Iterator[Prediction]:
    if not len(images):
        return
    device = next(trained.model.parameters()).device
    logits = trained.model(
        trained.preprocessing.normalise(images.pixels.to(device))
    )  # (N, classes)
    best = logits.float().softmax(1).topk(min(top, len(trained.classes)), 1)
    rows = zip(images.labels.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    for place, indices, probabilities in rows:
        classes = tuple(trained.classes[index] for index in indices)
        yield Prediction(str(paths[place]), classes, tuple(probabilities))


def _failure(trained: Trained, path: Path) -> Prediction:
    """Reads *path* once more, alone, to learn what was wrong with it."""
    error = f"{path}: expected an image, found one that changed while it was read"
    if os.path.isdir(path):
        error = f"{path}: expected a folder with images, found none in it"
    elif not os.path.lexists(path):
        error = f"{path}: expected an image, a folder or a glob that matches some, found nothing of that name"
    else:
        try:
            read_image(path, trained.preprocessing.size, trained.preprocessing.channels)
        except BadImage as bad:
            error = str(bad)
    return Prediction(str(path), error=error)
