"""What the peak of a training step's memory consists of: counted while it runs, named by whose it is."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bench.variants import Workload
from sparsenet.model import SparseNet
from sparsenet.ops.plan import Plan

MB = 1e6
BASE = ("parameters", "running statistics", "batch")  # made before the first step
NAMES = (
    *BASE, "gradients", "optimizer state", "features", "gradient sums", "readers' buffers", "other saved by autograd",
    "temporary tensors",
)  # fmt: skip


def available_mb() -> float | None:
    """Memory that can be used without swapping, in MB; ``None`` where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 / MB for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


class Live(TorchDispatchMode):
    """Counts the memory of all tensors on a device that are alive, and remembers that of the peak.

    Each piece of memory has a number of its own: PyTorch gives an address again once it is free.
    """

    def __init__(self, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.storages: set[int] = (
            set()
        )  # known, alive; a block of an engine's is another one each time
        self.numbers: dict[int, int] = {}  # by address of what is alive
        self.bytes: dict[int, int] = {}  # by number
        self.peak: dict[int, int] = {}
        self.holders: Counter[int] = Counter()  # how many storages hold what lies at an address
        self.flat: set[int] = (
            set()
        )  # what began as memory without a shape, or as bytes: an engine's blocks
        self.total = self.highest = self.last = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                number = self.number(leaf)
                flat = leaf.ndim == 1 and leaf.numel() > 0
                if flat and (
                    func is torch.ops.aten.empty.memory_format or leaf.dtype == torch.uint8
                ):
                    self.flat.add(number)
        return found

    def number(self, tensor: Tensor) -> int:
        """The same for all tensors that share memory; counts what was not known yet."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if storage._cdata not in self.storages and address:
            self.storages.add(storage._cdata)
            self.holders[address] += 1
            weakref.finalize(storage, self._forget, storage._cdata, address)
            if address not in self.numbers:
                self.last += 1
                self.numbers[address], self.bytes[self.last] = self.last, storage.nbytes()
                self.total += storage.nbytes()
                if self.total > self.highest:
                    self.highest, self.peak = self.total, dict(self.bytes)
        return self.numbers.get(address, 0)

    def _forget(self, storage: int, address: int) -> None:
        self.storages.discard(storage)
        self.holders[address] -= 1
        if not self.holders[address]:
            self.total -= self.bytes.pop(self.numbers.pop(address))


def parts(work: Workload, peak: float) -> dict[str, float]:
    """The memory of a training step at its peak by what it is for, in MB; *peak* is the one measured above the base.

    The step must have been made before. An engine's blocks are known by their sizes, which its plan gives. ``other`` is
    what no tensor holds: workspace of library kernels, their code, holes that the allocator leaves.
    """
    live, saved, whose = Live(work.device), set[int](), dict[int, str]()

    def save(tensor: Tensor) -> Tensor:
        saved.add(live.number(tensor))
        return tensor.detach()

    def own(name: str, tensors: Iterable[Tensor]) -> None:
        whose.update((live.number(tensor), name) for tensor in tensors)

    own("parameters", work.model.parameters())
    own("running statistics", work.model.buffers())
    own("batch", [work.images, work.labels])
    states = work.optimizer.state.values()
    own("optimizer state", (t for state in states for t in state.values() if isinstance(t, Tensor)))
    own("gradients", (gradient for _, gradient in work.gradients()))
    with live, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        work.step()
    own("gradients", (gradient for _, gradient in work.gradients()))
    blocks = feature_blocks(work)
    found = dict.fromkeys(NAMES, 0.0)
    for number, size in live.peak.items():
        block = number in live.flat and bool(blocks)
        name = _named(number in saved, block, size in blocks)
        found[whose.get(number, name)] += size / MB
    found["other"] = peak - sum(found[name] for name in NAMES if name not in BASE)
    return {name: round(value, 1) for name, value in found.items()}


def _named(saved: bool, block: bool, as_large_as_features: bool) -> str:
    if block and as_large_as_features:
        return "features" if saved else "gradient sums"
    if saved:
        return "other saved by autograd"
    return "readers' buffers" if block else "temporary tensors"


def feature_blocks(work: Workload) -> set[int]:
    """Bytes of the blocks in which an engine keeps the features of each stage; their gradients' sums take as much."""
    model, images = work.model, work.images
    if not isinstance(model, SparseNet) or model.implementation == "reference":
        return set()
    found, itemsize = set(), 2 if work.variant.precision == "bf16" else 4
    sizes = model.architecture.sizes(images.shape[-1])
    for stage, module, side in zip(model.architecture.stages, model.stages, sizes, strict=True):
        plan: Plan = module.plan  # type: ignore[assignment]
        found.add(
            plan.for_engine.columns(stage.unit_widths).total * len(images) * side * side * itemsize
        )
    return found
