"""Large blocks of a CPU's memory, kept for the next step: fresh pages cost more than what is computed in them."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

LEAST = 1 << 20  # bytes, below which the system's own allocator keeps what is freed
IDLE = 32  # blocks handed out since, after which one that nobody wanted goes back to the system


@dataclass(eq=False)
class _Block:
    memory: Tensor  # bytes
    handed_out: int  # when, counted in blocks


class Blocks:
    """Memory that is handed out again once no tensor, view or graph holds what was handed out before."""

    def __init__(self) -> None:
        self.free: list[_Block] = []
        self.given_back: SimpleQueue[_Block] = SimpleQueue()  # its put() may be called at any moment, within take() too
        self.lock = threading.Lock()
        self.count = 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for *count* values, flat: the smallest free block that is large enough, or a new one.

        Where none is large enough, all that are free go back to the system first.
        """
        size = count * dtype.itemsize
        if size < LEAST:
            return torch.empty(count, dtype=dtype)
        block = self._find(size) or _Block(torch.empty(size, dtype=torch.uint8), 0)
        block.handed_out = self.count
        held = block.memory.numpy()  # the tensor returned holds this array, and nothing else does
        weakref.finalize(held, self.given_back.put, block).atexit = False
        return torch.from_numpy(held)[:size].view(dtype)

    def _find(self, size: int) -> _Block | None:
        with self.lock:
            self.count += 1
            while True:
                try:
                    self.free.append(self.given_back.get_nowait())
                except Empty:
                    break
            self.free = [block for block in self.free if self.count - block.handed_out <= IDLE]
            found = min((b for b in self.free if len(b.memory) >= size), key=lambda b: len(b.memory), default=None)
            if found:
                self.free.remove(found)
            else:
                self.free.clear()
            return found
