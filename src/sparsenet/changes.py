"""The tensors of modules, where these still are what the library made and do nothing else.

An engine computes with the tensors of a stage and calls none of its modules. So whoever reads them
looks each time for what people change about modules, such as hooks and other types.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from sparsenet.ops.plan import EPS, MOMENTUM, Statistics

TENSORS = (nn.Parameter, Tensor)  # that are computed with as they are, as no subclass of them


class Changed(Exception):
    """A *module* may do other than its tensors say; *what* is a clause without its subject."""

    def __init__(self, module: nn.Module, what: str):
        super().__init__(what)
        self.module, self.what = module, what


def methods(*kinds: type[nn.Module]) -> tuple[Any, ...]:
    """What modules of these *kinds* do, and the functions that they call: some tools replace it."""
    names = "__call__", "_wrapped_call_impl", "_call_impl", "forward"
    own = [getattr(kind, name) for kind in kinds for name in names]
    others = nn.Conv2d._conv_forward, nn.BatchNorm2d._check_input_dim, nn.Module.__getattr__
    return *own, *others, F.conv2d, F.batch_norm, F.relu


def check_global_hooks(caller: nn.Module) -> None:
    """Raises ``Changed`` for hooks on all modules."""
    if modules._has_any_global_hook():
        raise Changed(caller, "is called with hooks on all modules")


@cache
def _attributes(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(dir(kind))


def check_module(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The attributes of *module*; ``Changed`` for another type than *kind*, hooks, own methods."""
    if type(module) is not kind:
        raise Changed(module, f"is of type {type(module).__name__}, not {kind.__name__}")
    own = module.__dict__  # several times as fast as asking the module
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        raise Changed(module, "has hooks")
    of_all = _attributes(kind)  # type: ignore[arg-type]
    if not of_all.isdisjoint(own):
        raise Changed(module, f"has a method {min(of_all.intersection(own))} of its own")
    return own


def attribute(own: dict[str, Any], name: str) -> Any:
    """What a module whose attributes are *own* calls *name*; ``None`` for nothing."""
    if name in own:
        return own[name]
    for place in ("_parameters", "_buffers", "_modules"):
        if name in own[place]:
            return own[place][name]
    return None


def part(module: nn.Module, own: dict[str, Any], name: str) -> Any:
    """The module that *module*, whose attributes are *own*, calls *name*."""
    found = attribute(own, name)
    if found is None:
        raise Changed(module, f"has no {name}")
    return found


def check_input(caller: nn.Module, x: Tensor) -> None:
    """Raises ``Changed`` for a subclass of tensors that gives operations another meaning."""
    kind = type(x)
    if kind not in TENSORS and kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        raise Changed(caller, f"is given a {kind.__name__}, whose operations may be others")


def check_training(module: nn.Module, training: bool) -> None:
    if module.training != training:
        state = "in training" if module.training else "not in training"
        raise Changed(module, f"is {state}, other than the rest")


def read_affine(module: nn.Module, kind: type[nn.Module], width: int) -> tuple[Tensor, Tensor]:
    """Scale and shift."""
    own, shape = check_module(module, kind), (width,)
    return _read(module, own, "weight", shape), _read(module, own, "bias", shape)


def read_convolution(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The weight, which is of this *shape*."""
    own, side = check_module(module, nn.Conv2d), shape[-1] // 2
    settings = own["stride"], own["padding"], own["dilation"], own["groups"], own["padding_mode"]
    if settings != ((1, 1), (side, side), (1, 1), 1, "zeros"):
        raise Changed(module, "has other settings")
    if attribute(own, "bias") is not None:
        raise Changed(module, "has a bias")
    return _read(module, own, "weight", shape)


def read_norm(module: nn.Module, kind: type[nn.Module], width: int, training: bool) -> Statistics:
    own, shape = check_module(module, kind), (width,)
    # In evaluation nothing is tracked, as of what ``SparseNet.freeze`` keeps.
    tracked = (own["momentum"], own["track_running_stats"]) if training else (MOMENTUM, True)
    if own["eps"] != EPS or tracked != (MOMENTUM, True):
        raise Changed(module, "has other settings")
    if attribute(own, "weight") is not None or attribute(own, "bias") is not None:
        raise Changed(module, "has a scale or a shift")
    check_training(module, training)
    mean = _read(module, own, "running_mean", shape)
    return Statistics(mean, _read(module, own, "running_var", shape))


def _read(module: nn.Module, own: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = attribute(own, name)
    if type(tensor) not in TENSORS or tensor.shape != shape:
        raise Changed(module, f"has another {name}")
    return tensor  # type: ignore[no-any-return]
