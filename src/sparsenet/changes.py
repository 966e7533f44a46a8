"""What people change about modules, such as hooks and other types, that an engine does not see.

An engine reads the weights of a stage and calls none of its modules. So before each call it is
looked whether they still are what the library made and do nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

from sparsenet.ops.plan import EPS, MOMENTUM

TENSORS = (nn.Parameter, Tensor)  # that are computed with as they are, as no subclass of them


def _methods() -> tuple[Callable[..., Any], ...]:
    """Methods of PyTorch's modules that some tools replace for all of them."""
    convolution = nn.Conv2d.forward, nn.Conv2d._conv_forward
    return *convolution, nn.BatchNorm2d.forward, nn.ReLU.forward, nn.Module.__call__


METHODS = _methods()


def of_all_modules() -> str | None:
    """What was changed about all modules at once; a clause without its subject, as elsewhere."""
    if modules._has_any_global_hook():
        return "is called with hooks on all modules"
    return None if _methods() == METHODS else "has modules with a method that was replaced"


def of_module(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What any module may have, and that it is of another type than *kind*."""
    if type(module) is not kind:
        return f"is of type {type(module).__name__}, not {kind.__name__}"
    own = module.__dict__  # several times as fast as asking the module
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has hooks"
    return "has a forward method of its own" if "forward" in own else None


def of_training(module: nn.Module, training: bool) -> str | None:
    if module.training == training:
        return None
    return f"is {'' if module.training else 'not '}in training, other than the rest"


def of_affine(module: nn.Module, kind: type[nn.Module], width: int) -> str | None:
    if what := of_module(module, kind):
        return what
    parameters = module._parameters
    return _of_tensor(parameters, "weight", (width,)) or _of_tensor(parameters, "bias", (width,))


def of_convolution(module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """*shape* is that of its weight."""
    if what := of_module(module, nn.Conv2d):
        return what
    own, side = module.__dict__, shape[-1] // 2
    settings = own["stride"], own["padding"], own["dilation"], own["groups"], own["padding_mode"]
    if settings != ((1, 1), (side, side), (1, 1), 1, "zeros"):
        return "has other settings"
    if own["_parameters"].get("bias") is not None:
        return "has a bias"
    return _of_tensor(own["_parameters"], "weight", shape)


def of_norm(module: nn.Module, width: int, training: bool) -> str | None:
    if what := of_module(module, nn.BatchNorm2d):
        return what
    own = module.__dict__
    settings = own["momentum"], own["eps"], own["affine"], own["track_running_stats"]
    if settings != (MOMENTUM, EPS, False, True):
        return "has other settings"
    if what := of_training(module, training):
        return what
    buffers, shape = own["_buffers"], (width,)
    return _of_tensor(buffers, "running_mean", shape) or _of_tensor(buffers, "running_var", shape)


def _of_tensor(
    tensors: Mapping[str, Tensor | None], name: str, shape: tuple[int, ...]
) -> str | None:
    tensor = tensors.get(name)
    is_plain = tensor is not None and type(tensor) in TENSORS and tensor.shape == shape
    return None if is_plain else f"has another {name}"
