"""Export to a weights file (:mod:`sparsenet.weights`), which says what exactly its numbers measure."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsenet import weights
from sparsenet.data.dataset import Dataset
from sparsenet.device import computes_in_bf16
from sparsenet.evaluate import evaluate
from sparsenet.export.target import check_target, write
from sparsenet.trained import Trained


@dataclass(frozen=True)
class WeightsReport:
    """The weights file that was written and what exactly its numbers measure."""

    path: Path
    bytes: int
    measured: dict[str, dict[str, Any]]  # by precision: see :data:`sparsenet.weights.RESULT`

    def summary(self) -> str:
        """One line to print."""
        errors = ", ".join(
            f"{found['error']:.2f} % in {precision}" for precision, found in self.measured.items()
        )
        of = "{images} images of {dataset}".format(**self.measured["fp32"])
        return f"{self.path}: {self.bytes / 2**20:.1f} MiB; error {errors} ({of})"


def export_weights(trained: Trained, target: Path, data: Dataset) -> WeightsReport:
    """The network as a weights file (:mod:`sparsenet.weights`), in which it is rounded and says what it measures then.

    It is measured on the test images of *data*, in fp32 and where the model's device computes in it in bf16. Raises
    ``ValueError`` for a *target* that cannot be written and for weights that fp16 does not have.
    """
    check_target(target)
    if target.resolve() == trained.path.resolve():
        raise ValueError(
            f"--out: expected another file than the weights themselves, found {target}"
        )
    tensors = weights.rounded(trained.model.state_dict())
    model = copy.deepcopy(trained.model)
    model.load_state_dict(tensors)
    device = next(model.parameters()).device
    measured = {}
    for precision in ("fp32", "bf16") if computes_in_bf16(device) else ("fp32",):
        found = evaluate(model, data.test, trained.preprocessing, device, precision=precision)
        errors = {"error": found.error, "top5_error": found.top5_error}
        measured[precision] = {**errors, "images": found.images, "dataset": data.name}
    about = {name: value for name, value in trained.info.items() if name != "step"}
    file = weights.pack(tensors, {**about, "measured": measured})
    write(target, file)
    return WeightsReport(target, len(file), measured)


def export(
    trained: Trained, target: Path, data: Dataset | None, opset: int | None
) -> WeightsReport:
    """What ``sparsenet export --format safetensors`` does."""
    assert data is not None, "the format needs data"
    return export_weights(trained, target, data)
