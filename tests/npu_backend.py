"""An accelerator in Python, which PyTorch learns about as it does about an Ascend NPU.

A tensor on the device ``npu`` has no memory that the host could read. Its storage carries, as
``host``, the memory on the CPU that stands for the device's, and each operation is computed there.
As on a real device, a tensor on the CPU of more than one element is refused among those on the
device, so that nothing is computed on the host unnoticed.

PyTorch imports it by its entry point, as it imports ``torch_npu``: see ``install``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND, KEY, CAST_KEY = "npu", "PrivateUse1", "AutocastPrivateUse1"
NAME, CANN = "Ascend of paper", "9.1"
FREE_MEMORY = 4 << 30  # bytes

ran: Counter[str] = Counter()  # operations on the device
to_device: Counter[tuple[torch.dtype, tuple[int, ...]]] = Counter()  # copies, by what was copied
to_host: Counter[tuple[torch.dtype, tuple[int, ...]]] = Counter()

# What autocast does, which is up to a plug-in: it ``casts``, or it does ``nothing``, or it is
# ``absent`` and asking for it is an error.
autocast = "casts"

_libraries = []  # registrations last as long as these
_ON_METADATA = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SET = torch.ops.aten.set_.source_Storage_storage_offset
_VIEW = torch.ops.aten.as_strided.default


class Npu:
    """``torch.npu``: what ``torch_npu`` offers there and this library asks for."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: object = None) -> str:
        return NAME

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return FREE_MEMORY, FREE_MEMORY

    def manual_seed_all(self, seed: int) -> None:
        """The device draws from the CPU's generator."""

    @property
    def get_amp_supported_dtype(self) -> Callable[[], list[torch.dtype]]:
        if autocast == "absent":
            raise AttributeError("get_amp_supported_dtype")
        return lambda: [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


def forget() -> None:
    """Counts from nothing."""
    for counter in (ran, to_device, to_host):
        counter.clear()


def is_on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == KIND


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a *tensor* on the device, as a tensor on the CPU."""
    if not is_on_device(tensor):
        return tensor
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().host, *place)


def _storage(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    device = torch.device(KIND, 0)
    storage = torch._C._construct_storage_from_data_pointer(0, device, memory.nbytes())
    storage.host = memory
    return storage


def _set(*arguments: object) -> object:
    return _SET.redispatch(_ON_METADATA, *arguments)


def _compute(operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    """Runs an *operation* on the memory that stands for the device's."""
    ran[operation.name()] += 1
    tensors: dict[int, torch.Tensor] = {}  # on the device, by what stands for them
    bases: dict[int, torch.Tensor] = {}  # by the storage of what stands for them

    def enter(value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if is_on_device(value):
            memory = host(value)
            tensors[id(memory)] = value
            bases[memory.untyped_storage()._cdata] = value
            return memory
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            raise RuntimeError(f"{operation}: expected a tensor on npu, found one on the CPU")
        return value

    def leave(result: object) -> object:
        if not isinstance(result, torch.Tensor):
            return result
        shape, stride, offset = result.shape, result.stride(), result.storage_offset()
        memory, tensor = result.untyped_storage(), tensors.get(id(result))
        if tensor is not None and (shape, stride) == (tensor.shape, tensor.stride()):
            return tensor  # an argument that was written to
        if tensor is None and memory._cdata in bases:
            return _VIEW.redispatch(_ON_METADATA, bases[memory._cdata], shape, stride, offset)
        if tensor is None:
            tensor = torch._C._acc.create_empty_tensor((0,), result.dtype)
        return _set(tensor, _storage(memory), offset, shape, stride)

    entered = _pytree.tree_map(enter, (args, kwargs))
    return _pytree.tree_map(leave, operation(*entered[0], **entered[1]))


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    ran["aten::_copy_from"] += 1
    if not is_on_device(source):
        to_device[source.dtype, tuple(source.shape)] += 1
    elif not is_on_device(target):
        to_host[source.dtype, tuple(source.shape)] += 1
    host(target).copy_(host(source))
    return target


def _convolution(*args: object) -> object:
    return _compute(torch.ops.aten.convolution.default, *args)


def _convolution_backward(
    d_output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *settings: object
) -> object:
    backward = torch.ops.aten.convolution_backward.default
    return _compute(backward, d_output, x, weight, None, *settings)


# As on an Ascend NPU, what a batch norm saves for its backward pass is the variance, where PyTorch
# has its reciprocal deviation: see op-plugin's BatchNormKernelNpu.cpp.
def _batch_norm(*args: object, **outputs: torch.Tensor) -> object:
    norm = torch.ops.aten.native_batch_norm
    results = _compute(norm.out if outputs else norm.default, *args, **outputs)
    *_, training, _, eps = args
    if training:
        host(results[2]).pow_(-2).sub_(eps)
    return results


def _batch_norm_backward(*args: object) -> object:
    *tensors, variance, training, eps, wanted = args
    rstd = (variance + eps).rsqrt() if training else variance
    backward = torch.ops.aten.native_batch_norm_backward.default
    return _compute(backward, *tensors, rstd, training, eps, wanted)


def _casting(operation: torch._ops.OpOverload) -> Callable[..., object]:
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, CAST_KEY))

    def cast(value: object) -> object:
        floating = is_on_device(value) and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype(KIND)) if floating else value

    def call(*args: object) -> object:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return operation(*(_pytree.tree_map(cast, args) if autocast == "casts" else args))

    return call


_clone = torch.UntypedStorage.clone


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return _storage(storage.host.clone()) if storage.device.type == KIND else _clone(storage)


def register() -> None:
    """Makes the device known to PyTorch, for the rest of this process."""
    _setup_privateuseone_for_python_backend(KIND, Npu())
    torch.UntypedStorage.clone = _clone_storage  # it has no allocator, which deepcopy asks for
    fallback, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(_compute, KEY)
    kernels.impl(_SET.name().removeprefix("aten::"), _set, KEY)
    kernels.impl("_copy_from", _copy, KEY)
    kernels.impl("convolution_overrideable", _convolution, KEY)
    kernels.impl("convolution_backward_overrideable", _convolution_backward, KEY)
    kernels.impl("native_batch_norm", _batch_norm, KEY)
    kernels.impl("native_batch_norm.out", _batch_norm, KEY)
    kernels.impl("native_batch_norm_backward", _batch_norm_backward, KEY)
    fallback.fallback(torch.library.fallthrough_kernel, CAST_KEY)
    for name in ("conv2d", "linear", "mm"):
        kernels.impl(name, _casting(getattr(torch.ops.aten, name).default), CAST_KEY)
    _libraries.extend((fallback, kernels))
    torch.version.cann = CANN


def install(folder: Path, start: str = "npu_backend:register") -> None:
    """Makes *folder*, once it is on Python's path, a place where PyTorch finds this plug-in.

    *start* is what PyTorch calls.
    """
    about = folder / "npu_backend-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: npu-backend\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[torch.backends]\nnpu = {start}\n")
