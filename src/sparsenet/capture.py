"""Functions of tensors, recorded once and then repeated without Python.

A step of a deep network is thousands of small kernels, and launching them one by one takes longer
than running them. Recorded as a CUDA graph, they are launched as one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from sparsenet.device import traits

WARM_UP = 3  # calls before a capture: they compile and tune kernels and make the optimizer's state

Outputs = TypeVar("Outputs", bound=Tensor | tuple[Tensor, ...])
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class CudaGraphs:
    """Records CUDA graphs on a stream of its own into one memory pool, which all of them share.

    That is safe as long as they are replayed by one thread and the outputs of one are used up
    before the next one runs, as ``Captured`` does by cloning them; see "Graph memory
    management" in PyTorch's notes on CUDA.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Outputs]) -> Outputs:
        """Does *work* on the stream that will record it."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = work()
        current.wait_stream(self.stream)
        return outputs

    def capture(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Records *work* without doing it.

        Returns a function that does it, and the outputs, which each of its calls writes anew.
        Raises ``RuntimeError`` where it cannot be recorded, and leaves the device usable.
        """
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph does not restore the current stream where a capture fails.
        with torch.cuda.stream(self.stream):
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    outputs = work()
            except RuntimeError:
                self._end_failed_capture()
                raise
        return graph.replay, outputs

    def _end_failed_capture(self) -> None:
        """Ends what a failed capture can leave going on (pytorch#180395)."""
        with contextlib.suppress(RuntimeError):  # raised where the allocator has ended by itself
            torch._C._cuda_endAllocateToPool(self.stream.device.index, self.pool)
        # A capture that succeeds resets the random generator.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
            torch.zeros(1, device=self.stream.device)


def recorder(device: torch.device) -> CudaGraphs | None:
    """What records the work of *device*; ``None`` where nothing can."""
    return CudaGraphs(device) if traits(device).records else None


@dataclass(frozen=True)
class _Recording(Generic[Outputs]):
    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    outputs: Outputs

    def __call__(self, *inputs: Tensor) -> Outputs:
        torch._foreach_copy_(self.inputs, inputs)
        self.replay()
        if isinstance(self.outputs, Tensor):
            return cast(Outputs, self.outputs.clone())
        return cast(Outputs, tuple(output.clone() for output in self.outputs))


class Captured(Generic[Outputs]):
    """A *function* of tensors on one device, recorded where the device can, and then replayed.

    ``Captured(function)(*tensors)`` equals ``function(*tensors)``. For each set of shapes the first
    ``WARM_UP`` calls are made as they are; the next one records. What *function* reads or
    changes besides its arguments has to stay at its address, and what it computes in Python is
    computed for the last time when it is recorded.

    Where recording is impossible, *function* is called as it is. *tell* is called with a line that
    says so and why, or that the function was recorded. Functions that share a *recorder* share the
    memory of their graphs. Replays allocate nothing, so PyTorch's peak of allocated memory is that
    of the first calls and the recording.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        name: str = "the function",
        recorder: CudaGraphs | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.function, self.name = function, name
        self.recorder, self.tell = recorder, tell
        self.possible = True
        self.calls: Counter[Shapes] = Counter()
        self.recordings: dict[Shapes, _Recording[Outputs]] = {}

    def __call__(self, *inputs: Tensor) -> Outputs:
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        if shapes in self.recordings:
            return self.recordings[shapes](*inputs)
        if self.recorder is None and self.possible:
            self._find_recorder(inputs[0].device)
        if self.recorder is None:
            return self.function(*inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= WARM_UP:
            return self.recorder.warm_up(partial(self.function, *inputs))
        reason = self._record(self.recorder, shapes, inputs)
        if reason is not None:
            self._give_up(reason)
            return self.function(*inputs)
        return self.recordings[shapes](*inputs)

    def _find_recorder(self, device: torch.device) -> None:
        self.recorder = recorder(device)
        if self.recorder is None and traits(device).asynchronous:
            self._give_up(f"expected a device of type cuda, found {device.type}")
        self.possible = self.recorder is not None

    def _record(
        self, recorder: CudaGraphs, shapes: Shapes, inputs: tuple[Tensor, ...]
    ) -> str | None:
        """Records a call; returns the reason where that is impossible."""
        copies = tuple(each.clone() for each in inputs)
        try:
            replay, outputs = recorder.capture(partial(self.function, *copies))
        except RuntimeError as error:
            first = error.__context__ or error  # the second one is that of ending the capture
            return next(iter(str(first).splitlines()), type(first).__name__)
        if not self.recordings:
            self.tell(f"captured {self.name}")
        self.recordings[shapes] = _Recording(replay, copies, outputs)
        return None

    def _give_up(self, reason: str) -> None:
        self.recorder, self.possible = None, False
        self.recordings.clear()
        self.tell(f"{self.name} is not captured: {reason}")


class Captures:
    """Captures functions, if that is wanted, with one recorder, and collects what they tell."""

    def __init__(self, device: torch.device, wanted: bool):
        self.recorder, self.wanted = recorder(device), wanted
        self.messages: list[str] = []

    def __call__(self, function: Callable[..., Outputs], name: str) -> Callable[..., Outputs]:
        if not self.wanted:
            return function
        return Captured(function, name, self.recorder, self.messages.append)

    def new_messages(self) -> Iterator[str]:
        """Yields each message once."""
        while self.messages:
            yield self.messages.pop(0)
