"""What is compared: an implementation in a precision, with options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparsenet.device import traits
from sparsenet.extras import require
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import IMPLEMENTATIONS, OPAQUE
from sparsenet.texts import nearest

TORCHVISION = "torchvision"  # its DenseNet, for comparison
NAMES = (*IMPLEMENTATIONS, TORCHVISION)
OPTIONS = {
    "nhwc": "images and weights are channels-last",
    "captured": "steps are recorded once as a CUDA graph and replayed, as the program trains",
    "compiled": "the network is compiled by torch.compile",
}


@dataclass(frozen=True)
class Variant:
    """``reference-bf16-nhwc-compiled``: an implementation, a precision (by autocast), options."""

    implementation: str
    precision: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.implementation, self.precision, *self.options))

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads the name of a variant; raises ``ValueError`` in one line."""
        implementation, _, rest = text.partition("-")
        precision, *options = rest.split("-")
        expected = [
            ("an implementation", implementation, NAMES),
            ("a precision", precision, ("fp32", "bf16")),
        ]
        expected += [("an option", option, tuple(OPTIONS)) for option in options]
        for kind, word, known in expected:
            if word not in known:
                raise ValueError(
                    "--variants: expected names like reference-fp32 or shared-bf16-captured, "
                    f"found {text!r}: {word!r} is not {kind} of {', '.join(known)}"
                    f"{nearest(word, known)}"
                )
        ordered = tuple(option for option in OPTIONS if option in options)
        return cls(implementation, precision, ordered)

    def unavailable(self, device: torch.device) -> str | None:
        """Says why the variant cannot run on *device*; ``None`` where it can."""
        if "captured" in self.options and not traits(device).records:
            return f"only CUDA devices record their work, found {device.type}"
        if "compiled" in self.options and self.implementation in OPAQUE:
            return "a compiler cannot look into these kernels and would compile the reference"
        if self.implementation == TORCHVISION:
            return _torchvision_unavailable()
        return dispatch.unavailable(self.implementation, device)


def _torchvision_unavailable() -> str | None:
    try:
        require("torchvision", "")
    except ImportError:
        return "expected the package torchvision, found none"
    except RuntimeError as error:  # its kernels are for another build of PyTorch
        return f"expected a torchvision that fits this torch, found one that does not: {error}"
    return None


def default_variants(precisions: Sequence[str], device: torch.device) -> Iterator[Variant]:
    """Yields all that is compared unless asked otherwise, the reference first.

    Some of these may not be able to run on *device*.
    """
    for precision in precisions:
        yield Variant("reference", precision)
        if device.type != "cpu":
            yield Variant("reference", precision, ("nhwc",))
        for implementation in IMPLEMENTATIONS:
            if implementation == "reference":
                continue
            if traits(device).records:
                yield Variant(implementation, precision, ("captured",))
            yield Variant(implementation, precision)
