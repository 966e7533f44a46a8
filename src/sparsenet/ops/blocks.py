"""A large block of a CPU's memory that is kept for the next step.

Fresh pages of memory cost more than what is computed in them.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

LEAST = 1 << 20  # bytes, below which the system's own allocator keeps what is freed
IDLE = 32  # requests for less in a row, after which a large block is no longer kept


class Block:
    """Memory for one use at a time, given again once no tensor, view or graph holds it.

    One block is kept, as large as the largest request; further ones go back to the system.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None  # bytes
        self.largest_request = 0
        self.smaller_requests = 0  # in a row
        self.lock = threading.Lock()

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for *count* values, flat."""
        size = count * dtype.itemsize
        if size < LEAST:
            return torch.empty(count, dtype=dtype, device="cpu")
        memory = self._take_kept(size)
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        array = memory.numpy()  # the tensor returned holds this array, and nothing else does
        weakref.finalize(array, self._give_back, memory).atexit = False
        return torch.from_numpy(array)[:size].view(dtype)

    def _take_kept(self, size: int) -> Tensor | None:
        """The kept block; it goes back to the system where it is too small or needlessly large."""
        with self.lock:
            is_largest = size >= self.largest_request
            self.smaller_requests = 0 if is_largest else self.smaller_requests + 1
            if is_largest or self.smaller_requests > IDLE:
                self.largest_request = size
            memory, self.memory = self.memory, None
            fits = memory is not None and size <= len(memory) <= self.largest_request
            return memory if fits else None

    def _give_back(self, memory: Tensor) -> None:
        # It takes no lock, since it may be called at any moment.
        if len(memory) >= self.largest_request:
            self.memory = memory
