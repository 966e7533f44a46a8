"""``sparsenet eval``."""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsenet.commands.common import load_images, load_network, print_result
from sparsenet.data.errors import count_images, shortened
from sparsenet.data.selection import Selection
from sparsenet.device import choose_device
from sparsenet.display import warn
from sparsenet.evaluation import Evaluation, EvaluationStep, evaluate
from sparsenet.export.onnx import Exported
from sparsenet.export.runtimes import Runtime
from sparsenet.files import behind_link, try_to_write, write_atomic
from sparsenet.ops import dispatch
from sparsenet.results import ClassScores, Scores, likely_range
from sparsenet.run import Run
from sparsenet.weights import Measured

COLUMNS = "path", "true", "predicted"  # of predictions, before the probabilities
BEGINNING = ",".join(COLUMNS).encode()


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
    mirrored: bool  # whether probabilities are means over an image and its mirror image
    images: int
    split: str  # "training", "validation", "test", "held-out", or nothing where data has no splits
    place: str  # where they lie
    notes: tuple[str, ...]  # about them
    seconds: float
    class_errors: dict[str, float | None]  # ``None``: no image of the class
    scores: Scores
    stated_error: float | None  # what a weights file says of itself, without mirror images


def run(args: argparse.Namespace) -> int:
    """Evaluates a run's network on its test images."""
    report, lines, write = evaluated(args)
    try:
        return print_result(report, lines, args.json)
    finally:  # also where nobody reads what is printed
        write()


def evaluated(
    args: argparse.Namespace,
) -> tuple[EvaluationReport, Iterator[str], Callable[[], None]]:
    """What there is to say, the lines that say it, and what writes the predictions after that."""
    runtime = _runtime(args)
    if args.predictions:
        _check_target(args.predictions)  # before the work is done
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
    if args.mirror and trained.about.recipe.get("data", {}).get("mirror") is False:
        warn("sparsenet: warning: the network was trained without mirror images")
    step = EvaluationStep(
        model, trained.preprocessing, torch_precision, bool(args.predictions), args.mirror
    )
    evaluation = evaluate(step, data.images, device, args.batch_size)

    def write() -> None:
        if args.predictions:
            _write_predictions(args.predictions, data.names, evaluation, trained.classes)

    stated = trained.about.measured.get(precision)
    scores = evaluation.scores(trained.classes)
    report = EvaluationReport(
        run=args.run,
        dataset=data.name,
        checkpoint=args.checkpoint,
        engine=args.engine,
        precision=precision,
        error=evaluation.error,
        top5_error=evaluation.top5_error,
        loss=evaluation.loss,
        mirrored=args.mirror,
        images=evaluation.images,
        split=data.kind,
        place=data.place,
        notes=data.notes,
        seconds=evaluation.seconds,
        class_errors=scores.class_errors,
        scores=scores,
        stated_error=stated.error if stated else None,
    )
    return report, _lines(report, data, stated), write


def _check_target(predictions: str) -> None:
    file = Path(predictions)
    if not file.parent.is_dir():
        raise ValueError(f"--predictions: expected a file in a folder, found no {file.parent}")
    if file.is_dir():
        raise ValueError(f"--predictions: expected a file, found the folder {file}")
    try:
        written = behind_link(file)
        if file.is_file() and not _is_replaceable(file):
            expected = "a new file, or predictions to replace"
            raise ValueError(f"--predictions: expected {expected}, found {file} of another kind")
        try_to_write(written)
    except OSError as error:
        raise ValueError(_unwritten(predictions, error)) from None


def _is_replaceable(file: Path) -> bool:
    """Whether a file is empty, or begins as predictions do."""
    with file.open("rb") as there:
        return there.read(len(BEGINNING)) in (b"", BEGINNING)


def _unwritten(predictions: str, error: OSError) -> str:
    return f"--predictions: expected to write {predictions}, found: {error.strerror or error}"


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
    mirrored = " (with mirror images)" if report.mirrored else ""
    likely = likely_range(report.error, report.images)
    yield f"error {report.error:.2f} %{likely}, {top5}loss {report.loss:.4f}{mirrored}"
    scores = report.scores
    yield (
        f"balanced accuracy {scores.balanced_accuracy:.2f} %, over classes: "
        f"precision {scores.macro_precision:.2f} %, F1 {scores.macro_f1:.2f} %"
    )
    yield (
        f"{scores.confidence:.2f} % sure on average, "
        f"expected calibration error {scores.calibration_error:.2f} %"
    )
    if scores.remark:
        yield scores.remark
    for name, one in scores.classes.items():
        yield f"  {name}: {_class_line(name, one, scores)}"
    if stated:
        images = f"{count_images(stated.images, stated.split)} of {stated.dataset}"
        without = ", without mirror images" if report.mirrored else ""
        yield f"stated: {stated.error:.2f} % ({report.precision}), for {images}{without}"


def _class_line(name: str, one: ClassScores, scores: Scores) -> str:
    """What there is to say of a class: its error, what else is taken for it and it for what."""
    said = ["no image"]
    if one.images:
        said = [f"{100 * one.wrong / one.images:.2f} % of {count_images(one.images)} wrong"]
        taken = scores.confusion[name]
        others = sorted(taken.keys() - {name}, key=lambda other: (-taken[other], other))
        if others:
            said.append("taken for " + shortened(f"{other} ({taken[other]})" for other in others))
    if one.precision is not None:
        said.append(f"precision {one.precision:.2f} %")
    if one.f1 is not None:
        said.append(f"F1 {one.f1:.2f} %")
    return ", ".join(said)


def _write_predictions(
    predictions: str, names: Sequence[str], evaluation: Evaluation, classes: Sequence[str]
) -> None:
    """Writes a CSV file with a line for each image."""
    probabilities = evaluation.probabilities
    assert probabilities is not None, "asked for"
    columns = names, evaluation.labels.tolist(), evaluation.predicted.tolist(), probabilities

    def rows() -> Iterator[str]:
        yield _csv_line(*COLUMNS, *(f"p({name})" for name in classes))
        for path, true, predicted, row in zip(*columns, strict=True):
            shown = (f"{each:.6g}" for each in row.tolist())
            yield _csv_line(
                _as_text(path), _as_text(classes[true]), _as_text(classes[predicted]), *shown
            )

    try:
        write_atomic(behind_link(Path(predictions)), rows())
    except OSError as error:  # such as a full disk
        raise OSError(_unwritten(predictions, error)) from error


def _csv_line(*cells: str) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)  # by its end, "\r\n", it knows to put "\r" into quotes
    return line.getvalue().removesuffix("\r\n") + "\n"


def _as_text(cell: str) -> str:
    """*cell*, with an apostrophe before what a spreadsheet would take for a formula."""
    formula = cell.startswith(tuple("=+-@\t\r")) and not re.fullmatch(r"[+-]?[\d.]+", cell)
    return f"'{cell}" if formula else cell
