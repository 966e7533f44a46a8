"""``sparsenet eval``."""

from __future__ import annotations

import argparse

from sparsenet.commands.common import data_now, load_run, print_result
from sparsenet.device import choose_device
from sparsenet.export.onnx import Exported
from sparsenet.export.runtimes import Runtime
from sparsenet.ops import dispatch


def run(args: argparse.Namespace) -> int:
    from sparsenet.evaluate import evaluate

    runtime = _runtime(args)
    device = choose_device("cpu" if runtime else args.device)
    precision = (
        runtime.precision
        if runtime
        else dispatch.choose_precision(args.precision, device, training=False)
    )
    trained = load_run(args, device)
    data = data_now(args, trained)
    pixels = data.test.pixels[: args.batch_size]
    model = Exported(trained, runtime, pixels) if runtime else trained.model
    stated = trained.about.measured.get(precision)
    own = "fp32" if runtime else precision  # what PyTorch is left to do
    found = evaluate(model, data.test, trained.preprocessing, device, args.batch_size, own)
    value = {
        "run": args.run, "dataset": data.name, "checkpoint": args.checkpoint, "engine": args.engine,
        "precision": precision, "error": found.error, "top5_error": found.top5_error, "loss": found.loss,
        "images": found.images, "seconds": found.seconds, "class_errors": found.class_errors(data.classes),
        "stated_error": stated and stated.error,
    }  # fmt: skip
    lines = [
        f"{data.name}: {found.images} images in {found.seconds:.2f} s{f' by {args.engine}' if runtime else ''}",
        f"error {found.error:.2f} %, top-5 error {found.top5_error:.2f} %, loss {found.loss:.4f}",
        *(
            f"  {name}: {'no image' if e is None else f'{e:.2f} %'}"
            for name, e in value["class_errors"].items()
        ),
    ]
    if stated:
        of = f"{stated.images} images of {stated.dataset}"
        lines.append(f"stated: {stated.error:.2f} % ({precision}), for {of}")
    return print_result(value, lines, args.json)


def _runtime(args: argparse.Namespace) -> Runtime | None:
    """The engine that was asked for in PyTorch's place."""
    if args.engine == "torch":
        return None
    if args.device not in ("auto", "cpu"):
        raise ValueError(
            f"--device: expected auto or cpu with --engine {args.engine}, found {args.device!r}"
        )
    return Runtime(args.engine, args.precision)
