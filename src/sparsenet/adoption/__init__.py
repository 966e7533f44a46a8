"""Other libraries' DenseNets: their networks, and their weights, on this engine.

Nothing here imports those libraries. A module is read by what it is made of (``structure``), what
it computes is compared with that in numbers (here), and its weights are renamed (``state_dict``).
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from sparsenet.adoption.state_dict import UnitNames, load_renamed, load_torchvision
from sparsenet.adoption.structure import check_uniform, read_structure, refusal
from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet

__all__ = ["adopt", "load_torchvision"]

# Relative to the largest value, in fp64: far above rounding, far below any difference.
TOLERANCE = 1e-8
# An architecture is read off the first layers; this says why another can have the wrong shape.
WIDTH_RULES = (
    ", for layers of a stage add as much as its first, "
    "bottlenecks have one factor and transitions halve"
)


def adopt(model: nn.Module, implementation: str = "auto", memory: str = "normal") -> SparseNet:
    """A torchvision, timm or MONAI (2-D) DenseNet as the same network on this engine.

    It takes images ``(N, in_chans, H, W)`` to the same logits (pooled features without a
    classifier), in evaluation and in training. Tensors are copied and *model* is left as it is, so
    an optimizer must be made anew; dtype, device, training mode and each parameter's
    ``requires_grad`` are the same. Checkpointing (``memory_efficient``) is dropped, as this engine
    recomputes by itself; with it those libraries update some running statistics twice a step.

    Where readers of a feature disagree on its statistics they are loaded as by
    ``load_torchvision``: evaluation is the same, training not quite, and a ``UserWarning``
    says so. Raises ``ValueError`` naming the first submodule that this library cannot represent
    (dropout other than 0 among them, which here follows every convolution), or saying that
    ``forward`` does something else than the submodules show.
    """
    if not isinstance(model, nn.Module):
        raise refusal("a torch.nn.Module", type(model).__name__)
    architecture, units = read_structure(model)
    device, dtype = check_uniform(model)
    # The caller's random state stays, and the caller's device and gradient mode do not matter.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        _check_behaviour(model, architecture, units)
        adopted = SparseNet(architecture, implementation, memory).to("cpu", torch.float64)
        tensors = {
            name: tensor.detach().to("cpu", torch.float64)
            for name, tensor in model.state_dict().items()
        }
        names = load_renamed(adopted, units, tensors, "adopt", WIDTH_RULES)
        changed = [
            names[name]
            for name, parameter in adopted.named_parameters()
            if not torch.allclose(parameter, tensors[names[name]], 0.01, 0.01)
        ]
        adopted = adopted.to(device, dtype)
    if changed:
        warnings.warn(
            "adopt: running statistics of a feature differ between its readers; "
            f"{changed[0]} and {len(changed) - 1} more were changed so that evaluation stays "
            "equal, and outputs in training differ by as much",
            stacklevel=2,
        )
    for name, parameter in adopted.named_parameters():
        parameter.requires_grad_(model.get_parameter(names[name]).requires_grad)
    return adopted.train(model.training)


def _check_behaviour(model: nn.Module, architecture: Architecture, units: list[UnitNames]) -> None:
    """Raises ``ValueError`` unless a copy of *model* computes what *architecture* says.

    Both get the same random weights, as the model's own could hide a difference: the zeros of a new
    classifier would. Outputs and gradients with respect to the input are compared in fp64: in
    evaluation, with statistics that differ between the readers of a feature, and in training.
    Images are so wide that each pooling meets an odd number.
    """
    torch.default_generator.manual_seed(0)
    original = copy.deepcopy(model).to("cpu", torch.float64)
    reference = SparseNet(architecture, "reference").to("cpu", torch.float64)
    stages = len(architecture.blocks)
    height, width = 2 ** (stages + 1), 2 ** (stages + 3) - 5
    images = torch.randn(2, architecture.in_chans, height, width, dtype=torch.float64)
    for mode in ("evaluation", "training"):
        training = mode == "training"
        _randomise(original, equal_statistics=training)
        load_renamed(reference, units, original.state_dict(), "adopt", WIDTH_RULES)
        computed = _response(reference.train(training), images)
        expected = _response(original.train(training), images)
        for kind in ("outputs", "input gradients"):
            if not _close(computed[kind], expected[kind]):
                raise refusal(
                    f"{type(model).__name__} to compute the DenseNet that its submodules make",
                    f"other {kind} in {mode}: its forward does something else",
                )


def _randomise(model: nn.Module, equal_statistics: bool) -> None:
    """Draws weights, and running statistics unless all readers of a feature shall have the same."""
    for name, tensor in model.state_dict().items():
        if equal_statistics and "running" in name:
            nn.init.constant_(tensor, float("var" in name))
        elif tensor.is_floating_point() and tensor.dim() < 2:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point():
            nn.init.kaiming_normal_(tensor)


def _response(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients of the sum of their squares with respect to *images*."""
    images = images.clone().requires_grad_()
    try:
        outputs = model(images)
        (gradients,) = torch.autograd.grad(outputs.square().sum(), images)
    except (RuntimeError, AttributeError, TypeError) as error:
        shape, reason = list(images.shape), " ".join(str(error).split())
        raise refusal(
            f"{type(model).__name__} to take images of {shape} to one differentiable tensor",
            f"{type(error).__name__}: {reason}",
        ) from None
    return {"outputs": outputs, "input gradients": gradients}


def _close(computed: Tensor, expected: Tensor) -> bool:
    if computed.shape != expected.shape:
        return False
    difference = (computed - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max())  # false where one is not a number
