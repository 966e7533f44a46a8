"""The end of a run: its best weights are evaluated, and pictures show how it went."""

from __future__ import annotations

from collections.abc import Sequence

from sparsenet import pictures
from sparsenet.capture import Captures
from sparsenet.evaluation import EvaluationStep, NotFiniteError, evaluate
from sparsenet.files import write_json
from sparsenet.preparation import Setup
from sparsenet.results import EpochMetrics, TrainingResult, best_row
from sparsenet.run import Run
from sparsenet.state import DivergedError
from sparsenet.trained import Trained, load_trained


def _why(trained: Trained, rows: Sequence[EpochMetrics]) -> str:
    """Why these weights are evaluated: what was measured of them, or else how old they are."""
    best = best_row(rows)
    if best and best.epoch == trained.about.epoch:
        return "lowest validation error"
    return "last epoch" if trained.about.epoch else f"step {trained.step}"


def conclude(
    run: Run, setup: Setup, rows: Sequence[EpochMetrics], captures: Captures
) -> tuple[TrainingResult, tuple[str, ...]]:
    """Evaluates the best checkpoint on the test images; writes result.json and the pictures.

    Beside the result come warnings of damaged checkpoints that were passed over. Raises
    ``DivergedError`` where its loss is not finite.
    """
    data, device = setup.data, setup.device
    arithmetic, preprocessing = setup.arithmetic, setup.preprocessing
    trained = load_trained(run.path, "best", device, arithmetic.implementation)
    step = EvaluationStep(trained.model, preprocessing, arithmetic.precision)
    score = captures(step, "the evaluation")
    try:
        evaluation = evaluate(step, data.test, device, score=score)
    except NotFiniteError:
        raise DivergedError(f"the weights of step {trained.step} give a loss that is") from None
    scores = evaluation.scores(data.classes)
    result = TrainingResult(
        dataset=data.name,
        error=evaluation.error,
        top5_error=evaluation.top5_error,
        loss=evaluation.loss,
        images=evaluation.images,
        seconds=evaluation.seconds,
        epochs=trained.about.epoch,
        checkpoint=_why(trained, rows),
        classes=data.classes,
        class_errors=scores.class_errors,
        tested_on=data.tested_on,
        scores=scores,
    )
    write_json(run.file("result.json"), result)
    title = f"{run.path.name} on {data.name}"
    names = {"train": "train", "val": data.chosen_on, "test": data.tested_on}
    pictures.draw_curves(rows, run.path / "curves.png", title, names, result.epochs)
    answers = evaluation.labels, evaluation.predicted
    pictures.draw_confusion(*answers, data.classes, run.path / "confusion.png")
    right = evaluation.predicted == evaluation.labels
    pictures.draw_reliability(evaluation.confidence, right, run.path / "reliability.png")
    pictures.draw_samples(
        data.test,
        evaluation.predicted,
        evaluation.confidence,
        data.classes,
        run.path / "samples.png",
        data.test_names,
    )
    return result, trained.warnings
