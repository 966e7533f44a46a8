"""Trained networks as files that run elsewhere. A new format is an entry here and its module."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Format:
    """What is known of a format before its module, which needs PyTorch, is imported.

    The module has a function ``export(trained, target, data, opset)`` that writes the file *target*
    and returns a line to print. *data* is ``None`` where the images are not at hand and the format
    does not need them.
    """

    module: str
    help: str
    needs_data: bool = False  # the test images must be there
    on_cpu_only: bool = False


FORMATS = {  # the names are also the suffixes of the files
    "onnx": Format("sparsenet.export.onnx", "onnx, checked against the model", on_cpu_only=True),
    "safetensors": Format(
        "sparsenet.export.safetensors",
        "safetensors: weights in fp16, with their error on the test images",
        needs_data=True,
    ),
}
RUNTIMES = ("onnxruntime", "openvino")  # that run an ONNX file: sparsenet.export.runtimes


def check_target(target: Path, source: Path, format: str) -> None:
    """Raises ``ValueError`` for a file that could not be written, before there is work done.

    Nor may it be the *source* of the weights, or have the suffix of another format.
    """
    if target.resolve() == source.resolve():
        expected = "another file than the weights themselves"
        raise ValueError(f"--out: expected {expected}, found {target}")
    if (suffix := target.suffix.removeprefix(".")) in FORMATS and suffix != format:
        expected = f"a name that ends in .{format}, or --format {suffix}"
        raise ValueError(f"--out: expected {expected}, found {target}")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{target}: expected the name of a file in a folder that exists")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target}: expected a folder that can be written, found one that cannot")
