"""Trained networks as files that run elsewhere. A new format is one entry here and the module it names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """What is known of a format before its module is loaded.

    The module offers ``export(trained, target, data, opset)``, which writes the file *target* and returns a report
    with ``summary()``. *data* is ``None`` where the images are not at hand and the format does not need them.
    """

    module: str
    help: str
    needs_data: bool  # whether the test images must be there
    on_cpu_only: bool


FORMATS = {  # the names are also the ends of the files' names
    "onnx": Format("sparsenet.export.onnx", "onnx, checked against the model", False, True),
    "safetensors": Format(
        "sparsenet.export.safetensors",
        "safetensors: weights in fp16, with their error on the test images",
        True,
        False,
    ),
}
RUNTIMES = (
    "onnxruntime",
    "openvino",
)  # engines that can run an exported network: see sparsenet.export.runtimes
