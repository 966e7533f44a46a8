"""A trained network as one ONNX file, kept only if onnxruntime computes with it what PyTorch does."""

from __future__ import annotations

import json
import logging
import os
import tempfile
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
from sparsenet.run import version

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


def export_onnx(
    trained: Trained, target: Path, real_images: Tensor | None = None, opset: int | None = None
) -> ExportReport:
    """A network from ``images``, normalised float32 ``(batch, C, H, W)``, to ``logits (batch, classes)``.

    The batch size is free; the file's metadata say how to normalise (see :func:`metadata`). Before the file
    gets its name it is checked, at several batch sizes, on random images and on *real_images*, uint8
    ``(N, C, H, W)``. Raises ``ValueError`` for an *opset* or *target* that cannot be written, and, keeping no
    file, where onnxruntime's logits differ.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"--opset: expected a number from {OLDEST_OPSET} to {newest}, found {opset}")
    model = SparseNet(trained.model.architecture, "reference").eval()
    model.load_state_dict({name: value.cpu() for name, value in trained.model.state_dict().items()})
    random = _random_images(trained)
    real = random[:0] if real_images is None else real_images[: max(BATCHES)].cpu()
    with _temporary(target) as temporary, _quiet():
        program = _program(model, trained.preprocessing.normalise(random), opset)
        program.model.metadata_props.update(metadata(trained))
        program.save(temporary, external_data=False)
        onnx.checker.check_model(temporary, full_check=True)
        images = [trained.preprocessing.normalise(pixels) for pixels in (random, real) if len(pixels)]
        difference, largest = _compare(model, temporary, images)
        temporary.replace(target)
    opset = program.model.opset_imports[""]
    return ExportReport(target, opset, target.stat().st_size, difference, largest, len(random), len(real))


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
def _temporary(target: Path) -> Iterator[Path]:
    """A file beside *target* that is gone afterwards unless it was renamed."""
    if target.is_dir():
        raise ValueError(f"{target}: expected the name of a file to write, found a folder")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ValueError(f"{target}: expected a file that can be written, found: {error.strerror}") from None
    os.close(handle)
    try:
        Path(name).chmod(0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


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


def _compare(model: SparseNet, file: Path, images: list[Tensor]) -> tuple[float, float]:
    """Largest difference and largest logit over *images* in batches of every size; ``ValueError`` if far."""
    session = _session(file)
    difference = largest = 0.0
    for batch in (kind[:size] for kind in images for size in BATCHES):
        with torch.no_grad():
            expected = model(batch)
        found = torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
        if found.shape != expected.shape or not found.isfinite().all():
            shape = tuple(expected.shape)
            raise ValueError(f"onnx: expected {shape} finite logits, found others; no file kept")
        difference = max(difference, (found - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if difference > TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"onnx: expected onnxruntime's logits within {TOLERANCE * max(1.0, largest):.1e} of the model's, "
            f"found a difference of {difference:.1e}; no file kept"
        )
    return difference, largest


def _session(file: Path) -> Any:
    runtime = require("onnxruntime", "export")
    failures = require("onnxruntime.capi.onnxruntime_pybind11_state", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings go to stderr past Python
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidGraph, failures.NotImplemented) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"onnx: onnxruntime {runtime.__version__} cannot run the file: {reason}") from None
