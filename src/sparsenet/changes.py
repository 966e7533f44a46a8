"""The tensors of modules, where these still are what the library made and do nothing else.

An engine computes with the tensors of a stage and calls none of its modules. So each time they are
read it is looked for what people change about modules, such as hooks and other types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

from sparsenet.ops.plan import EPS, MOMENTUM, Statistics

TENSORS = (nn.Parameter, Tensor)  # that are computed with as they are, as no subclass of them


class Changed(Exception):
    """A *module* may do other than its tensors say; *what* is a clause without its subject."""

    def __init__(self, module: nn.Module, what: str):
        super().__init__(what)
        self.module, self.what = module, what


def _methods() -> tuple[Callable[..., Any], ...]:
    """Methods of PyTorch's modules that some tools replace for all of them."""
    convolution = nn.Conv2d.forward, nn.Conv2d._conv_forward
    return *convolution, nn.BatchNorm2d.forward, nn.ReLU.forward, nn.Module.__call__


METHODS = _methods()


def check_all_modules(caller: nn.Module) -> None:
    """Raises ``Changed`` for what was changed about all modules at once."""
    if modules._has_any_global_hook():
        raise Changed(caller, "is called with hooks on all modules")
    if _methods() != METHODS:
        raise Changed(caller, "has modules with a method that was replaced")


def check_module(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The attributes of *module*; ``Changed`` for another type than *kind* and for hooks."""
    own = module.__dict__  # several times as fast as asking the module
    if type(module) is not kind:
        raise Changed(module, f"is of type {type(module).__name__}, not {kind.__name__}")
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        raise Changed(module, "has hooks")
    if "forward" in own:
        raise Changed(module, "has a forward method of its own")
    return own


def check_training(module: nn.Module, training: bool) -> None:
    if module.training != training:
        state = "in training" if module.training else "not in training"
        raise Changed(module, f"is {state}, other than the rest")


def read_affine(module: nn.Module, kind: type[nn.Module], width: int) -> tuple[Tensor, Tensor]:
    """Scale and shift."""
    parameters = check_module(module, kind)["_parameters"]
    shape = (width,)
    return _read(module, parameters, "weight", shape), _read(module, parameters, "bias", shape)


def read_convolution(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The weight, which is of this *shape*."""
    own, side = check_module(module, nn.Conv2d), shape[-1] // 2
    settings = own["stride"], own["padding"], own["dilation"], own["groups"], own["padding_mode"]
    if settings != ((1, 1), (side, side), (1, 1), 1, "zeros"):
        raise Changed(module, "has other settings")
    if own["_parameters"].get("bias") is not None:
        raise Changed(module, "has a bias")
    return _read(module, own["_parameters"], "weight", shape)


def read_norm(module: nn.Module, width: int, training: bool) -> Statistics:
    own, shape = check_module(module, nn.BatchNorm2d), (width,)
    settings = own["momentum"], own["eps"], own["affine"], own["track_running_stats"]
    if settings != (MOMENTUM, EPS, False, True):
        raise Changed(module, "has other settings")
    check_training(module, training)
    buffers = own["_buffers"]
    mean = _read(module, buffers, "running_mean", shape)
    return Statistics(mean, _read(module, buffers, "running_var", shape))


def _read(
    module: nn.Module, tensors: Mapping[str, Tensor | None], name: str, shape: tuple[int, ...]
) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or type(tensor) not in TENSORS or tensor.shape != shape:
        raise Changed(module, f"has another {name}")
    return tensor
