"""Trained networks, loaded from whatever names one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from sparsenet import addresses, checkpoints, weights, zoo
from sparsenet.checkpoints import Checkpoint, Manifest
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.device import place
from sparsenet.files import with_home
from sparsenet.model import SparseNet
from sparsenet.ops.implementations import IMPLEMENTATIONS
from sparsenet.run import Run
from sparsenet.texts import shown
from sparsenet.weights import About, Description


@dataclass(frozen=True)
class Trained:
    """A trained network and all that is needed to use it."""

    path: Path  # the run folder, or the weights file
    model: SparseNet  # in evaluation mode
    about: About
    step: int | None = None  # of a run: optimizer steps that led to these weights
    warnings: tuple[str, ...] = ()  # damaged checkpoints that were passed over
    source: str = ""  # what named the weights, such as an address

    @property
    def name(self) -> str:
        """What people call it: the folder of the run, or the file without its suffix."""
        place = self.source or self.path
        if os.path.isdir(place):  # noqa: PTH112
            name = Path(place).resolve().name
            return name if self.path.is_dir() else name.removesuffix("-hf")  # as export calls it
        is_address = addresses.can_fetch(self.source)
        source = re.split(r"[?#]", self.source)[0] if is_address else self.source or str(self.path)
        return re.split(r"[/\\]", source)[-1].removesuffix(".safetensors")

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

    *source* is, in this order: a folder or file that exists, an address (``https://``, ``hf://``),
    a name of ``sparsenet.list_models`` that has weights. Raises ``ValueError`` in one line
    (``RunError`` for a run folder).
    """
    source = with_home(str(source))
    is_folder = os.path.isdir(source)  # noqa: PTH112 - pathlib raises for what none can be called
    if is_folder and not weights.in_folder(source):
        return _load_run(Path(source), kind, device, implementation)
    file = weights.load(source, alternatives="a run folder, ")
    if kind != "best":
        expected = f"none for {source}, which is one set of weights"
        raise ValueError(f"--checkpoint: expected {expected}, found {kind!r}")
    stored = zoo.stored_architecture(file.about, file.tensors, file.source)
    model = zoo.build(stored, file.tensors, file.source, implementation)
    return Trained(file.path, place(model.eval(), device), file.about, source=file.source)


def _load_run(path: Path, kind: str, device: torch.device | str, implementation: str) -> Trained:

    if implementation not in ("auto", *IMPLEMENTATIONS):
        expected = f"auto or one of {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(f"implementation: expected {expected}, found {shown(implementation)}")

    def build(checkpoint: Checkpoint) -> tuple[SparseNet, Manifest]:
        averaged = any(name.startswith("average.") for name in checkpoint.tensors)
        # The weights that are evaluated.
        tensors = checkpoint.part("average." if averaged else "model.")
        manifest, source = checkpoint.manifest, str(checkpoint.path)
        stored = zoo.stored_architecture(manifest.about, tensors, source)
        return zoo.build(stored, tensors, source, implementation), manifest

    (model, manifest), warnings = checkpoints.restore(Run.open(path).checkpoints, kind, build)
    described = {each.name: getattr(manifest.about, each.name) for each in fields(Description)}
    about = About(**described, epoch=manifest.epoch)
    model = place(model.eval(), device)
    return Trained(path, model, about, manifest.step, tuple(warnings))
