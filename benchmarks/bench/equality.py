"""That everything which is measured computes the same: nothing is timed before.

Rounding flips a ReLU here and there, and the gradient changes by all that went through it. Which ones flip is chance:
another processor rounds otherwise, and a bound that counts on the same ones refuses what is right. How many flip is
not: an error of e in what a layer's ReLUs are given flips a share of at most 0.8 e of them, which adds 0.8 e to the
square of the gradient's relative error.

**How far chance goes.** Of n ReLUs, one that flips has a share w of the gradient's square: 1/n in the mean, and 9/n² in
the mean of squares, since a gradient at a ReLU is like a product of two normal numbers, whose fourth moment is 9. A
square of an error that is m in the mean so has a variance of 9 m/n, and the error itself a standard deviation of
1.5 n^-½, whatever m is. Here n is of the smallest layer, and as many random batches are compared as make it large.
Errors are means over them, in which every batch has the same say: in a sum one with many flips would outweigh the rest.

**What a large error hides**, a gradient that is wrong by a factor or lacks a term, shows in the gradient's length. A
flip takes a part away or adds another of the same size, so it changes the length only as far as the error happens to
lie along the gradient, now longer, now shorter. How large that part is, the reference shows from batch to batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor

from benchmarks.bench.variants import THEIRS, Variant, Workload
from sparsenet.adoption import adopt
from sparsenet.architecture import Architecture

TRUTH = Variant("reference", "fp32")
HALF = Variant("reference", "bf16")  # how far from the truth others may be in bf16
SMALL = 8  # images on which the reference's own error in fp32 is measured: fp64 is slow
FLIPPED = 0.8  # share of ReLUs that an error flips, for each unit of it: twice the standard normal's density at 0
SPREAD = 1.5  # standard deviation of a gradient's error, times the root of the number of ReLUs: see above
ENOUGH = 4096  # ReLUs of the smallest layer, in all batches together: a standard deviation of 0.02
SEVERAL = 4  # batches that show by how much a figure varies
SURE = 5  # standard deviations: a normal number is larger once in three million times
ROUNDING = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}

Results = dict[str, Tensor]  # what is compared, flat, in fp64 on the CPU
Errors = dict[str, tuple[float, float]]  # found, and what is allowed


def check(
    workloads: Mapping[Variant, Workload],
    architecture: Architecture,
    batch_size: int,
    image_size: int,
) -> dict[Variant, dict[str, dict[str, float]]]:
    """Runs every workload and compares it with ``reference-fp32`` on the same batches: the error found, and allowed.

    Errors are relative, of the logits in training and in inference, and of the gradients of each kind of parameter
    in each stage; means over random batches, of which the last is the one that is measured. In bf16 at most twice the
    reference's own error is allowed, and a rounding; of lengths of gradients as well. In fp32 it is three times the
    reference's own, measured against fp64 on a small batch: twice for the other, once because the truth is fp32 as
    well; and a rounding for each layer, which add in squares. Gradients in fp32 are mostly nearer, but flips are rare
    and change them much: twice what may flip at that error is allowed. For chance, there are five standard deviations
    more: of an error; in bf16 of one less a double of another; of a length.

    Of the gradients, the error or length nearest to its bound is told. Raises ``ValueError`` for the first variant
    that is wrong.
    """
    device = next(iter(workloads.values())).device
    ours = {
        variant: work for variant, work in workloads.items() if variant.implementation not in THEIRS
    }
    half = any(variant.precision == "bf16" for variant in ours)
    for each in (HALF, TRUTH) if half else (TRUTH,):
        work = ours.pop(each, None) or Workload(each, architecture, batch_size, image_size, device)
        ours = {each: work, **ours}
    relus = fewest_relus(architecture, batch_size, image_size)
    batches = max(math.ceil(ENOUGH / relus), SEVERAL if half else 1)
    luck = chance(batches * relus)
    own = _fp32_error(architecture, min(batch_size, SMALL), image_size, device)
    compared = _compared(ours, batches)

    found: dict[Variant, Errors] = {}
    for variant, work in workloads.items():
        if variant.implementation in THEIRS:
            found[variant] = {
                "logits": (_their_error(work), _allowed_in_fp32("logits", own, architecture, luck))
            }
        elif variant.precision == "bf16":
            found[variant] = dict(_in_bf16(compared[variant], compared[HALF], luck))
        else:
            errors = {what: each[0].mean().item() for what, each in compared[variant].items()}
            found[variant] = {
                k: (e, _allowed_in_fp32(k, own, architecture, luck)) for k, e in errors.items()
            }
        _refuse(variant, found[variant])
    return {variant: _told(errors) for variant, errors in found.items()}


def fewest_relus(architecture: Architecture, batch_size: int, image_size: int) -> int:
    """Of the smallest layer, for the whole batch."""
    pairs = zip(architecture.stages, architecture.sizes(image_size), strict=True)
    return min(
        batch_size * size * size * width
        for stage, size in pairs
        for width in (
            stage.out_width,
            *(width for i in range(stage.topology.depth) for width, _, _ in stage.units(i + 1)),
        )
    )


def chance(relus: int) -> float:
    """Five standard deviations of a gradient's error where some of so many ReLUs flip."""
    return SURE * SPREAD / math.sqrt(relus)


def _allowed_in_fp32(
    what: str, own: Mapping[str, float], architecture: Architecture, luck: float
) -> float:
    if what in own:
        return 3 * own[what] + ROUNDING["fp32"] * math.sqrt(architecture.depth)
    return 2 * math.sqrt(3 * own["logits"] * FLIPPED * architecture.depth) + luck


def _in_bf16(
    found: Mapping[str, Tensor], half: Mapping[str, Tensor], luck: float
) -> Iterator[tuple[str, tuple[float, float]]]:
    stages = torch.stack([each for what, each in half.items() if "stages" in what])
    parts = stages[:, 1] / stages[:, 0].clamp(min=1e-30)
    part = SURE * (parts.square().mean() / parts.shape[1]).sqrt()
    for what, (errors, longer) in found.items():
        allowed, allowed_longer = 2 * half[what].mean(1).abs() + ROUNDING["bf16"]
        if "logits" in what:
            yield what, (errors.mean().item(), allowed.item())
        else:
            yield what, (errors.mean().item(), allowed.item() + 5**0.5 * luck)
            allowed_longer += part * errors.square().mean().sqrt()
            yield f"lengths of the {what}", (longer.mean().abs().item(), allowed_longer.item())


def _told(errors: Errors) -> dict[str, dict[str, float]]:
    gradients = [what for what in errors if "gradients" in what]
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


def _compared(works: Mapping[Variant, Workload], batches: int) -> dict[Variant, dict[str, Tensor]]:
    """How far each is from the first of them, batch by batch: relative errors and how much longer, ``(2, batches)``.

    Inference on all batches comes before any step, since steps change running statistics. The batch that is measured
    comes last, and stays.
    """
    found: dict[Variant, dict[str, list[Tensor]]] = {variant: {} for variant in works}
    with ExitStack() as disturbed:
        for work in works.values():
            disturbed.enter_context(work.disturbed())
        for results in (_inference, _training):
            for number in reversed(range(batches)):
                truth: Results = {}
                for variant, work in works.items():
                    work.draw(number)
                    made = results(work, first=number == batches - 1)
                    truth = truth or made
                    for what, value in truth.items():
                        found[variant].setdefault(what, []).append(
                            _difference(made.get(what), value)
                        )
    return {
        variant: {what: torch.stack(each, 1) for what, each in errors.items()}
        for variant, errors in found.items()
    }


def _inference(work: Workload, first: bool) -> Results:
    work.mode(training=False)
    return _exact({"inference logits": work.settle(work.infer) if first else work.infer()})


def _training(work: Workload, first: bool) -> Results:
    work.mode(training=True)
    found = {"logits": work.settle(work.step) if first else work.step()}
    gradients = sorted((_kind(name), i, g) for i, (name, g) in enumerate(work.gradients()))
    for kind, members in groupby(gradients, lambda each: each[0]):
        found[kind] = torch.cat([gradient.flatten() for _, _, gradient in members])
    return _exact(found)


def _exact(found: Results) -> Results:
    return {what: value.detach().flatten().cpu().double() for what, value in found.items()}


def _kind(name: str) -> str:
    """``gradients of stages.1 norm.weight`` for every such parameter of the stage."""
    return "gradients of " + re.sub(r"^(stages\.\d+).*\.(\w+\.\w+)$", r"\1 \2", name)


def _fp32_error(
    architecture: Architecture, images: int, image_size: int, device: torch.device
) -> dict[str, float]:
    """Of the reference's logits, against fp64."""
    exact = (
        device if device.type == "cuda" else torch.device("cpu")
    )  # other accelerators may have no fp64
    works = {
        variant: Workload(variant, architecture, images, image_size, where)
        for variant, where in ((Variant("reference", "fp64"), exact), (TRUTH, device))
    }
    return {
        what: each[0].item()
        for what, each in _compared(works, 1)[TRUTH].items()
        if "logits" in what
    }


def _difference(found: Tensor | None, truth: Tensor) -> Tensor:
    """Relative: the norm of the difference, and that of the norms."""
    if found is None or found.shape != truth.shape:
        return torch.full((2,), math.inf)
    length = truth.norm()
    return torch.stack([(found - truth).norm(), found.norm() - length]).div(length.clamp(min=1e-30))


def _their_error(work: Workload) -> float:
    """Of another library's network, in fp32, against the reference with its weights."""
    with work.disturbed():
        _training(work, first=True)  # only so that it has run
    ours = adopt(work.model, "reference")
    with torch.no_grad():
        theirs, truth = (model.train()(work.images).double().cpu() for model in (work.model, ours))
    return _difference(theirs, truth)[0].item()
