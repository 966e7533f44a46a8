"""One training step as a function of tensors; and functions of tensors recorded once, then repeated without Python.

A step of a deep network is thousands of small kernels, and launching them one by one takes longer than running them.
Recorded as a CUDA graph, they are launched as one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.config import RunConfig
from sparsenet.data.augment import Moves, augment, mix
from sparsenet.data.images import Preprocessing
from sparsenet.optim import update_average

WARM_UP = 3  # calls before a capture: they compile and tune kernels and make the optimizer's state

Outputs = TypeVar("Outputs", bound=Tensor | tuple[Tensor, ...])
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class TrainingStep:
    """Augmentation, forward, backward, update and average: all that one batch asks of the device.

    Changes the model, the optimizer's state and the average in place, and never waits for the device, so that it can
    be :class:`Captured`. What changes from step to step is an argument, and so a tensor; what draws random numbers
    (dropout) is to be seeded before each call.
    """

    model: nn.Module
    optimizer: torch.optim.SGD
    average: nn.Module | None
    config: RunConfig
    preprocessing: Preprocessing
    precision: str

    @cached_property
    def fill(self) -> Tensor:
        """What lies beyond an image and where it is cut out: the mean colour, uint8 ``(C,)``."""
        mean = (torch.tensor(self.preprocessing.mean) * 255).round().to(torch.uint8)
        return mean.to(next(self.model.parameters()).device)

    def __call__(
        self, pixels: Tensor, labels: Tensor, rate: Tensor, share: Tensor, *moves: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch's mean loss, float32 ``()``, and its wrong images, int64 ``()``, both from before the update.

        Takes pixels uint8 ``(N, C, S, S)`` and labels int64 ``(N,)`` as they are in the data, at full size or smaller;
        the learning rate and the average's share of :func:`sparsenet.optim.schedule`, ``()``; and a :class:`Moves`.
        """
        settings, data = self.config.optim, self.config.data.scaled(pixels.shape[-1], self.preprocessing.size)
        changes, shares = Moves(*moves), None
        images = self.preprocessing.normalise(augment(pixels, changes, data, self.fill))
        if data.mixup or data.cutmix:
            images, shares = mix(images, changes)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images).float()
            loss, wrong = judge(logits, labels, shares, settings.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)  # within: a graph's gradients have addresses of their own
        loss.backward()
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.model, share)
        return loss.detach(), wrong


def judge(logits: Tensor, labels: Tensor, shares: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``()`` of logits ``(N, classes)`` and how many classes are wrong, int64 ``()``.

    Of images that :func:`mix` has mixed, each label counts by its share, float32 ``(N,)`` being the image's own; a
    class is wrong if it is not that with the larger share.
    """
    predicted = logits.detach().argmax(1)
    if shares is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), (predicted != labels).sum()
    others = labels.flip(0)
    own, other = (
        F.cross_entropy(logits, each, reduction="none", label_smoothing=smoothing) for each in (labels, others)
    )
    larger = torch.where(shares < 0.5, others, labels)
    return torch.lerp(other, own, shares).mean(), (predicted != larger).sum()


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
        with torch.cuda.stream(self.stream):  # torch.cuda.graph does not put the stream back where a capture fails
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
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):  # one that succeeds resets the generator
            torch.zeros(1, device=self.stream.device)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}  # by type of device


def recorder(device: torch.device) -> Recorder | None:
    """What records the work of *device*; ``None`` where nothing can."""
    made = RECORDERS.get(device.type)
    return made(device) if made else None


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
            self.tell(f"{self.name} is not captured: expected a device of type cuda, found {device.type}")

    def _record(self, recorder: Recorder, shapes: Shapes, inputs: tuple[Tensor, ...]) -> Outputs:
        kept = tuple(each.clone() for each in inputs)
        try:
            replay, outputs = recorder.capture(partial(self.function, *kept))
        except RuntimeError as error:
            first = error.__context__ or error  # the second error is that of ending a capture gone wrong
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
        return Captured(function, name, self.recorder, self.news.append) if self.wanted else function

    def tell(self) -> Iterator[str]:
        """What has not been told yet."""
        while self.news:
            yield self.news.pop(0)
