"""Whether another engine computes what PyTorch does: the network as the reference, images, and the comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsenet.model import SparseNet
from sparsenet.trained import Trained

BATCHES = (1, 2, 7)  # batch sizes at which a file is checked
# Two orders of summing in fp32 differ by some 1e-6 of the largest logit even 200 layers deep, and a wrong
# weight or constant by far more than this.
TOLERANCE = 1e-4


Pass = Callable[[Tensor], Tensor]  # normalised float32 images (N, C, H, W) to logits (N, classes)


def random_images(trained: Trained) -> Tensor:
    size, channels = trained.preprocessing.size, trained.preprocessing.channels
    shape = (max(BATCHES), channels, size, size)
    return torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def specification(trained: Trained) -> SparseNet:
    """The network as the reference computes it, on the CPU."""
    model = SparseNet(trained.model.architecture, "reference").eval()
    model.load_state_dict({name: value.cpu() for name, value in trained.model.state_dict().items()})
    return model


def compare(
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
