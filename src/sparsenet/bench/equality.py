"""That everything which is measured computes the same: nothing is timed before."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor

from sparsenet.adopt import adopt
from sparsenet.architecture import Architecture
from sparsenet.bench.variants import THEIRS, Variant, Workload

TRUTH = Variant("reference", "fp32")
SMALL = 8  # images on which the reference's own error in fp32 is measured: fp64 is slow
FLIPPED = 0.8  # share of ReLUs that an error flips, for each unit of it: twice the standard normal's density at 0
ROUNDING = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}

Results = dict[str, Tensor]  # what is compared, flat, in fp64 on the CPU
Errors = dict[str, tuple[float, float]]  # relative, and what is allowed


def check(
    workloads: Mapping[Variant, Workload], architecture: Architecture, batch_size: int, image_size: int
) -> dict[Variant, dict[str, dict[str, float]]]:
    """Runs every workload and compares it with ``reference-fp32`` on the same batch: the error found, and allowed.

    Errors are relative, of the logits in training and in inference, and of the gradients of each kind of parameter
    in each stage. In bf16 at most twice the reference's own error is allowed, and a rounding. In fp32 it is three
    times the reference's own, measured against fp64 on a small batch: twice for the other, once because the truth is
    fp32 as well; and a rounding for each layer, which add in squares. Gradients in fp32 are mostly nearer, but change
    much, if rarely, where rounding flips a ReLU: an error of e flips a share of at most 0.8 e of a layer's ReLUs,
    which adds 0.8 e to the square of the gradients' error, and twice what that comes to is allowed. In both
    precisions one flipped ReLU adds its share to the square.

    Of the gradients, the one nearest to its bound is told. Raises ``ValueError`` for the first variant that is wrong.
    """
    device = next(iter(workloads.values())).device
    own = _fp32_error(architecture, min(batch_size, SMALL), image_size, device)
    flips, flip = 3 * own["logits"] * FLIPPED * architecture.depth, 1 / _fewest(architecture, batch_size, image_size)
    rounding = ROUNDING["fp32"] * architecture.depth**0.5
    known: dict[Variant, Results] = {}

    def errors(variant: Variant) -> dict[str, float]:
        for each in (TRUTH, variant):
            if each not in known:
                work = workloads.get(each) or Workload(each, architecture, batch_size, image_size, device)
                known[each] = _results(work)
        return {what: _difference(known[variant].get(what), value) for what, value in known[TRUTH].items()}

    def allowed(variant: Variant) -> dict[str, float]:
        if variant.precision == "bf16":
            bounds = {k: 2 * e + ROUNDING["bf16"] for k, e in errors(Variant("reference", "bf16")).items()}
        else:
            bounds = {k: 3 * own[k] + rounding if k in own else 2 * flips**0.5 for k in known[TRUTH]}
        return {k: bound if k in own else (bound**2 + flip) ** 0.5 for k, bound in bounds.items()}

    found: dict[Variant, Errors] = {}
    for variant, work in workloads.items():
        if variant.implementation in THEIRS:
            found[variant] = {"logits": (_their_error(work), 3 * own["logits"] + rounding)}
        else:
            made, limits = errors(variant), allowed(variant)
            found[variant] = {what: (error, limits[what]) for what, error in made.items()}
        _refuse(variant, found[variant])
    return {variant: _told(errors) for variant, errors in found.items()}


def _told(errors: Errors) -> dict[str, dict[str, float]]:
    gradients = [what for what in errors if what.startswith("gradients")]
    worst = sorted(gradients, key=lambda what: errors[what][0] / errors[what][1])[-1:]
    told = [what for what in errors if what not in gradients or what in worst]
    return {what: dict(zip(("error", "allowed"), errors[what], strict=True)) for what in told}


def _refuse(variant: Variant, errors: Errors) -> None:
    for what, (error, allowed) in errors.items():
        if not error <= allowed:
            raise ValueError(
                f"bench: the {what} of {variant} differ from {TRUTH}'s by {error:.1e}, expected at most {allowed:.1e}; "
                "nothing was timed"
            )


def _results(work: Workload) -> Results:
    found: dict[str, Tensor] = {}
    with work.disturbed():
        work.mode(training=False)
        found["inference logits"] = work.settle(work.infer)
        work.mode(training=True)
        found["logits"] = work.settle(work.step)
    gradients = sorted((_kind(name), i, g) for i, (name, g) in enumerate(work.gradients()))
    for kind, members in groupby(gradients, lambda each: each[0]):
        found[kind] = torch.cat([gradient.flatten() for _, _, gradient in members])
    return {what: value.detach().flatten().cpu().double() for what, value in found.items()}


def _kind(name: str) -> str:
    """``gradients of stages.1 norm.weight`` for every such parameter of the stage."""
    return "gradients of " + re.sub(r"^(stages\.\d+).*\.(\w+\.\w+)$", r"\1 \2", name)


def _fewest(architecture: Architecture, batch_size: int, image_size: int) -> int:
    """ReLUs of the smallest layer, for the whole batch."""
    pairs = zip(architecture.stages, architecture.sizes(image_size), strict=True)
    return min(batch_size * size * size * min(stage.read_widths) for stage, size in pairs)


def _fp32_error(architecture: Architecture, images: int, image_size: int, device: torch.device) -> dict[str, float]:
    """Of the reference's logits, against fp64."""
    exact = device if device.type == "cuda" else torch.device("cpu")  # other accelerators may have no fp64
    truth = _results(Workload(Variant("reference", "fp64"), architecture, images, image_size, exact))
    found = _results(Workload(TRUTH, architecture, images, image_size, device))
    return {what: _difference(found[what], truth[what]) for what in ("inference logits", "logits")}


def _difference(found: Tensor | None, truth: Tensor) -> float:
    if found is None or found.shape != truth.shape:
        return math.inf
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def _their_error(work: Workload) -> float:
    """Of another library's network, in fp32, against the reference with its weights."""
    _results(work)  # only so that it has run
    ours = adopt(work.model, "reference")
    with torch.no_grad():
        theirs, truth = (model.train()(work.images).double().cpu() for model in (work.model, ours))
    return _difference(theirs, truth)
