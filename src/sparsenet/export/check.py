"""The check of an exported network against the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsenet.model import SparseNet
from sparsenet.trained import Trained

RANDOM_IMAGES = 7
BATCH_SIZES = (1, 2, RANDOM_IMAGES)  # at which a file is checked
# Two orders of summing in fp32 differ by some 1e-6 of the largest logit even 200 layers deep, and a
# wrong weight or constant by far more than this.
TOLERANCE = 1e-4

# From normalised float32 images (N, C, H, W) to logits (N, classes).
Forward = Callable[[Tensor], Tensor]


def reference_model(trained: Trained) -> SparseNet:
    """The network as the reference implementation computes it, on the CPU."""
    model = SparseNet(trained.model.architecture, "reference").eval()
    model.load_state_dict({name: value.cpu() for name, value in trained.model.state_dict().items()})
    return model


def random_images(trained: Trained) -> Tensor:
    """Pixels, uint8 ``(N, C, H, W)``, the same each time."""
    size, channels = trained.preprocessing.size, trained.preprocessing.channels
    shape = (RANDOM_IMAGES, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@torch.no_grad()
def compare(
    trained: Trained,
    real_images: Tensor | None,
    engine: str,
    forward: Forward,
    precision: str = "fp32",
) -> tuple[float, float]:
    """The largest difference between the logits of *forward* and the model, and the largest logit.

    Random and any *real_images*, uint8 ``(N, C, H, W)``, are each compared in batches of
    ``BATCH_SIZES`` and of all of them. Raises ``ValueError``, which names *engine*, where the
    logits differ by more than rounding explains.
    """
    model = reference_model(trained)
    batches = []
    for pixels in (random_images(trained), real_images):
        if pixels is not None and len(pixels):
            images = trained.preprocessing.normalise(pixels.cpu())
            batches += [images[:size] for size in (*BATCH_SIZES, len(images))]
    expected = torch.cat([model(batch) for batch in batches])
    largest = expected.abs().max().item()
    tolerance = TOLERANCE * max(1.0, largest)
    if precision == "bf16":  # twice the error that PyTorch itself makes in it
        with torch.autocast("cpu", torch.bfloat16):
            in_bf16 = torch.cat([model(batch) for batch in batches]).float()
        tolerance += 2 * (in_bf16 - expected).abs().max().item()
    logits = torch.cat([forward(batch) for batch in batches])
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance:  # neither is NaN
        raise ValueError(
            f"export: expected {engine}'s logits within {tolerance:.1e} of the model's, "
            f"found a difference of {difference:.1e}; the exported network is not used"
        )
    return difference, largest
