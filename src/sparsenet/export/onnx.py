"""Export to ONNX, written only if onnxruntime computes what PyTorch does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsenet.data.dataset import Dataset
from sparsenet.export.check import compare, random_images, specification
from sparsenet.export.onnx_file import onnx_file
from sparsenet.export.runtimes import onnxruntime
from sparsenet.export.target import check_target, write
from sparsenet.trained import Trained


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
    check_target(target)
    model, random = specification(trained), random_images(trained)
    real = random[:0] if real_images is None else real_images.cpu()
    file, opset = onnx_file(model, trained, opset)
    images = [trained.preprocessing.normalise(pixels) for pixels in (random, real)]
    difference, largest = compare(model, images, "onnxruntime", onnxruntime(file))
    write(target, file)
    return ExportReport(target, opset, len(file), difference, largest, len(random), len(real))


def export(trained: Trained, target: Path, data: Dataset | None, opset: int | None) -> ExportReport:
    """What ``sparsenet export --format onnx`` does: the file is also checked on up to 64 test images."""
    return export_onnx(trained, target, None if data is None else data.test.pixels[:64], opset)
