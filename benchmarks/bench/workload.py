"""The work that is measured: training steps and inference passes of one variant of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench.variants import TORCHVISION, Variant
from sparsenet import capture
from sparsenet.architecture import Architecture
from sparsenet.extras import require
from sparsenet.model import SparseNet

WEIGHTS = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """What all variants of a comparison share: the network, its batch and the device."""

    network: Architecture
    batch_size: int
    image_size: int  # pixels
    device: torch.device


class Workload:
    """A variant of a network, its optimizer and a random batch: ``step`` and ``infer`` are timed.

    The learning rate is 0, so that all steps are equal and what is timed is what was checked.
    Equal cases get equal weights, images and labels.
    """

    def __init__(self, variant: Variant, case: Case):
        self.variant, self.case, self.device = variant, case, case.device
        channels_last = "nhwc" in variant.options
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.model = _build(variant, case.network)
        self.model.to(self.device, WEIGHTS[variant.precision])
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.draw_batch(0)
        # With weight decay PyTorch's SGD leaves the gradients as they were.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.0, 0.9, weight_decay=1e-4, nesterov=True
        )
        self.network: Callable[[Tensor], Tensor] = self.model
        if "compiled" in variant.options:
            self.network = _compile(self.model)
        self._step: Callable[..., tuple[Tensor, ...]] = self._forward_backward_update
        self._infer: Callable[..., Tensor] = self._forward
        self.failures: list[str] = []
        if "captured" in variant.options:
            self._step = capture.Captured(self._step, "the training step", tell=self._note)
            self._infer = capture.Captured(self._infer, "the inference pass", tell=self._note)

    def draw_batch(self, number: int) -> None:
        """Draws a random batch; the one with number 0 is timed."""
        random, case = torch.Generator().manual_seed(number), self.case
        side = case.image_size
        images = torch.randn(case.batch_size, case.network.in_chans, side, side, generator=random)
        labels = torch.randint(case.network.num_classes, (case.batch_size,), generator=random)
        dtype = WEIGHTS[self.variant.precision]
        self.images = images.to(self.device, dtype, memory_format=self.layout)
        self.labels = labels.to(self.device)

    def set_training(self, training: bool) -> None:
        """Prepares for ``step`` or for ``infer``, which should not time this."""
        self.model.train(training)

    def step(self) -> Tensor:
        """Makes a training step and returns the logits ``(N, classes)`` of before its update."""
        return self._step(self.images, self.labels)[0]

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Makes an inference pass and returns its logits ``(N, classes)``."""
        return self._infer(self.images)

    def warm_up(self, act: Callable[[], Tensor]) -> Tensor:
        """Calls *act* once, or as often as it takes to record it, and returns its last result.

        Raises ``ValueError`` where recording or compiling fails.
        """
        try:
            if "captured" in self.variant.options:
                for _ in range(capture.WARM_UP):
                    act()
            result = act()
        except RuntimeError as error:
            if "compiled" not in self.variant.options or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.variant} does not compile: {reason}") from error
        if self.failures:
            raise ValueError(f"{self.variant}: {self.failures[0]}")
        return result

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """Changes scales, shifts and running statistics, so that one that is left out shows.

        Shifts are about 1 or -1: fewer values lie near 0, where rounding decides whether a ReLU
        lets them through.
        """
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        vectors = [(name, tensor) for name, tensor in named if tensor.ndim <= 1]
        before = [tensor.detach().clone() for _, tensor in vectors]
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in vectors:
                if not tensor.ndim:  # a number of batches
                    continue
                noise = torch.randn(len(tensor), generator=random) / 10
                if name.endswith("bias"):
                    noise += 2 * torch.randint(2, (len(tensor),), generator=random) - 1
                tensor.add_(noise.abs() if name.endswith("var") else noise)
        yield
        with torch.no_grad():
            for (_, tensor), value in zip(vectors, before, strict=True):
                tensor.copy_(value)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the gradients of the last step with the names of their parameters."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def _note(self, line: str) -> None:
        if "not captured" in line:
            self.failures.append(line)

    def _forward(self, images: Tensor) -> Tensor:
        bf16 = self.variant.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.network(images)

    def _forward_backward_update(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = self._forward(images)
        exact = logits if self.variant.precision == "fp64" else logits.float()
        loss = F.cross_entropy(exact, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return logits.detach(), loss.detach()


def _build(variant: Variant, network: Architecture) -> nn.Module:
    if variant.implementation == TORCHVISION:
        return _build_torchvision(network)
    return SparseNet(network, variant.implementation)


def _build_torchvision(network: Architecture) -> nn.Module:
    dense = all(stage.topology.is_dense for stage in network.stages)
    if not (dense and network.stem == "imagenet" and network.bottleneck):
        raise ValueError(
            "--variants: torchvision has the networks densenet121, 161, 169, 201 and the like only"
        )
    model: nn.Module = require("torchvision.models", "").DenseNet(
        growth_rate=network.growth_rates[0],
        block_config=network.stage_depths,
        num_init_features=network.stages[0].in_width,
        num_classes=network.num_classes,
    )
    return model


def _compile(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiles *model* as one graph, or raises: with breaks it would be no yardstick."""
    for stage in model.stages if isinstance(model, SparseNet) else ():
        topology: Any = stage.plan.topology  # type: ignore[union-attr]
        _ = topology.first_reader, topology.last_reader  # Python 3.11 takes a lock to cache them
    return torch.compile(model, fullgraph=True)
