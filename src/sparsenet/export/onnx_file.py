"""A network as the content of an ONNX file, with all that a user of the file needs in its metadata."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsenet import __version__
from sparsenet.export.check import random_images
from sparsenet.extras import require
from sparsenet.model import SparseNet
from sparsenet.trained import Trained

OLDEST_OPSET = 18  # PyTorch's exporter writes this one and newer ones


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
        "sparsenet.version": __version__,
    } | {key: trained.info[key] for key in ("epoch", "error") if trained.info.get(key) is not None}
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }


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


def onnx_file(model: SparseNet, trained: Trained, opset: int | None) -> tuple[bytes, int]:
    """The content of the ONNX file and its opset."""
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"--opset: expected a number from {OLDEST_OPSET} to {newest}, found {opset}"
        )
    with _quiet():
        program = _program(model, trained.preprocessing.normalise(random_images(trained)), opset)
        program.model.metadata_props.update(metadata(trained))
        file = program.model_proto.SerializeToString()
        onnx.checker.check_model(file, full_check=True)
    return file, program.model.opset_imports[""]


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
