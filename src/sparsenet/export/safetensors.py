"""Weights files (``sparsenet.weights``), which say what exactly their numbers measure."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from sparsenet import weights
from sparsenet.data.selection import Selection
from sparsenet.device import computes_in_bf16
from sparsenet.evaluation import evaluate
from sparsenet.export import check_target
from sparsenet.files import behind_link, size_text, write_atomic
from sparsenet.trained import Trained
from sparsenet.weights import Measured


def export(trained: Trained, target: Path, data: Selection | None, opset: int | None = None) -> str:
    """Writes the network as a weights file and returns a line to print.

    The numbers in the file are measured on the images of *data*, in fp32 and, where the
    model's device computes in it, in bf16. Raises ``ValueError`` for a *target* that cannot be
    written and for weights that fp16 does not have.
    """
    assert data is not None, "the format needs data"
    check_target(target, trained.path, "safetensors")
    tensors = weights.rounded(trained.model.state_dict())
    model = copy.deepcopy(trained.model)
    model.load_state_dict(tensors)
    device = next(model.parameters()).device
    measured = {}
    for precision in ("fp32", "bf16") if computes_in_bf16(device) else ("fp32",):
        result = evaluate(model, data.images, trained.preprocessing, device, precision=precision)
        rates = result.error, result.top5_error
        measured[precision] = Measured(*rates, result.images, data.name, data.kind)
    content = weights.pack(tensors, dataclasses.replace(trained.about, measured=measured))
    write_atomic(behind_link(target), content)
    errors = ", ".join(f"{each.error:.2f} % in {name}" for name, each in measured.items())
    return f"{target}: {size_text(len(content))}; error {errors} ({data.description})"
