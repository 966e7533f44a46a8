"""Who looks at single operations, which an engine has none of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def is_watched(tensor: Tensor) -> bool:
    """Whether operations on *tensor* are traced, counted or given another meaning.

    So do compilers and tracers, modes that see each operation, ``torch.func``, forward-mode
    differentiation, and tensors that stand for others (fake ones) or for a batch of them.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or stands_for_another(tensor)
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def stands_for_another(tensor: Tensor) -> bool:
    """Whether *tensor* has no data of its own to compute with, as fake tensors and the like."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
