"""ONNX files, written and run only if another engine computes from them what PyTorch does."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import __version__
from sparsenet.data.preprocessing import FULL_RANGE, RULE
from sparsenet.data.selection import Selection
from sparsenet.export import check_target
from sparsenet.export.check import RANDOM_IMAGES, Forward, compare, random_images, reference_model
from sparsenet.export.runtimes import Runtime
from sparsenet.extras import require
from sparsenet.files import behind_link, size_text, write_atomic
from sparsenet.model import SparseNet
from sparsenet.trained import Trained

EXPORTED_OPSET = 18  # the least that PyTorch's exporter writes
MIN_OPSET = 15  # that these are converted to, for compilers that know no later one


@dataclass(frozen=True)
class ExportReport:
    """The file that was written and how far its logits are from the model's."""

    path: Path
    opset: int
    bytes: int
    max_difference: float  # between logits, over all images compared
    max_logit: float  # largest absolute logit of the model on them
    real_images: int

    def summary(self) -> str:
        """One line to print."""
        return (
            f"{self.path}: opset {self.opset}, {size_text(self.bytes)}; onnxruntime's logits "
            f"are within {self.max_difference:.0e} of the model's on {RANDOM_IMAGES} random and "
            f"{self.real_images} real images (largest logit {self.max_logit:.1f})"
        )


def export(trained: Trained, target: Path, data: Selection | None, opset: int | None) -> str:
    """Does what ``sparsenet export --format onnx`` asks for."""
    some_images = None if data is None else data.images[:64].pixels
    return export_onnx(trained, target, some_images, opset).summary()


def export_onnx(
    trained: Trained, target: Path, real_images: Tensor | None = None, opset: int | None = None
) -> ExportReport:
    """Writes a network from normalised float32 ``images`` ``(batch, C, H, W)`` to ``logits``.

    The batch size is free; the file's metadata say how to normalise (see ``metadata``). Before
    it is written, onnxruntime's logits are compared with the model's on random images and on
    *real_images*, uint8 ``(N, C, H, W)``. Raises ``ValueError`` where they differ, and for an
    *opset* or *target* that cannot be written.
    """
    check_target(target, trained.path, "onnx")
    content, opset = onnx_file(trained, opset)
    forward = Runtime("onnxruntime").start(content)
    difference, largest = compare(trained, real_images, "onnxruntime", forward)
    write_atomic(behind_link(target), content)
    count = 0 if real_images is None else len(real_images)
    return ExportReport(target, opset, len(content), difference, largest, count)


class Exported(nn.Module):
    """The network exported and run by another engine, from normalised images to logits.

    Raises ``ValueError`` where its logits for *pixels*, uint8 ``(N, C, H, W)``, or for random
    images are not the model's. Of one image alone, the error in bf16 that others are held to would
    be a matter of luck.
    """

    def __init__(self, trained: Trained, runtime: Runtime, pixels: Tensor):
        super().__init__()
        self.run: Forward = runtime.start(onnx_file(trained)[0])
        compare(trained, pixels, runtime.name, self.run, runtime.precision)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images.contiguous())  # NumPy knows no channels-last layout


def onnx_file(trained: Trained, opset: int | None = None) -> tuple[bytes, int]:
    """The content of the file, and its opset: by default the one that PyTorch prefers."""
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        expected = f"a number from {MIN_OPSET} to {newest}"
        raise ValueError(f"--opset: expected {expected}, found {opset}")
    images = trained.preprocessing.normalise(random_images(trained))
    with _quiet():
        program = _program(reference_model(trained), images, opset and max(opset, EXPORTED_OPSET))
        program.model.metadata_props.update(metadata(trained))
        model = program.model_proto
        if opset and opset < EXPORTED_OPSET:
            model = _converted(onnx, model, opset)
        content = model.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
    return content, opset or program.model.opset_imports[""]


def metadata(trained: Trained) -> dict[str, str]:
    """What a user of the file needs: text by key; numbers, lists and objects are JSON.

    docs/how-to/preprocess.md does with it what ``preprocessing`` says.
    """
    preprocessing = trained.preprocessing
    return {
        "classes": json.dumps(trained.classes),
        "layout": "NCHW",
        "channel_order": "grey" if preprocessing.channels == 1 else "RGB",
        "preprocessing": RULE,
        "normalisation": "(pixels / 255 - mean) / std",
        "size": str(preprocessing.size),
        "channels": str(preprocessing.channels),
        "mean": json.dumps(preprocessing.mean),
        "std": json.dumps(preprocessing.std),
        "grey_range": json.dumps(preprocessing.grey_range or FULL_RANGE),
        "max_megapixels": str(preprocessing.max_megapixels),
        "dataset": trained.about.dataset,
        "architecture": json.dumps(trained.model.architecture.to_dict()),
        "sparsenet.version": __version__,
        "epoch": str(trained.about.epoch),
    }


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
        # Stack traces are a third of a small file, and name the files of the machine it is made on.
        part.metadata_props.clear()
    return program


def _converted(onnx: Any, model: Any, opset: int) -> Any:
    """The *model* in an earlier opset, and in the earliest format of files that has it."""
    for node in model.graph.node:
        if node.op_type == "ReduceMean":  # its converter leaves an attribute that came with 18
            kept = [each for each in node.attribute if each.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    model = require("onnx.version_converter", "export").convert_version(model, opset)
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter warns of its own deprecated calls and logs what it would do with torchvision.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
