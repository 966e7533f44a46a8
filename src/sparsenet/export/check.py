"""The check of an exported network against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.model import SparseNet
from sparsenet.trained import Trained

BATCH_SIZES = (1, 2, 7)  # at which a file is checked
# Two orders of summing in fp32 differ by some 1e-6 of the largest logit even 200 layers deep, and a
# wrong weight or constant by far more than this.
TOLERANCE = 1e-4

Run = Callable[[Tensor], Tensor]  # normalised float32 images (N, C, H, W) to logits (N, classes)


@dataclass(frozen=True)
class Comparison:
    """Logits of an exported network beside those of the model, over all images compared."""

    max_difference: float
    max_logit: float  # largest absolute logit of the model
    random_images: int
    real_images: int


def reference_model(trained: Trained) -> SparseNet:
    """The network as the reference implementation computes it, on the CPU."""
    model = SparseNet(trained.model.architecture, "reference").eval()
    model.load_state_dict({name: value.cpu() for name, value in trained.model.state_dict().items()})
    return model


def random_images(trained: Trained) -> Tensor:
    """The same uint8 images ``(N, C, H, W)`` each time."""
    size, channels = trained.preprocessing.size, trained.preprocessing.channels
    shape = (max(BATCH_SIZES), channels, size, size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@torch.no_grad()
def compare(
    trained: Trained, real_images: Tensor, engine: str, run: Run, precision: str = "fp32"
) -> Comparison:
    """Compares *run* with the model on random and on real images, uint8 ``(N, C, H, W)``.

    Each kind is compared in batches of :data:`BATCH_SIZES` and of all of them. Raises
    ``ValueError``, which names *engine*, where the logits differ by more than rounding explains.
    """
    model, random = reference_model(trained), random_images(trained)
    batches = []
    for pixels in (random, real_images.cpu()):
        images = trained.preprocessing.normalise(pixels)
        if len(images):
            batches += [images[:size] for size in (*BATCH_SIZES, len(images))]
    expected = torch.cat([model(batch) for batch in batches])
    largest = expected.abs().max().item()
    tolerance = TOLERANCE * max(1.0, largest)
    if precision == "bf16":  # twice the error that PyTorch itself makes in it
        with torch.autocast("cpu", torch.bfloat16):
            in_bf16 = torch.cat([model(batch) for batch in batches]).float()
        tolerance += 2 * (in_bf16 - expected).abs().max().item()
    logits = torch.cat([run(batch) for batch in batches])
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance:  # neither is NaN
        raise ValueError(
            f"onnx: expected {engine}'s logits within {tolerance:.1e} of the model's, "
            f"found a difference of {difference:.1e}; the exported network is not used"
        )
    return Comparison(difference, largest, len(random), len(real_images))
