"""Other libraries' DenseNets: their networks, and their weights, on this engine.

Nothing here imports those libraries. A module is read by what it is made of (``structure``), what
it computes is compared with that in numbers (here), and its weights are renamed (``state_dict``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsenet.adoption.state_dict import load_renamed, load_torchvision
from sparsenet.adoption.structure import (
    Structure,
    check_uniform,
    read_structure,
    refusal,
    unwrapped,
)
from sparsenet.model import SparseNet

__all__ = ["adopt", "load_torchvision"]

# Relative to the largest value, in fp64: far above rounding, far below any difference.
TOLERANCE = 1e-8
# An architecture is read off the first layers; this says why another can have the wrong shape.
WIDTH_RULES = (
    ", for layers of a stage add as much as its first, "
    "and bottlenecks and transitions have one factor each"
)


def adopt(model: nn.Module, implementation: str = "auto", memory: str = "normal") -> SparseNet:
    """A torchvision, timm, pytorchcv or MONAI (2-D) DenseNet as the same network on this engine.

    It takes images ``(N, in_chans, H, W)`` to the same logits (pooled features without a
    classifier), in evaluation and in training. Tensors are copied and *model* is left as it is, so
    an optimizer must be made anew; dtype, device, training mode and each parameter's
    ``requires_grad`` are the same. Checkpointing (``memory_efficient``) is dropped, as this engine
    recomputes by itself; with it those libraries update some running statistics twice a step.
    ``DataParallel`` and ``DistributedDataParallel`` are taken off.

    The adopted network pools the last features whole. Where *model* averages a window of them, as
    pytorchcv's do, both are equal for images whose features fill it: of 221 to 252 pixels a side
    for its ``densenet121``, of 32 to 35 for CIFAR. It raises for others, unlike the adopted
    network; where it takes larger ones too, a ``UserWarning`` says for which both are equal.

    Where readers of a feature disagree on its statistics they are loaded as by
    ``load_torchvision``: evaluation is the same, training not quite, and a ``UserWarning``
    says so. Raises ``ValueError`` naming the first submodule that this library cannot represent
    (dropout other than 0 among them, which here follows every convolution), or saying that
    ``forward`` does something else than the submodules show.
    """
    if not isinstance(model, nn.Module):
        raise refusal("a torch.nn.Module", type(model).__name__)
    model = unwrapped(model)
    structure = read_structure(model)
    architecture, units = structure.architecture, structure.units
    device, dtype = check_uniform(model)
    # The caller's random state stays, and the caller's device and gradient mode do not matter.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        original = copy.deepcopy(model).to("cpu", torch.float64)
        _check_behaviour(original, structure)
        takes_larger = structure.window > 0 and _takes_larger(original, structure)
        adopted = SparseNet(architecture, implementation, memory).to("cpu", torch.float64)
        tensors = {
            name: tensor.detach().to("cpu", torch.float64)
            for name, tensor in model.state_dict().items()
        }
        names = load_renamed(adopted, units, tensors, "adopt", WIDTH_RULES)
        theirs = {name: tensors[source] for name, source in names.items()}
        changed = [
            names[name]
            for name, parameter in adopted.named_parameters()
            if not _is_near(parameter, theirs, name)
        ]
        adopted = adopted.to(device, dtype)
    if changed:
        warnings.warn(
            "adopt: running statistics of a feature differ between its readers; "
            f"{changed[0]} and {len(changed) - 1} more were changed so that evaluation stays "
            "equal, and outputs in training differ by as much",
            stacklevel=2,
        )
    if takes_larger:
        least, most = structure.sides(structure.window)
        warnings.warn(
            f"adopt: equal for images of {least} to {most} pixels a side; of larger ones the "
            f"adopted network pools all features, and {type(model).__name__} those of a window",
            stacklevel=2,
        )
    for name, parameter in adopted.named_parameters():
        parameter.requires_grad_(model.get_parameter(names[name]).requires_grad)
    return adopted.train(model.training)


def _is_near(parameter: Tensor, theirs: Mapping[str, Tensor], name: str) -> bool:
    """Whether a *parameter* is that of *theirs*, to a hundredth of the largest in its module.

    In its module, since shifts may all be next to 0: what they are small beside is the scale.
    """
    module = name.rpartition(".")[0]
    parts = [f"{module}.{part}" for part in ("weight", "bias")]
    largest = max(theirs[part].abs().max() for part in parts if part in theirs)
    return bool((parameter - theirs[name]).abs().max() <= 0.01 * largest)


def _check_behaviour(original: nn.Module, structure: Structure) -> None:
    """Raises ``ValueError`` unless *original*, which is changed, computes what *structure* says.

    Both get the same random weights, as the model's own could hide a difference: the zeros of a new
    classifier would. Outputs and gradients with respect to the input are compared in fp64: in
    evaluation, with statistics that differ between the readers of a feature, and in training.
    Images have the least height and the largest width for their last features, so that each
    pooling meets an odd number.
    """
    torch.default_generator.manual_seed(0)
    architecture, units = structure.architecture, structure.units
    reference = SparseNet(architecture, "reference").to("cpu", torch.float64)
    height, _ = structure.sides(structure.window or 1)
    _, width = structure.sides(structure.window or 3)
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
                    f"{type(original).__name__} to compute the DenseNet that its submodules make",
                    f"other {kind} in {mode}: its forward does something else",
                )


def _takes_larger(original: nn.Module, structure: Structure) -> bool:
    """Whether *original* takes images whose features do not fit the window of its last pooling."""
    side, _ = structure.sides(structure.window + 1)
    images = torch.randn(1, structure.architecture.in_chans, side, side, dtype=torch.float64)
    try:
        _response(original.eval(), images)
    except ValueError:
        return False
    return True


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
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
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
