"""Functions of tensors, recorded once and then repeated without Python.

A step of a deep network is thousands of small kernels, and launching them one by one takes longer than running them.
Recorded as a CUDA graph, they are launched as one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sparsenet.device import traits

WARM_UP = 3  # calls before a capture: they compile and tune kernels and make the optimizer's state

Outputs = TypeVar("Outputs", bound=Tensor | tuple[Tensor, ...])
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class Recorder(Protocol):
    """How a device records work."""

    def warm_up(self, work: Callable[[], Outputs]) -> Outputs:
        """Does *work*, in the way that recording it later asks for."""

    def capture(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Records *work* without doing it: what does it, and the outputs, which every replay writes anew.

        Raises ``RuntimeError`` where it cannot be recorded, and leaves the device usable.
        """


class CudaGraphs:
    """Records CUDA graphs on a stream of its own into one memory pool, which all of them share.

    That is safe as long as they are replayed by one thread and the outputs of one are used up before the next one
    runs, as :class:`Captured` does by cloning them; see "Graph memory management" in PyTorch's notes on CUDA.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Outputs]) -> Outputs:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = work()
        current.wait_stream(self.stream)
        return outputs

    def capture(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(
            self.stream
        ):  # torch.cuda.graph does not put the stream back where a capture fails
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    outputs = work()
            except RuntimeError:
                self._put_right()
                raise
        return graph.replay, outputs

    def _put_right(self) -> None:
        """A failed capture can leave the allocator and the random generator capturing (pytorch#180395)."""
        with contextlib.suppress(RuntimeError):  # raised where the allocator has ended by itself
            torch._C._cuda_endAllocateToPool(self.stream.device.index, self.pool)
        with torch.cuda.graph(
            torch.cuda.CUDAGraph(), stream=self.stream
        ):  # one that succeeds resets the generator
            torch.zeros(1, device=self.stream.device)


def recorder(device: torch.device) -> Recorder | None:
    """What records the work of *device*; ``None`` where nothing can."""
    return CudaGraphs(device) if traits(device).records else None


@dataclass(frozen=True)
class _Recorded(Generic[Outputs]):
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
    """*function* of tensors on one device, recorded where the device can, and replayed from then on.

    ``Captured(function)(*tensors)`` equals ``function(*tensors)``. For each set of shapes the first calls, of number
    :data:`WARM_UP`, are made as they are; the next one records. What *function* reads or changes besides its arguments
    has to stay at its address, and what it computes in Python is computed for the last time when it is recorded.

    Where recording is impossible, *function* is called as it is; *tell* gets one line that says so and why, or that
    it was recorded. Functions that share *recorder* share the memory of their graphs. Replays allocate nothing, so
    PyTorch's peak of allocated memory is that of the first calls and the recording.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        name: str = "the function",
        recorder: Recorder | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.function, self.name = function, name
        self.recorder, self.tell = recorder, tell
        self.possible = True
        self.calls: Counter[Shapes] = Counter()
        self.recorded: dict[Shapes, _Recorded[Outputs]] = {}

    def __call__(self, *inputs: Tensor) -> Outputs:
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        if shapes in self.recorded:
            return self.recorded[shapes](*inputs)
        if self.recorder is None and self.possible:
            self._choose(inputs[0].device)
        if self.recorder is None:
            return self.function(*inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= WARM_UP:
            return self.recorder.warm_up(partial(self.function, *inputs))
        return self._record(self.recorder, shapes, inputs)

    def _choose(self, device: torch.device) -> None:
        self.recorder = recorder(device)
        self.possible = self.recorder is not None
        if not self.possible and device.type != "cpu":  # a CPU has no launches to save
            self.tell(
                f"{self.name} is not captured: expected a device of type cuda, found {device.type}"
            )

    def _record(self, recorder: Recorder, shapes: Shapes, inputs: tuple[Tensor, ...]) -> Outputs:
        kept = tuple(each.clone() for each in inputs)
        try:
            replay, outputs = recorder.capture(partial(self.function, *kept))
        except RuntimeError as error:
            first = (
                error.__context__ or error
            )  # the second error is that of ending a capture gone wrong
            reason = next(iter(str(first).splitlines()), type(first).__name__)
        else:
            if not self.recorded:
                self.tell(f"captured {self.name}")
            self.recorded[shapes] = _Recorded(replay, kept, outputs)
            return self.recorded[shapes](*inputs)
        self.recorder, self.possible = None, False
        self.recorded.clear()
        self.tell(f"{self.name} is not captured: {reason}")
        return self.function(*inputs)


class Captures:
    """Captures functions that share the memory of their graphs, and keeps what there is to tell about it."""

    def __init__(self, device: torch.device, wanted: bool):
        self.recorder, self.wanted = recorder(device), wanted
        self.news: list[str] = []

    def __call__(self, function: Callable[..., Outputs], name: str) -> Callable[..., Outputs]:
        """*function*, :class:`Captured` if that is wanted."""
        return (
            Captured(function, name, self.recorder, self.news.append) if self.wanted else function
        )

    def tell(self) -> Iterator[str]:
        """What has not been told yet."""
        while self.news:
            yield self.news.pop(0)
