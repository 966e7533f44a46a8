"""Engines other than PyTorch that run an ONNX file on the CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from sparsenet.export import RUNTIMES
from sparsenet.export.check import Forward
from sparsenet.extras import require


@dataclass(frozen=True)
class Runtime:
    """One of ``RUNTIMES``, on the CPU with as many threads as PyTorch has.

    *precision* is ``fp32``, ``bf16`` or ``auto``: bf16 where the engine computes in it on this
    machine, else fp32. Raises ``ValueError`` for one that it does not compute in.
    """

    name: str
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            expected = f"one of {', '.join(RUNTIMES)}"
            raise ValueError(f"--engine: expected {expected}, found {self.name!r}")
        able = precisions(self.name)
        if self.precision == "auto":
            object.__setattr__(self, "precision", able[-1])
        if self.precision not in able:
            expected = f"{' or '.join(able)} for {self.name} on this CPU"
            raise ValueError(f"--precision: expected {expected}, found {self.precision}")

    def start(self, content: bytes) -> Forward:
        """Reads the *content* of a file; ``ValueError`` in one line where it cannot be run."""
        start = {"onnxruntime": _start_onnxruntime, "openvino": _start_openvino}[self.name]
        try:
            return start(content, self.precision)
        except RuntimeError as error:
            engine = f"{self.name} {sys.modules[self.name].__version__}"
            problem = " ".join(str(error).split())
            raise ValueError(f"onnx: {engine} cannot run the file: {problem}") from None


def precisions(name: str) -> tuple[str, ...]:
    """The precisions that an engine computes in on this machine, the fastest last."""
    if name == "onnxruntime":
        require("onnxruntime", "export")
        return ("fp32",)  # that of the numbers in the file
    able = _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("fp32", "bf16") if "BF16" in able else ("fp32",)


def _start_onnxruntime(content: bytes, precision: str) -> Forward:
    onnxruntime = require("onnxruntime", "export")
    errors = require("onnxruntime.capi.onnxruntime_pybind11_state", "export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings go to stderr past Python
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except (errors.Fail, errors.InvalidGraph, errors.NotImplemented) as error:
        raise RuntimeError(str(error)) from None
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _start_openvino(content: bytes, precision: str) -> Forward:
    core = _openvino_core()
    hints = {
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    compiled = core.compile_model(core.read_model(content), "CPU", hints)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _openvino_core() -> Any:
    # Importing OpenVINO reports the import to its makers where this companion is installed; it
    # does without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require("openvino", "openvino").Core()
