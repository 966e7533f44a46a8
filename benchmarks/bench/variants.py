"""What is compared: an implementation in a precision, as it is or with options; and the work that is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet import capture
from sparsenet.architecture import Architecture
from sparsenet.config import nearest
from sparsenet.device import traits
from sparsenet.extras import require
from sparsenet.model import SparseNet
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import IMPLEMENTATIONS, OPAQUE

PRECISIONS = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of the weights
THEIRS = (
    "torchvision",
    "torchvision_efficient",
)  # its DenseNet, for comparison; the second recomputes (checkpoints)
OPTIONS = {
    "nhwc": "images and weights channels-last",
    "lean": "bottlenecks computed again in backward, as with train --memory lean",
    "captured": "recorded once as a CUDA graph and replayed, as the program trains",
    "compiled": "under torch.compile",
}


@dataclass(frozen=True)
class Variant:
    """``reference-bf16-nhwc-compiled``: an implementation, a precision (bf16 is autocast's), and options."""

    implementation: str
    precision: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.implementation, self.precision, *self.options))

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant of a name; ``ValueError`` in one line."""
        implementation, _, rest = text.partition("-")
        precision, *options = rest.split("-")
        for what, found, known in (
            ("an implementation", implementation, (*IMPLEMENTATIONS, *THEIRS)),
            ("a precision", precision, ("fp32", "bf16")),
            *(("an option", option, tuple(OPTIONS)) for option in options),
        ):
            if found not in known:
                raise ValueError(
                    f"--variants: expected names like reference-fp32 or shared-bf16-captured, found {text!r}: "
                    f"{found!r} is not {what} of {', '.join(known)}{nearest(found, known)}"
                )
        return cls(
            implementation, precision, tuple(option for option in OPTIONS if option in options)
        )

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run on *device*; ``None`` where it can."""
        if "captured" in self.options and not traits(device).records:
            return f"only CUDA devices record their work, found {device.type}"
        if "lean" in self.options and self.implementation in ("reference", *THEIRS):
            return "lean is for this library's engines, the others keep everything"
        if "compiled" in self.options and self.implementation in OPAQUE:
            return "a compiler cannot look into kernels of their own and is shown the reference"
        if self.implementation in THEIRS:
            return _not_importable("torchvision")
        return dispatch.unavailable(self.implementation, device)


def _not_importable(package: str) -> str | None:
    try:
        require(package, "")
    except ImportError:
        return f"expected the package {package}, found none"
    except RuntimeError as error:  # its kernels are for another build of PyTorch
        return f"expected a {package} that fits this torch, found one that does not: {error}"
    return None


def defaults(
    precisions: Sequence[str], compile_too: bool, device: torch.device
) -> Iterator[Variant]:
    """All there is to compare, the yardstick first; some may not be able to run on *device*."""
    accelerated, records = device.type != "cpu", traits(device).records
    for precision in precisions:
        yield Variant("reference", precision)
        if accelerated:
            yield Variant("reference", precision, ("nhwc",))
        if compile_too:
            yield Variant(
                "reference", precision, ("nhwc", "compiled") if accelerated else ("compiled",)
            )
        for implementation in [name for name in IMPLEMENTATIONS if name != "reference"]:
            if records:
                yield Variant(implementation, precision, ("captured",))
            yield Variant(implementation, precision)


class Workload:
    """A variant of a network with an optimizer and a fixed random batch: ``step`` and ``infer`` are measured.

    The learning rate is 0, so that every step is the same step, and what is measured is what was checked. Equal
    architectures get equal weights, images and labels.
    """

    def __init__(
        self,
        variant: Variant,
        architecture: Architecture,
        batch_size: int,
        image_size: int,
        device: torch.device,
    ):
        self.variant, self.device = variant, device
        self.dtype = PRECISIONS[variant.precision]
        self.layout = torch.channels_last if "nhwc" in variant.options else torch.contiguous_format
        self.shape, self.classes = (
            (batch_size, architecture.in_chans, image_size, image_size),
            architecture.num_classes,
        )
        torch.manual_seed(0)
        self.model = _built(variant, architecture).to(device, self.dtype)
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.draw(0)
        # With weight decay PyTorch's SGD leaves the gradients as they were.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.0, 0.9, weight_decay=1e-4, nesterov=True
        )
        self.network: Callable[[Tensor], Tensor] = self.model
        if "compiled" in variant.options:
            self.network = _compiled(self.model)
        self._step: Callable[..., tuple[Tensor, ...]] = self._forward_backward_update
        self._infer: Callable[..., Tensor] = self._forward
        self.failures: list[str] = []
        if "captured" in variant.options:
            self._step = capture.Captured(self._step, "the training step", tell=self._told)
            self._infer = capture.Captured(self._infer, "the inference pass", tell=self._told)

    def draw(self, number: int) -> None:
        """Takes another random batch; number 0 is the one that is measured."""
        random = torch.Generator().manual_seed(number)
        images = torch.randn(self.shape, generator=random)
        self.images = images.to(self.device, self.dtype, memory_format=self.layout)
        self.labels = torch.randint(self.classes, self.shape[:1], generator=random).to(self.device)

    def mode(self, training: bool) -> None:
        """To be called before :meth:`step` and :meth:`infer`: not part of what is measured."""
        self.model.train(training)

    def step(self) -> Tensor:
        """One training step: logits ``(N, classes)`` of before its update."""
        return self._step(self.images, self.labels)[0]

    @torch.no_grad()
    def infer(self) -> Tensor:
        """One inference pass: logits ``(N, classes)``."""
        return self._infer(self.images)

    def settle(self, act: Callable[[], Tensor]) -> Tensor:
        """*act* once, or as often as it takes until it is recorded; ``ValueError`` where that, or compiling, fails."""
        try:
            for _ in range(capture.WARM_UP * ("captured" in self.variant.options)):
                act()
            found = act()
        except RuntimeError as error:
            if "compiled" not in self.variant.options or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"bench: {self.variant} does not compile: {str(error).strip().splitlines()[0]}"
            ) from error
        if self.failures:
            raise ValueError(f"bench: {self.variant}: {self.failures[0]}")
        return found

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """Other scales, shifts and running statistics than a new network's, under which one left out would not show.

        Shifts are about 1 or -1: fewer values lie near 0, where a rounding decides whether a ReLU lets them through.
        """
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        pairs = [(tensor, tensor.detach().clone()) for _, tensor in named if tensor.ndim == 1]
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in ((name, tensor) for name, tensor in named if tensor.ndim == 1):
                noise = torch.randn(len(tensor), generator=random) / 10
                if name.endswith("bias"):
                    noise += 2 * torch.randint(2, (len(tensor),), generator=random) - 1
                tensor.add_(noise.abs() if name.endswith("var") else noise)
        yield
        with torch.no_grad():
            for tensor, before in pairs:
                tensor.copy_(before)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Of the last step, with the parameters' names."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def _told(self, line: str) -> None:
        if "not captured" in line:
            self.failures.append(line)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.variant.precision == "bf16"
        )

    def _forward(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.network(images)

    def _forward_backward_update(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = self._forward(images)
        loss = F.cross_entropy(
            logits if self.variant.precision == "fp64" else logits.float(), labels
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return logits.detach(), loss.detach()


def _built(variant: Variant, architecture: Architecture) -> nn.Module:
    if variant.implementation in THEIRS:
        return torchvision_densenet(architecture, variant.implementation == "torchvision_efficient")
    return SparseNet(
        architecture, variant.implementation, "lean" if "lean" in variant.options else "normal"
    )


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """As one graph, or an error: with breaks it would be no yardstick."""
    for stage in model.stages if isinstance(model, SparseNet) else ():
        topology: Any = stage.plan.topology  # type: ignore[union-attr]
        _ = topology.first_reader, topology.last_reader  # Python 3.11 takes a lock to cache them
    return torch.compile(model, fullgraph=True)


def torchvision_densenet(architecture: Architecture, efficient: bool) -> nn.Module:
    """torchvision's network of the same architecture; ``ValueError`` where it has none."""
    dense = all(stage.topology.is_dense for stage in architecture.stages)
    if not (dense and architecture.stem == "imagenet" and architecture.bottleneck):
        raise ValueError(
            "--variants: torchvision has the networks densenet121, 161, 169, 201 and the like only"
        )
    settings: dict[str, Any] = {
        "growth_rate": architecture.growth_rates[0],
        "block_config": architecture.stage_depths,
        "num_init_features": architecture.stages[0].in_width,
        "num_classes": architecture.num_classes,
        "memory_efficient": efficient,
    }
    made: nn.Module = require("torchvision.models", "").DenseNet(**settings)
    return made
