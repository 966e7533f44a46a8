"""Trained networks: whatever names one, with all that is needed to use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsenet import checkpoints, weights, zoo
from sparsenet.architecture import Architecture
from sparsenet.checkpoints import RunError
from sparsenet.data.images import Preprocessing
from sparsenet.device import place
from sparsenet.model import SparseNet
from sparsenet.run import Run


@dataclass(frozen=True)
class Trained:
    """A trained network and all that is needed to use it."""

    path: Path  # the run folder, or the weights file
    model: SparseNet  # in evaluation mode
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    dataset: str
    info: dict[str, Any]  # epoch, recipe, version: what the weights say of themselves
    warnings: tuple[str, ...] = ()  # damaged checkpoints that were passed over


def load_trained(
    source: Path | str,
    kind: str = "best",
    device: torch.device | str = "cpu",
    implementation: str = "auto",
) -> Trained:
    """The network of a run folder, from its ``best`` or ``last`` checkpoint, or of whatever names weights.

    That is, in this order: a folder or file that exists, an ``https://`` address, a name of
    :func:`sparsenet.list_models` that has weights. Raises ``ValueError`` in one line (:class:`RunError` for a run
    folder).
    """
    if weights.exists(str(source)) and Path(source).is_dir():
        return _from_run(Path(source), kind, device, implementation)
    found = weights.load(source, also="a run folder, ")
    if kind != "best":
        raise ValueError(
            f"--checkpoint: expected none for {source}, which is one set of weights, found {kind!r}"
        )
    model = zoo.filled(zoo.stored_architecture(found), found, implementation)
    return _trained(found.path, model, device, found.about)


def _from_run(path: Path, kind: str, device: torch.device | str, implementation: str) -> Trained:
    checkpoint, warnings = checkpoints.restore(Run.open(path).checkpoints, kind)
    about = checkpoint.manifest.about
    try:
        model = SparseNet(Architecture(**about["architecture"]), implementation)
    except TypeError as error:
        raise RunError(
            f"{checkpoint.path}: expected an architecture that this version knows, found: {error}"
        ) from None
    averaged = any(name.startswith("average.") for name in checkpoint.tensors)
    prefix = "average." if averaged else "model."  # the weights that are evaluated
    tensors = {
        k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(
            f"{checkpoint.path}: its weights do not fit its architecture ({error})"
        ) from None
    info = {**about, "epoch": checkpoint.manifest.epoch, "step": checkpoint.manifest.step}
    return _trained(path, model, device, info, tuple(warnings))


def _trained(
    path: Path,
    model: SparseNet,
    device: torch.device | str,
    info: dict[str, Any],
    warnings: tuple[str, ...] = (),
) -> Trained:
    return Trained(
        path,
        place(model.eval(), device),
        Preprocessing(**info["preprocessing"]),
        tuple(info["classes"]),
        info["dataset"],
        info,
        warnings,
    )
