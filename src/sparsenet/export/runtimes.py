"""Engines other than PyTorch that run an exported network on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.export import RUNTIMES
from sparsenet.export.check import Pass, compare, random_images, specification
from sparsenet.export.onnx_file import onnx_file
from sparsenet.extras import require
from sparsenet.trained import Trained


@dataclass(frozen=True)
class Runtime:
    """An engine other than PyTorch, one of :data:`RUNTIMES`, on the CPU with as many threads as PyTorch has.

    *precision* is ``fp32``, ``bf16`` or ``auto``: bf16 where the engine computes in it on this machine, else fp32.
    Raises ``ValueError`` for one that it does not.
    """

    name: str
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise ValueError(
                f"--engine: expected one of {', '.join(RUNTIMES)}, found {self.name!r}"
            )
        able = _precisions(self.name)
        if self.precision == "auto":
            object.__setattr__(self, "precision", able[-1])
        if self.precision not in able:
            expected = " or ".join(able)
            raise ValueError(
                f"--precision: expected {expected} for {self.name} on this CPU, found {self.precision}"
            )

    def load(self, trained: Trained, pixels: Tensor) -> nn.Module:
        """The network exported and run by this engine: a module from normalised images to logits.

        Raises ``ValueError`` where its logits for *pixels*, uint8 ``(N, C, H, W)``, or for random images are not the
        model's: of one image alone, the error in bf16 that others are held to would be a matter of luck.
        """
        model = specification(trained)
        file, _ = onnx_file(model, trained, None)
        run = PASSES[self.name](file, self.precision)
        images = [
            trained.preprocessing.normalise(each) for each in (random_images(trained), pixels.cpu())
        ]
        compare(model, images, self.name, run, self.precision)
        return _Exported(run)


class _Exported(nn.Module):
    def __init__(self, run: Pass):
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images.contiguous())  # an array knows no other layout


def onnxruntime(file: bytes, precision: str = "fp32") -> Pass:
    runtime = require("onnxruntime", "export")
    failures = require("onnxruntime.capi.onnxruntime_pybind11_state", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings go to stderr past Python
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidGraph, failures.NotImplemented) as error:
        raise _cannot_run("onnxruntime", runtime, error) from None
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _openvino(file: bytes, precision: str) -> Pass:
    core = _openvino_core()
    hints = {
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[
            precision
        ],  # its own choice is bf16
    }
    try:
        compiled = core.compile_model(core.read_model(file), "CPU", hints)
    except RuntimeError as error:
        raise _cannot_run("openvino", sys.modules["openvino"], error) from None
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _openvino_core() -> Any:
    # Where this companion is installed, importing OpenVINO reports the import to its makers; it does without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require("openvino", "openvino").Core()


def _cannot_run(name: str, package: Any, error: Exception) -> ValueError:
    return ValueError(
        f"onnx: {name} {package.__version__} cannot run the file: {' '.join(str(error).split())}"
    )


def _precisions(name: str) -> tuple[str, ...]:
    """Those that an engine computes in on this machine, the fastest last."""
    if name == "onnxruntime":
        require("onnxruntime", "export")
        return ("fp32",)  # the file's own
    able = _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("fp32", "bf16") if "BF16" in able else ("fp32",)


PASSES: dict[str, Callable[[bytes, str], Pass]] = {
    "onnxruntime": onnxruntime,
    "openvino": _openvino,
}
