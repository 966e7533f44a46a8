"""A trained network as one ONNX file, kept only if onnxruntime computes with it what PyTorch does."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsenet.extras import require
from sparsenet.model import SparseNet
from sparsenet.run import version, write_atomic

if TYPE_CHECKING:
    from sparsenet.run import Trained

OLDEST_OPSET = 18  # PyTorch's exporter writes this one and newer ones
BATCHES = (1, 2, 7)  # batch sizes at which the file is checked
# Two orders of summing in fp32 differ by some 1e-6 of the largest logit even 200 layers deep, and a wrong
# weight or constant by far more than this.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """The file that was written and how far its logits are from the model's."""

    path: Path
    opset: int
    bytes: int
    max_difference: float  # between logits, over all images checked
    max_logit: float  # largest absolute logit of the model on them
    random_images: int
    real_images: int

    def summary(self) -> str:
        """One line to print."""
        return (
            f"{self.path}: opset {self.opset}, {self.bytes / 2**20:.1f} MiB; onnxruntime's logits are within "
            f"{self.max_difference:.0e} of the model's on {self.random_images} random and {self.real_images} "
            f"real images (largest logit {self.max_logit:.1f})"
        )


def export_onnx(
    trained: Trained, target: Path, real_images: Tensor | None = None, opset: int | None = None
) -> ExportReport:
    """A network from ``images``, normalised float32 ``(batch, C, H, W)``, to ``logits (batch, classes)``.

    The batch size is free; the file's metadata say how to normalise (see :func:`metadata`). Before it is
    written it is checked, at several batch sizes, on random images and on *real_images*, uint8 ``(N, C, H, W)``.
    Raises ``ValueError`` where onnxruntime's logits differ, and for an *opset* or *target* that cannot be written.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"--opset: expected a number from {OLDEST_OPSET} to {newest}, found {opset}")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{target}: expected the name of a file in a folder that exists")
    model = SparseNet(trained.model.architecture, "reference").eval()
    model.load_state_dict({name: value.cpu() for name, value in trained.model.state_dict().items()})
    random = _random_images(trained)
    real = random[:0] if real_images is None else real_images.cpu()
    images = [trained.preprocessing.normalise(pixels) for pixels in (random, real)]
    with _quiet():
        program = _program(model, images[0], opset)
        program.model.metadata_props.update(metadata(trained))
        file = program.model_proto.SerializeToString()
        onnx.checker.check_model(file, full_check=True)
    difference, largest = _compare(model, file, images)
    try:
        write_atomic(target, file)
    except OSError as error:
        raise ValueError(f"{target}: expected a file that can be written, found: {error.strerror}") from None
    opset = program.model.opset_imports[""]
    return ExportReport(target, opset, len(file), difference, largest, len(random), len(real))


def metadata(trained: Trained) -> dict[str, str]:
    """What a user of the file needs: text by key; lists and objects are JSON."""
    preprocessing = trained.preprocessing
    values = {
        "classes": trained.classes,
        "layout": "NCHW",
        "normalisation": "(pixels / 255 - mean) / std",
        "size": preprocessing.size,
        "channels": preprocessing.channels,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "dataset": trained.dataset,
        "architecture": trained.model.architecture.to_dict(),
        "sparsenet.version": version(),
    } | {key: trained.info[key] for key in ("epoch", "error") if trained.info.get(key) is not None}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _random_images(trained: Trained) -> Tensor:
    size, channels = trained.preprocessing.size, trained.preprocessing.channels
    shape = (max(BATCHES), channels, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter warns of its own deprecated calls and logs what it would do if torchvision were there.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _program(model: SparseNet, images: Tensor, opset: int | None) -> Any:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    graph = program.model.graph
    for part in (graph, *graph):
        part.metadata_props.clear()  # stack traces: a third of a small file, and the paths of its maker's files
    return program


def _compare(model: SparseNet, file: bytes, images: list[Tensor]) -> tuple[float, float]:
    """Largest difference and largest logit over *images* in batches of every size; ``ValueError`` if far."""
    session = _session(file)
    batches = [kind[:size] for kind in images if len(kind) for size in (*BATCHES, len(kind))]
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in batches])
    found = torch.cat([torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in batches])
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:  # neither is NaN
        raise ValueError(
            f"onnx: expected onnxruntime's logits within {allowed:.1e} of the model's, "
            f"found a difference of {difference:.1e}; no file written"
        )
    return difference, largest


def _session(file: bytes) -> Any:
    runtime = require("onnxruntime", "export")
    failures = require("onnxruntime.capi.onnxruntime_pybind11_state", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings go to stderr past Python
    try:
        return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidGraph, failures.NotImplemented) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"onnx: onnxruntime {runtime.__version__} cannot run the file: {reason}") from None
