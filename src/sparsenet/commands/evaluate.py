"""``sparsenet eval``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from sparsenet.commands.common import load_images, load_network, print_result
from sparsenet.data.errors import count_images
from sparsenet.data.selection import Selection
from sparsenet.device import choose_device
from sparsenet.evaluate import evaluate
from sparsenet.export.onnx import Exported
from sparsenet.export.runtimes import Runtime
from sparsenet.ops import dispatch
from sparsenet.run import Run
from sparsenet.weights import Measured


@dataclass(frozen=True)
class EvaluationReport:
    """What the command prints with ``--json``. Errors are percentages."""

    run: str
    dataset: str
    checkpoint: str
    engine: str
    precision: str
    error: float
    top5_error: float
    loss: float  # mean cross-entropy, nats
    images: int
    split: str  # "training", "validation", "test", "held-out", or nothing where data has no splits
    place: str  # where they lie
    notes: tuple[str, ...]  # about them
    seconds: float
    class_errors: dict[str, float | None]  # ``None``: no image of the class
    stated_error: float | None  # what a weights file says of itself


def run(args: argparse.Namespace) -> int:
    """Evaluates a run's network on its test images."""
    runtime = _runtime(args)
    device = choose_device("cpu" if runtime else args.device)
    trained = load_network(args, device)
    if runtime:
        precision = runtime.precision
    else:
        asked = args.precision
        of_run = Run(trained.path).arithmetic().precision
        if asked == "auto" and of_run == "fp32":  # as its own result was computed
            asked = of_run
        precision = dispatch.choose_precision(asked, device, training=False)
    data = load_images(args, trained)
    pixels = data.images[: args.batch_size].pixels
    model = Exported(trained, runtime, pixels) if runtime else trained.model
    torch_precision = "fp32" if runtime else precision  # of what PyTorch is left to do
    evaluation = evaluate(
        model, data.images, trained.preprocessing, device, args.batch_size, torch_precision
    )
    stated = trained.about.measured.get(precision)
    report = EvaluationReport(
        run=args.run,
        dataset=data.name,
        checkpoint=args.checkpoint,
        engine=args.engine,
        precision=precision,
        error=evaluation.error,
        top5_error=evaluation.top5_error,
        loss=evaluation.loss,
        images=evaluation.images,
        split=data.kind,
        place=data.place,
        notes=data.notes,
        seconds=evaluation.seconds,
        class_errors=evaluation.class_errors(trained.classes),
        stated_error=stated.error if stated else None,
    )
    return print_result(report, _lines(report, data, stated), args.json)


def _runtime(args: argparse.Namespace) -> Runtime | None:
    """The engine that was asked for in PyTorch's place."""
    if args.engine == "torch":
        return None
    if args.device not in ("auto", "cpu"):
        raise ValueError(
            f"--device: expected auto or cpu with --engine {args.engine}, found {args.device!r}"
        )
    return Runtime(args.engine, args.precision)


def _lines(report: EvaluationReport, data: Selection, stated: Measured | None) -> Iterator[str]:
    engine = "" if report.engine == "torch" else f" by {report.engine}"
    yield f"{data.description}, {report.seconds:.2f} s{engine}"
    top5 = f"top-5 error {report.top5_error:.2f} %, " if len(report.class_errors) > 5 else ""
    yield f"error {report.error:.2f} %, {top5}loss {report.loss:.4f}"
    for name, error in report.class_errors.items():
        yield f"  {name}: {'no image' if error is None else f'{error:.2f} %'}"
    if stated:
        images = f"{count_images(stated.images, stated.split)} of {stated.dataset}"
        yield f"stated: {stated.error:.2f} % ({report.precision}), for {images}"
