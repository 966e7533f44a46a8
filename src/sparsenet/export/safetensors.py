"""Weights files (:mod:`sparsenet.weights`), which say what exactly their numbers measure."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sparsenet import weights
from sparsenet.data.dataset import Dataset
from sparsenet.device import computes_in_bf16
from sparsenet.evaluate import evaluate
from sparsenet.export import check_target, write_target
from sparsenet.trained import Trained
from sparsenet.weights import Measured


@dataclass(frozen=True)
class WeightsReport:
    """The weights file that was written and, by precision, what exactly its numbers measure."""

    path: Path
    bytes: int
    measured: dict[str, Measured]

    def summary(self) -> str:
        """One line to print."""
        results = self.measured.items()
        errors = ", ".join(f"{each.error:.2f} % in {precision}" for precision, each in results)
        images = f"{self.measured['fp32'].images} images of {self.measured['fp32'].dataset}"
        return f"{self.path}: {self.bytes / 2**20:.1f} MiB; error {errors} ({images})"


def export(trained: Trained, target: Path, data: Dataset | None, opset: int | None) -> str:
    """Does what ``sparsenet export --format safetensors`` asks for."""
    assert data is not None, "the format needs data"
    return export_weights(trained, target, data).summary()


def export_weights(trained: Trained, target: Path, data: Dataset) -> WeightsReport:
    """Writes the network as a weights file.

    The numbers in the file are measured on the test images of *data*, in fp32 and, where the
    model's device computes in it, in bf16. Raises ``ValueError`` for a *target* that cannot be
    written and for weights that fp16 does not have.
    """
    check_target(target)
    if target.resolve() == trained.path.resolve():
        expected = "another file than the weights themselves"
        raise ValueError(f"--out: expected {expected}, found {target}")
    tensors = weights.rounded(trained.model.state_dict())
    model = copy.deepcopy(trained.model)
    model.load_state_dict(tensors)
    device = next(model.parameters()).device
    measured = {}
    for precision in ("fp32", "bf16") if computes_in_bf16(device) else ("fp32",):
        result = evaluate(model, data.test, trained.preprocessing, device, precision=precision)
        measured[precision] = Measured(result.error, result.top5_error, result.images, data.name)
    about = dataclasses.replace(trained.about, measured=measured)
    content = weights.pack(tensors, about)
    write_target(target, content)
    return WeightsReport(target, len(content), measured)
