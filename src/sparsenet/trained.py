"""Trained networks, loaded from whatever names one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from sparsenet import checkpoints, weights, zoo
from sparsenet.architecture import Architecture
from sparsenet.checkpoints import RunError
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.device import place
from sparsenet.model import SparseNet
from sparsenet.run import Run
from sparsenet.weights import About


@dataclass(frozen=True)
class Trained:
    """A trained network and all that is needed to use it."""

    path: Path  # the run folder, or the weights file
    model: SparseNet  # in evaluation mode
    about: About
    step: int | None = None  # of a run: optimizer steps that led to these weights
    warnings: tuple[str, ...] = ()  # damaged checkpoints that were passed over

    @property
    def preprocessing(self) -> Preprocessing:
        return self.about.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        return self.about.classes


def load_trained(
    source: Path | str,
    kind: str = "best",
    device: torch.device | str = "cpu",
    implementation: str = "auto",
) -> Trained:
    """The network of a run folder, from its ``best`` or ``last`` checkpoint, or of weights.

    *source* is, in this order: a folder or file that exists, an ``https://`` address, a name of
    ``sparsenet.list_models`` that has weights. Raises ``ValueError`` in one line
    (``RunError`` for a run folder).
    """
    if os.path.isdir(source):  # noqa: PTH112 - where pathlib raises for what none can be called
        return _load_run(Path(source), kind, device, implementation)
    file = weights.load(source, alternatives="a run folder, ")
    if kind != "best":
        expected = f"none for {source}, which is one set of weights"
        raise ValueError(f"--checkpoint: expected {expected}, found {kind!r}")
    model = zoo.build(zoo.stored_architecture(file), file, implementation)
    return Trained(file.path, place(model.eval(), device), file.about)


def _load_run(path: Path, kind: str, device: torch.device | str, implementation: str) -> Trained:
    checkpoint, warnings = checkpoints.restore(Run.open(path).checkpoints, kind)
    manifest = checkpoint.manifest
    try:
        about = msgspec.convert({**manifest.about, "epoch": manifest.epoch}, About)
        model = SparseNet(Architecture(**about.architecture), implementation)
    except (LookupError, TypeError, ValueError) as error:
        expected = "an architecture that this version knows"
        raise RunError(f"{checkpoint.path}: expected {expected}, found: {error}") from None
    if problem := about.preprocessing.problem():
        raise RunError(f"{checkpoint.path}: expected the statistics of images, found {problem}")
    averaged = any(name.startswith("average.") for name in checkpoint.tensors)
    prefix = "average." if averaged else "model."  # the weights that are evaluated
    try:
        model.load_state_dict(checkpoint.part(prefix))
    except RuntimeError as error:
        problem = f"its weights do not fit its architecture ({error})"
        raise RunError(f"{checkpoint.path}: {problem}") from None
    model = place(model.eval(), device)
    return Trained(path, model, about, manifest.step, tuple(warnings))
