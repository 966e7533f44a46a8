"""Weights files (``sparsenet.weights``), which say what exactly their numbers measure."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from sparsenet import weights
from sparsenet.data.selection import Selection
from sparsenet.device import computes_in_bf16
from sparsenet.evaluation import Evaluation, EvaluationStep, evaluate
from sparsenet.export import check_target
from sparsenet.files import behind_link, size_text, write_atomic
from sparsenet.trained import Trained
from sparsenet.weights import About, Measured


def export(trained: Trained, target: Path, data: Selection | None, opset: int | None = None) -> str:
    """Writes the network as a weights file and returns a line to print.

    The numbers in the file are ``measured`` on the images of *data*. Raises ``ValueError`` for a
    *target* that cannot be written and for weights that fp16 does not have.
    """
    assert data is not None, "the format needs data"
    check_target(target, trained.path, "safetensors")
    content, about, _ = measured(trained, data)
    write_atomic(behind_link(target), content)
    return f"{target}: {size_text(len(content))}; {errors(about, data)}"


def measured(trained: Trained, data: Selection) -> tuple[bytes, About, Evaluation]:
    """The content of a weights file, what it says, and what its numbers come to in fp32.

    They are measured on the images of *data*, also in bf16 where the model's device computes in it.
    Raises ``ValueError`` for weights that fp16 does not have.
    """
    tensors = weights.rounded(trained.model.state_dict())
    model = copy.deepcopy(trained.model)
    model.load_state_dict(tensors)
    device = next(model.parameters()).device
    found = {
        precision: evaluate(
            EvaluationStep(model, trained.preprocessing, precision), data.images, device
        )
        for precision in (("fp32", "bf16") if computes_in_bf16(device) else ("fp32",))
    }
    stated = {
        precision: Measured(each.error, each.top5_error, each.images, data.name, data.kind)
        for precision, each in found.items()
    }
    about = dataclasses.replace(trained.about, measured=stated)
    return weights.pack(tensors, about), about, found["fp32"]


def errors(about: About, data: Selection) -> str:
    """What was measured on the images of *data*, to print."""
    rates = ", ".join(f"{each.error:.2f} % in {name}" for name, each in about.measured.items())
    return f"error {rates} ({data.description})"
