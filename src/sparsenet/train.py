"""Training: one loop that reads top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sparsenet import checkpoints, optim, pictures
from sparsenet.arithmetic import Arithmetic
from sparsenet.capture import Captures
from sparsenet.conclusion import conclude
from sparsenet.config import RunConfig
from sparsenet.data.dataset import Images
from sparsenet.data.identity import to_tensors
from sparsenet.data.sampling import (
    Batches,
    batch_ends,
    images_of_epoch,
    plan_epoch,
    resized,
    stream,
    training_size,
)
from sparsenet.device import LEAST_SECONDS, traits
from sparsenet.environment import environment
from sparsenet.evaluation import (
    Evaluation,
    EvaluationStep,
    NotFiniteError,
    evaluate,
    recompute_statistics,
)
from sparsenet.events import Concluded, EpochDone, Event, Message, Reading, Step, Stopped
from sparsenet.memory import peak_memory_mb
from sparsenet.preparation import Setup, introduce, preparing
from sparsenet.ranks import ALONE, LostError, Ranks
from sparsenet.results import EpochMetrics
from sparsenet.run import PICTURES, Run
from sparsenet.schedule import learning_rate
from sparsenet.start import read_start
from sparsenet.state import DivergedError as DivergedError
from sparsenet.state import TrainingState, has_own_best, new_state, reasons, restore
from sparsenet.step import TrainingStep, balancing_weights

TIME_LIMIT = "the time limit"
SAVE = "save"  # what one process says to the others that wants a checkpoint and no end
FEWEST_BATCHES = 8  # that statistics are computed from, where there are as many
FEW_STEPS = 100  # after which running statistics and averages are those of the weights
LOOK_EVERY = 1.0  # seconds between looks at the loss where a look makes the device wait

StepFunction = Callable[..., tuple[Tensor, ...]]  # a TrainingStep, captured or not


def train(
    config: RunConfig,
    run: Run,
    resume: bool = False,
    should_stop: Callable[[], str | None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Iterator[Event]:
    """Trains into *run*, yielding what happens; ``should_stop`` is asked after every ``Step``.

    Of several *ranks* each calls this; only the first reads and writes the run, and all stop after
    the same step when one of them is to.

    With *resume*, training continues from the last intact checkpoint to the weights of an
    uninterrupted run: bit for bit on the CPU with the same threads and versions, and elsewhere as
    far as the device's kernels repeat themselves. Raises ``ValueError`` for data or settings that
    do not fit, ``DivergedError`` for a loss or weights that are not finite.
    """
    began = saved = time.monotonic()
    begun = yield from _begun(config, run, resume, should_stop, ranks)
    if begun is None:
        return
    setup, state = begun
    settings = setup.config.train
    captures = Captures(setup.device, settings.capture)
    make_step = captures(_training_step(setup, state), "the training step")
    evaluation = EvaluationStep(state.evaluated, setup.preprocessing, setup.arithmetic.precision)
    score = captures(evaluation, "the evaluation")
    evaluated = partial(evaluate, evaluation, device=setup.device, score=score, ranks=ranks)
    stop: str | None = None
    for step in _make_steps(setup, state, make_step):
        yield step
        yield from map(Message, captures.new_messages())
        limit = settings.time_limit
        late = limit and time.monotonic() - began > limit
        due = ranks.is_first and time.monotonic() - saved >= settings.save_every
        said = ranks.words(should_stop() or (TIME_LIMIT if late else SAVE if due else None))
        stop = next((word for word in said if word != SAVE), None)
        if step.step == step.steps:
            yield _finish_epoch(run, setup, state, evaluated)
            yield from map(Message, captures.new_messages())
            saved = time.monotonic()
        elif said:
            _save("last", run, setup, state)
            saved = time.monotonic()
        if stop:
            break
    if stop and (stop != TIME_LIMIT or not state.ended(setup.config)):
        yield Stopped(stop)
    if stop in (None, TIME_LIMIT):  # a signal wants out at once; everything is saved already
        if not state.rows:  # stopped within the first epoch
            _settle_statistics(setup, state)
            _save("best", run, setup, state)
        if ranks.is_first:
            result, warnings = conclude(run, setup, state.rows, captures)
            yield from (Message(f"warning: {each}") for each in warnings)
            yield from map(Message, reasons(setup, state, result.epochs))
            yield Concluded(result)


def _begun(
    config: RunConfig,
    run: Run,
    resume: bool,
    should_stop: Callable[[], str | None],
    ranks: Ranks,
) -> Generator[Event, None, tuple[Setup, TrainingState] | None]:
    """What a run begins or goes on with; ``None`` where it was stopped before."""
    begins = not (resume and checkpoints.saved(run.checkpoints, "last"))
    weights = config.train.weights if ranks.is_first and begins else ""
    start = read_start(weights) if weights else None
    if start:
        start.check(config)
    known = (run.arithmetic(), run.images()) if resume and ranks.is_first else (Arithmetic(), {})
    previous, images = ranks.tell(known)
    setup = yield from _prepared(preparing(config, previous, images, ranks), should_stop, ranks)
    if setup is None:
        return None
    state = new_state(setup, start)
    if ranks.is_first:
        restored = restore(state, setup, run) if resume else []  # refused before writing
        _describe(run, setup)
        yield from map(Message, introduce(setup, previous))
        if start:
            described = start.describe(state.model, setup.data.classes, setup.preprocessing)
            yield from map(Message, described)
            yield from map(Message, start.warnings(setup.data))
        yield from map(Message, restored)
        if state.rows and not has_own_best(state, setup, run):
            state.best = None  # of what was, nothing is left
            _save("best", run, setup, state)
            yield Message(
                f"the best weights are those of step {state.step}: no earlier ones are left"
            )
        run.write_metrics(state.rows)
        for name in ("result.json", *PICTURES):  # of fewer epochs
            (run.path / name).unlink(missing_ok=True)
    state.share(ranks)
    return setup, state


def _save(kind: Literal["last", "best"], run: Run, setup: Setup, state: TrainingState) -> None:
    if setup.ranks.is_first:
        state.save(kind, run.checkpoints, setup.about)


def _prepared(
    work: Generator[Reading | Message, None, Setup],
    should_stop: Callable[[], str | None],
    ranks: Ranks,
) -> Generator[Event, None, Setup | None]:
    """The setup of a run, or ``None`` where it was stopped while the images were read."""
    try:
        while True:
            yield next(work)
            ranks.look()  # first, as torchrun stops the others when one fails
            if stop := ranks.stopped(should_stop()):
                break
    except StopIteration as end:
        setup: Setup = end.value
        return setup
    except LostError:  # where this process waited for one that was asked to stop
        if not (stop := ranks.stopped()):
            raise
    yield Stopped(stop, saved=False)
    return None


def _describe(run: Run, setup: Setup) -> None:
    batch_size = setup.config.train.batch_size
    used = environment(setup.device, batch_size, **dataclasses.asdict(setup.arithmetic))
    size, images = setup.preprocessing.size, to_tensors(setup.data)
    run.describe(setup.repeatable, size, setup.nodes, used, images)
    pictures.draw_graph(setup.nodes, run.path / "graph.svg", run.path.name)


def _training_step(setup: Setup, state: TrainingState) -> TrainingStep:
    trained = state.model, state.optimizer, state.average
    precision = setup.arithmetic.precision
    weights = None
    if setup.config.optim.class_weights == "balanced":
        labels = setup.data.train.labels.cpu()
        weights = balancing_weights(labels, len(setup.data.classes)).to(setup.device)
    return TrainingStep(
        *trained, setup.config, setup.preprocessing, precision, setup.ranks, weights
    )


def _make_steps(setup: Setup, state: TrainingState, make_step: StepFunction) -> Iterator[Step]:
    """Makes the remaining steps, and yields those after which the loss is looked at."""
    config, full_size = setup.config, setup.preprocessing.size
    images = setup.data.train
    while not state.ended(config):
        size = training_size(state.epoch, config.train.max_epoch, config.data.first_size, full_size)
        kept = round(size * setup.data.train.shape[-1] / full_size)  # larger, for crops
        if images.shape[-1] != kept:
            images = resized(setup.data.train, kept)
        state.model.train()
        yield from _make_epoch_steps(setup, state, make_step, images)


def _make_epoch_steps(
    setup: Setup, state: TrainingState, make_step: StepFunction, images: Images
) -> Iterator[Step]:
    config, device, ranks = setup.config, setup.device, setup.ranks
    seed, batch_size, epochs = config.train.seed, config.train.batch_size, config.train.max_epoch
    epoch, steps, start = state.epoch, state.steps_per_epoch, state.step % state.steps_per_epoch
    data = config.data.scaled(images.shape[-1], setup.preprocessing.size)
    plan = plan_epoch(seed, epoch, len(images), data)
    chosen = images_of_epoch(seed, epoch, images.labels, data.sampler)
    plan = dataclasses.replace(plan, order=chosen[plan.order])
    batches = Batches(images, batch_size, plan, start, device, ranks)
    ends = batch_ends(len(images), batch_size)
    shares = torch.tensor([ranks.shares(b - a) for a, b in pairwise([0, *ends])]).to(device)
    rates, ema_rates = optim.epoch_rates(config.optim, epoch, steps, epochs, device)
    waits = traits(device).asynchronous
    seconds_before = state.seconds
    began = looked = time.perf_counter()
    for index, (pixels, labels, *moves) in enumerate(batches, start):
        if config.network.dropout:
            torch.manual_seed(_dropout_seed(setup, "dropout", state.step))
        numbers = rates[index], ema_rates[index], shares[index]
        with ranks.talking():
            loss, mistakes = make_step(pixels, labels, *numbers, *moves)
        state.losses[index], state.mistakes[index] = loss, mistakes
        state.step += 1
        done = index + 1
        late = time.perf_counter() - looked > LOOK_EVERY
        if waits and done < steps and not ranks.words("look" if late else None):
            continue
        mean_loss, error = _progress(state, ends[:done])
        looked = time.perf_counter()
        state.seconds = seconds_before + max(looked - began, 0.0)  # a clock may go back
        seen = ends[index] - (ends[start - 1] if start else 0)
        images_per_second = seen / max(state.seconds - seconds_before, LEAST_SECONDS)
        yield Step(epoch + 1, done, steps, epochs, mean_loss, error, images_per_second)


def _progress(state: TrainingState, ends: Sequence[int]) -> tuple[float, float]:
    """Mean loss of an image, and error in percent, of the epoch's first steps.

    *ends* are the numbers of images after each of them. Raises ``DivergedError`` where a loss is
    not finite.
    """
    steps, images = len(ends), ends[-1]
    sizes = torch.tensor(ends).diff(prepend=torch.tensor([0]))
    losses = state.losses[:steps].cpu().double()
    finite = losses.isfinite()
    if not finite.all():
        first = state.step - steps + int(finite.int().argmin()) + 1
        raise DivergedError(f"the loss of step {first} is")
    loss, mistakes = (losses @ sizes.double()).item(), state.mistakes[:steps].sum().item()
    return loss / images, 100 * mistakes / images


def _settle_statistics(setup: Setup, state: TrainingState) -> None:
    """Recomputes the running statistics of what is evaluated, while there were too few steps."""
    if state.step >= FEW_STEPS:
        return
    train, images, seed = setup.config.train, setup.data.train, setup.config.train.seed
    order = torch.randperm(len(images), generator=stream(seed, "statistics", state.step))
    epoch = max(state.step - 1, 0) // state.steps_per_epoch
    order = images_of_epoch(seed, epoch, images.labels, setup.config.data.sampler)[order]
    order = order[: max(state.step, FEWEST_BATCHES) * train.batch_size]  # no longer than training
    if setup.config.network.dropout:
        torch.manual_seed(_dropout_seed(setup, "statistics", state.step))
    with setup.ranks.talking():
        recompute_statistics(
            state.evaluated,
            resized(images[order.to(images.labels.device)], setup.preprocessing.size),
            setup.preprocessing,
            setup.device,
            train.batch_size,
            setup.arithmetic.precision,
            setup.ranks,
        )


def _dropout_seed(setup: Setup, purpose: str, step: int) -> int:
    """Another one for each process, whose images are others."""
    rank = [setup.ranks.rank] if setup.ranks.rank else []
    return stream(setup.config.train.seed, purpose, step, *rank).initial_seed()


def _finish_epoch(
    run: Run, setup: Setup, state: TrainingState, evaluated: Callable[[Images], Evaluation]
) -> EpochDone:
    config, data, device = setup.config, setup.data, setup.device
    loss, error = _progress(state, batch_ends(len(data.train), config.train.batch_size))
    _settle_statistics(setup, state)
    try:
        test, validation = evaluated(data.test), evaluated(data.val) if data.val else None
    except NotFiniteError:
        raise DivergedError(f"the weights of step {state.step} give a loss that is") from None
    row = EpochMetrics(
        epoch=state.epoch,
        step=state.step,
        lr=learning_rate(
            config.optim, state.step - 1, state.steps_per_epoch, config.train.max_epoch
        ),
        train_loss=loss,
        train_error=error,
        val_loss=validation.loss if validation else None,
        val_error=validation.error if validation else None,
        test_loss=test.loss,
        test_error=test.error,
        seconds=state.seconds,
        images_per_second=len(data.train) / max(state.seconds, LEAST_SECONDS),
        eval_seconds=test.seconds,
        peak_memory_mb=peak_memory_mb(device),
    )
    # Without a validation set the last epoch counts, as in the paper; never the test error.
    best = validation is None or state.best is None or validation.error < state.best
    if validation and best:
        state.best = validation.error
    state.rows.append(row)
    state.seconds = 0.0
    if setup.ranks.is_first:
        run.write_metrics(state.rows)
    if best:  # before "last", so that resuming after a kill between the two writes it again
        _save("best", run, setup, state)
    _save("last", run, setup, state)
    return EpochDone(row, config.train.max_epoch, data.chosen_on, data.tested_on)
