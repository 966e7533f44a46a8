"""A large block of a CPU's memory, kept for the next step: fresh pages cost more than what is computed in them."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

LEAST = 1 << 20  # bytes, below which the system's own allocator keeps what is freed
IDLE = 32  # calls that all wanted less, after which what is kept need not be larger than they want


class Block:
    """Memory for one use at a time, handed out again once no tensor, view or graph holds it.

    One block is kept, as large as the largest that is wanted; further ones go back to the system after use.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None  # bytes
        self.wanted = self.smaller = 0
        self.lock = threading.Lock()

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for *count* values, flat."""
        size = count * dtype.itemsize
        if size < LEAST:
            return torch.empty(count, dtype=dtype, device="cpu")
        kept = self._kept(size)
        memory = torch.empty(size, dtype=torch.uint8, device="cpu") if kept is None else kept
        held = memory.numpy()  # the tensor returned holds this array, and nothing else does
        weakref.finalize(held, self._give_back, memory).atexit = False
        return torch.from_numpy(held)[:size].view(dtype)

    def _kept(self, size: int) -> Tensor | None:
        """What is kept, if it is large enough; it goes back to the system if it is not, or larger than is wanted."""
        with self.lock:
            self.smaller = 0 if size >= self.wanted else self.smaller + 1
            if size >= self.wanted or self.smaller > IDLE:
                self.wanted = size
            kept, self.memory = self.memory, None
            return kept if kept is not None and size <= len(kept) <= self.wanted else None

    def _give_back(
        self, memory: Tensor
    ) -> None:  # takes no lock, since it may be called at any moment
        if len(memory) >= self.wanted:
            self.memory = memory
