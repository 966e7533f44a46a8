"""A trained network as one file: ONNX, kept or run only if another engine computes what PyTorch does; or weights."""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsenet import weights
from sparsenet.device import computes_in_bf16
from sparsenet.evaluate import evaluate
from sparsenet.extras import require
from sparsenet.files import write_atomic
from sparsenet.model import SparseNet
from sparsenet.run import version

if TYPE_CHECKING:
    from sparsenet.data import Dataset
    from sparsenet.run import Trained

OLDEST_OPSET = 18  # PyTorch's exporter writes this one and newer ones
BATCHES = (1, 2, 7)  # batch sizes at which the file is checked
# Two orders of summing in fp32 differ by some 1e-6 of the largest logit even 200 layers deep, and a wrong
# weight or constant by far more than this.
TOLERANCE = 1e-4

FORMATS = ("onnx", "safetensors")  # and the ends of their files' names

Pass = Callable[[Tensor], Tensor]  # normalised float32 images (N, C, H, W) to logits (N, classes)


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
    _check_target(target)
    model, random = _specification(trained), _random_images(trained)
    real = random[:0] if real_images is None else real_images.cpu()
    file, opset = _file(model, trained, opset)
    images = [trained.preprocessing.normalise(pixels) for pixels in (random, real)]
    difference, largest = _compare(model, images, "onnxruntime", _onnxruntime(file))
    _write(target, file)
    return ExportReport(target, opset, len(file), difference, largest, len(random), len(real))


@dataclass(frozen=True)
class WeightsReport:
    """The weights file that was written and what exactly its numbers measure."""

    path: Path
    bytes: int
    measured: dict[str, dict[str, Any]]  # by precision: see :data:`sparsenet.weights.RESULT`

    def summary(self) -> str:
        """One line to print."""
        errors = ", ".join(f"{found['error']:.2f} % in {precision}" for precision, found in self.measured.items())
        of = "{images} images of {dataset}".format(**self.measured["fp32"])
        return f"{self.path}: {self.bytes / 2**20:.1f} MiB; error {errors} ({of})"


def export_weights(trained: Trained, target: Path, data: Dataset) -> WeightsReport:
    """The network as a weights file (:mod:`sparsenet.weights`), in which it is rounded and says what it measures then.

    It is measured on the test images of *data*, in fp32 and where the model's device computes in it in bf16. Raises
    ``ValueError`` for a *target* that cannot be written and for weights that fp16 does not have.
    """
    _check_target(target)
    if target.resolve() == trained.path.resolve():
        raise ValueError(f"--out: expected another file than the weights themselves, found {target}")
    tensors = weights.rounded(trained.model.state_dict())
    model = copy.deepcopy(trained.model)
    model.load_state_dict(tensors)
    device = next(model.parameters()).device
    measured = {}
    for precision in ("fp32", "bf16") if computes_in_bf16(device) else ("fp32",):
        found = evaluate(model, data.test, trained.preprocessing, device, precision=precision)
        errors = {"error": found.error, "top5_error": found.top5_error}
        measured[precision] = {**errors, "images": found.images, "dataset": data.name}
    about = {name: value for name, value in trained.info.items() if name != "step"}
    file = weights.pack(tensors, {**about, "measured": measured})
    _write(target, file)
    return WeightsReport(target, len(file), measured)


def _check_target(target: Path) -> None:
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{target}: expected the name of a file in a folder that exists")


def _write(target: Path, file: bytes) -> None:
    try:
        write_atomic(target, file)
    except OSError as error:
        raise ValueError(f"{target}: expected a file that can be written, found: {error.strerror}") from None


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
            raise ValueError(f"--engine: expected one of {', '.join(RUNTIMES)}, found {self.name!r}")
        able = _precisions(self.name)
        if self.precision == "auto":
            object.__setattr__(self, "precision", able[-1])
        if self.precision not in able:
            expected = " or ".join(able)
            raise ValueError(f"--precision: expected {expected} for {self.name} on this CPU, found {self.precision}")

    def load(self, trained: Trained, pixels: Tensor) -> nn.Module:
        """The network exported and run by this engine: a module from normalised images to logits.

        Raises ``ValueError`` where its logits for *pixels*, uint8 ``(N, C, H, W)``, or for random images are not the
        model's: of one image alone, the error in bf16 that others are held to would be a matter of luck.
        """
        model = _specification(trained)
        file, _ = _file(model, trained, None)
        run = RUNTIMES[self.name](file, self.precision)
        images = [trained.preprocessing.normalise(each) for each in (_random_images(trained), pixels.cpu())]
        _compare(model, images, self.name, run, self.precision)
        return _Exported(run)


class _Exported(nn.Module):
    def __init__(self, run: Pass):
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images.contiguous())  # an array knows no other layout


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


def _specification(trained: Trained) -> SparseNet:
    """The network as the reference computes it, on the CPU."""
    model = SparseNet(trained.model.architecture, "reference").eval()
    model.load_state_dict({name: value.cpu() for name, value in trained.model.state_dict().items()})
    return model


def _file(model: SparseNet, trained: Trained, opset: int | None) -> tuple[bytes, int]:
    """The content of the ONNX file and its opset."""
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"--opset: expected a number from {OLDEST_OPSET} to {newest}, found {opset}")
    with _quiet():
        program = _program(model, trained.preprocessing.normalise(_random_images(trained)), opset)
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


def _compare(
    model: SparseNet, images: list[Tensor], name: str, run: Pass, precision: str = "fp32"
) -> tuple[float, float]:
    """Largest difference and largest logit over *images* in batches of every size; ``ValueError`` if far."""
    batches = [kind[:size] for kind in images if len(kind) for size in (*BATCHES, len(kind))]
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in batches])
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if precision == "bf16":  # twice the error that PyTorch itself makes in it
            with torch.autocast("cpu", torch.bfloat16):
                rounded = torch.cat([model(batch) for batch in batches]).float()
            allowed += 2 * (rounded - expected).abs().max().item()
    found = torch.cat([run(batch) for batch in batches])
    difference = (found - expected).abs().max().item()
    if not difference <= allowed:  # neither is NaN
        raise ValueError(
            f"onnx: expected {name}'s logits within {allowed:.1e} of the model's, "
            f"found a difference of {difference:.1e}; the exported network is not used"
        )
    return difference, expected.abs().max().item()


def _onnxruntime(file: bytes, precision: str = "fp32") -> Pass:
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
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],  # its own choice is bf16
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
    return ValueError(f"onnx: {name} {package.__version__} cannot run the file: {' '.join(str(error).split())}")


def _precisions(name: str) -> tuple[str, ...]:
    """Those that an engine computes in on this machine, the fastest last."""
    if name == "onnxruntime":
        require("onnxruntime", "export")
        return ("fp32",)  # the file's own
    able = _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("fp32", "bf16") if "BF16" in able else ("fp32",)


RUNTIMES: dict[str, Callable[[bytes, str], Pass]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
