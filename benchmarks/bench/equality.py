"""Nothing is timed before it has been shown to compute what the reference computes.

Rounding flips a ReLU here and there, and the gradient changes by all that went through it. Which
ReLUs flip is chance: another processor rounds otherwise, and a bound that counts on the same ones
refuses what is right. How many flip is not chance: an error of e in what a layer's ReLUs are given
flips a share of at most 0.8 e of them, which adds 0.8 e to the square of the gradient's relative
error.

**How far chance goes.** Of n ReLUs, one that flips has a share w of the gradient's square. The mean
of w is 1/n and the mean of its square is 9/n², since a gradient at a ReLU is like a product of two
normal numbers, whose fourth moment is 9. So the square of an error whose mean is m has a variance
of 9 m/n, and the error itself has a standard deviation of 1.5 n^-½, whatever m is. Here n is that
of the smallest layer, and as many random batches are compared as make it large. Errors are means
over the batches: in a sum, a batch with many flips would outweigh the rest.

**What a large error hides**, a gradient that is wrong by a factor or lacks a term, shows in the
gradient's length. A flip takes a part away or adds another of the same size, so it changes the
length only as far as the error happens to lie along the gradient, now longer, now shorter. The
reference shows from batch to batch how large that part is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from benchmarks.bench.record import Bounded
from benchmarks.bench.variants import TORCHVISION, Variant
from benchmarks.bench.workload import Case, Workload
from sparsenet.adoption import adopt
from sparsenet.architecture import Architecture

TRUTH = Variant("reference", "fp32")
TRUTH_BF16 = Variant("reference", "bf16")  # how far from the truth others may be in bf16
FP64_IMAGES = 8  # on which the reference's own error in fp32 is measured: fp64 is slow
FLIPPED = 0.8  # share of ReLUs that an error flips, per unit: twice the normal density at 0
SPREAD = 1.5  # standard deviation of a gradient's error, times the root of the number of ReLUs
ENOUGH_RELUS = 4096  # of the smallest layer in all batches: a standard deviation of 0.02
SEVERAL_BATCHES = 4  # show by how much a figure varies
SURE = 5  # standard deviations: a normal number is larger once in three million times
ROUNDING = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}

Results = dict[str, Tensor]  # by quantity: flat, in fp64, on the CPU
# By quantity, (2, batches): relative errors, and by how much the norm is larger.
Differences = dict[str, Tensor]
Errors = dict[str, Bounded]  # by quantity


def check(workloads: Mapping[Variant, Workload]) -> dict[Variant, Errors]:
    """Compares workloads of one case with ``reference-fp32`` on the same random batches.

    Errors are relative and means over the batches: of the logits in training and inference, and of
    the gradients of each kind of parameter in each stage. In bf16 twice the reference's own error
    and a rounding are allowed, of the gradients' lengths as well. In fp32 it is three times the
    reference's own error, measured against fp64 on a small batch (the truth is fp32 as well), and
    a rounding for each layer, which add in squares; for gradients, twice what may flip at that
    error. For chance there are five standard deviations more.

    Returns the errors of the logits, and of the gradients the one nearest to its bound. Raises
    ``ValueError`` for the first variant that is wrong.
    """
    case = next(iter(workloads.values())).case
    ours = {v: work for v, work in workloads.items() if v.implementation != TORCHVISION}
    in_bf16 = any(variant.precision == "bf16" for variant in ours)
    for standard in (TRUTH_BF16, TRUTH) if in_bf16 else (TRUTH,):
        work = ours.pop(standard, None) or Workload(standard, case)
        ours = {standard: work, **ours}
    relus = fewest_relus(case.network, case.batch_size, case.image_size)
    batches = max(math.ceil(ENOUGH_RELUS / relus), SEVERAL_BATCHES if in_bf16 else 1)
    luck = chance(batches * relus)
    reference_errors = _fp32_errors_of_logits(case)
    differences = _compare(ours, batches)

    checked = {}
    for variant, work in workloads.items():
        if variant.precision == "bf16" and variant in ours:
            errors = dict(_bound_bf16(differences[variant], differences[TRUTH_BF16], luck))
        else:
            if variant in ours:
                means = {what: each[0].mean().item() for what, each in differences[variant].items()}
            else:
                means = {"logits": _error_of_other_library(work)}
            errors = {
                what: Bounded(error, _allowed_fp32(what, reference_errors, case.network, luck))
                for what, error in means.items()
            }
        _raise_if_wrong(variant, errors)
        checked[variant] = _worth_recording(errors)
    return checked


def fewest_relus(architecture: Architecture, batch_size: int, image_size: int) -> int:
    """Returns the number of ReLUs of the smallest layer for the whole batch."""
    fewest = []
    for stage, side in zip(architecture.stages, architecture.sizes(image_size), strict=True):
        layers = range(1, stage.topology.depth + 1)
        widths = [width for layer in layers for width, _, _ in stage.units(layer)]
        fewest.append(batch_size * side * side * min(stage.out_width, *widths))
    return min(fewest)


def chance(relus: int) -> float:
    """Returns five standard deviations of a gradient's error where some of the ReLUs flip."""
    return SURE * SPREAD / math.sqrt(relus)


def _allowed_fp32(
    what: str, reference_errors: Mapping[str, float], network: Architecture, luck: float
) -> float:
    if what in reference_errors:
        return 3 * reference_errors[what] + ROUNDING["fp32"] * math.sqrt(network.depth)
    return 2 * math.sqrt(3 * reference_errors["logits"] * FLIPPED * network.depth) + luck


def _bound_bf16(
    differences: Differences, reference: Differences, luck: float
) -> Iterator[tuple[str, Bounded]]:
    stages = torch.stack([each for what, each in reference.items() if "stages" in what])
    along_gradient = stages[:, 1] / stages[:, 0].clamp(min=1e-30)
    batches = along_gradient.shape[1]
    share = SURE * (along_gradient.square().mean() / batches).sqrt()
    for what, (errors, lengthening) in differences.items():
        allowed, allowed_length = 2 * reference[what].mean(1).abs() + ROUNDING["bf16"]
        if "logits" in what:
            yield what, Bounded(errors.mean().item(), allowed.item())
            continue
        yield what, Bounded(errors.mean().item(), allowed.item() + 5**0.5 * luck)
        allowed_length += share * errors.square().mean().sqrt()
        length = lengthening.mean().abs().item()
        yield f"lengths of the {what}", Bounded(length, allowed_length.item())


def _worth_recording(errors: Errors) -> Errors:
    def closeness(what: str) -> float:
        return errors[what].error / errors[what].allowed

    gradients = [what for what in errors if "gradients" in what]
    closest = max(reversed(gradients), key=closeness) if gradients else None
    return {
        what: bounded
        for what, bounded in errors.items()
        if what not in gradients or what == closest
    }


def _raise_if_wrong(variant: Variant, errors: Errors) -> None:
    for what, bounded in errors.items():
        if not bounded.error <= bounded.allowed:
            raise ValueError(
                f"the {what} of {variant} differ from {TRUTH}'s by {bounded.error:.1e}, "
                f"expected at most {bounded.allowed:.1e}; nothing was timed"
            )


def _compare(works: Mapping[Variant, Workload], batches: int) -> dict[Variant, Differences]:
    """Compares each workload with the first one.

    Inference on all batches comes before any step, since steps change running statistics. The
    batch that is timed comes last, and stays.
    """
    columns: dict[Variant, dict[str, list[Tensor]]] = {variant: {} for variant in works}
    with ExitStack() as disturbed:
        for work in works.values():
            disturbed.enter_context(work.disturbed())
        for compute in (_inference, _training):
            for number in reversed(range(batches)):
                truth: Results = {}
                for variant, work in works.items():
                    work.draw_batch(number)
                    results = compute(work, first=number == batches - 1)
                    truth = truth or results
                    for what, value in truth.items():
                        difference = _difference(results.get(what), value)
                        columns[variant].setdefault(what, []).append(difference)
    return {
        variant: {what: torch.stack(each, 1) for what, each in differences.items()}
        for variant, differences in columns.items()
    }


def _inference(work: Workload, first: bool) -> Results:
    work.set_training(False)
    return _exact({"inference logits": work.warm_up(work.infer) if first else work.infer()})


def _training(work: Workload, first: bool) -> Results:
    work.set_training(True)
    results = {"logits": work.warm_up(work.step) if first else work.step()}
    gradients = sorted((_kind(name), i, g) for i, (name, g) in enumerate(work.gradients()))
    for kind, members in groupby(gradients, lambda each: each[0]):
        results[kind] = torch.cat([gradient.flatten() for _, _, gradient in members])
    return _exact(results)


def _exact(results: Results) -> Results:
    return {what: value.detach().flatten().cpu().double() for what, value in results.items()}


def _kind(name: str) -> str:
    """Returns ``gradients of stages.1 norm.weight`` for every such parameter of the stage."""
    return "gradients of " + re.sub(r"^(stages\.\d+).*\.(\w+\.\w+)$", r"\1 \2", name)


def _fp32_errors_of_logits(case: Case) -> dict[str, float]:
    """Returns the reference's own errors in fp32 against fp64."""
    small = replace(case, batch_size=min(case.batch_size, FP64_IMAGES))
    on_cpu = replace(small, device=torch.device("cpu"))  # other accelerators may have no fp64
    fp64 = Variant("reference", "fp64")
    works = {
        fp64: Workload(fp64, small if case.device.type == "cuda" else on_cpu),
        TRUTH: Workload(TRUTH, small),
    }
    differences = _compare(works, 1)[TRUTH]
    return {what: each[0].item() for what, each in differences.items() if "logits" in what}


def _difference(value: Tensor | None, truth: Tensor) -> Tensor:
    """Returns the norm of the difference and the difference of the norms, relative to the truth."""
    if value is None or value.shape != truth.shape:
        return torch.full((2,), math.inf)
    length = truth.norm()
    return torch.stack([(value - truth).norm(), value.norm() - length]).div(length.clamp(min=1e-30))


def _error_of_other_library(work: Workload) -> float:
    """Compares another library's network in fp32 with the reference that has its weights."""
    with work.disturbed():
        _training(work, first=True)  # so that it has run
    reference = adopt(work.model, "reference")
    with torch.no_grad():
        logits = [m.train()(work.images).double().cpu() for m in (work.model, reference)]
    return _difference(*logits)[0].item()
