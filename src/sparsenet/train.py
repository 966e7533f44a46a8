"""Training: one loop that reads top to bottom, and the state that a checkpoint holds."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import __version__, optim, pictures
from sparsenet.arithmetic import Arithmetic, explain, settle
from sparsenet.capture import Captures
from sparsenet.checkpoints import Checkpoint, RunError
from sparsenet.config import RunConfig, recipe
from sparsenet.data.dataset import Dataset, Images
from sparsenet.data.load import load_dataset
from sparsenet.data.preprocessing import Preprocessing, channel_statistics
from sparsenet.data.sampling import Batches, plan_epoch, resized, stream, training_size
from sparsenet.device import choose_device, free_memory, peak_memory_mb, place
from sparsenet.environment import environment
from sparsenet.evaluate import Evaluation, Scorer, evaluate, scorer
from sparsenet.events import Concluded, EpochDone, Event, Message, Step, Stopped
from sparsenet.files import write_json
from sparsenet.graph import Node, graph
from sparsenet.model import SparseNet
from sparsenet.ops import dispatch
from sparsenet.results import EpochMetrics
from sparsenet.run import Run
from sparsenet.schedule import learning_rate
from sparsenet.step import TrainingStep
from sparsenet.trained import load_trained

ADVICE = "start again with a lower --lr, with --grad_clip or with --precision fp32"
LOOK_EVERY = 1.0  # seconds between looks at the loss where a look makes the device wait


TIME_LIMIT = "the time limit"


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class State:
    """What a checkpoint holds and a resumed run starts from."""

    model: SparseNet
    optimizer: torch.optim.SGD
    average: nn.Module | None
    losses: Tensor  # (steps an epoch,) float32: this epoch's losses, on the device
    wrongs: Tensor  # (steps an epoch,) int64: this epoch's wrong images
    step: int = 0  # optimizer steps made since the start of the run
    seconds: float = 0.0  # training time of this epoch so far
    best: float = float("inf")  # lowest validation error so far, in percent
    rows: list[dict[str, float | None]] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the average where there is one."""
        return self.model if self.average is None else self.average

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            found[f"optimizer.{index}"] = entry["momentum_buffer"]
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return found | {"epoch.losses": self.losses, "epoch.wrongs": self.wrongs}

    def manifest(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "best": None if self.best == float("inf") else self.best}

    def load(self, checkpoint: Checkpoint, rows: list[dict[str, float | None]]) -> None:
        tensors, manifest = checkpoint.tensors, checkpoint.manifest

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        momenta = {  # laid out as the parameters, which a fused update asks for
            int(i): {"momentum_buffer": torch.empty_like(parameters[int(i)]).copy_(buffer)}
            for i, buffer in part("optimizer.").items()
        }
        self.optimizer.load_state_dict({"state": momenta, "param_groups": groups})
        if self.average is not None:
            self.average.load_state_dict(part("average."))
        self.losses.copy_(tensors["epoch.losses"])
        self.wrongs.copy_(tensors["epoch.wrongs"])
        self.step, self.seconds = manifest["step"], manifest["seconds"]
        self.best = float("inf") if manifest["best"] is None else manifest["best"]
        self.rows = rows[: self.step // len(self.losses)]


@dataclass(frozen=True)
class Session:
    """What stays the same while a run goes on."""

    config: RunConfig
    run: Run
    data: Dataset
    preprocessing: Preprocessing
    device: torch.device
    arithmetic: Arithmetic
    captures: Captures

    @property
    def precision(self) -> str:
        return self.arithmetic.precision

    def scorer(self, model: nn.Module) -> Scorer:
        return self.captures(scorer(model, self.preprocessing, self.precision), "the evaluation")

    @cached_property
    def training_images(self) -> Callable[[int], Images]:
        """The training images by their side; those asked for last are kept."""
        return lru_cache(maxsize=1)(partial(resized, self.data.train))

    @property
    def about(self) -> dict[str, Any]:
        """What weights say of themselves."""
        return {
            "sparsenet": __version__,
            "architecture": self.config.network.to_dict(),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "classes": list(self.data.classes),
            "dataset": self.data.name,
            "recipe": recipe(self.config),
        }


def prepare(config: RunConfig) -> tuple[RunConfig, Dataset, Preprocessing, torch.device]:
    """Loads the data and settles what only the data can say. Raises ``ValueError`` in one line."""
    device = choose_device(config.train.device)
    if config.train.implementation != "auto":
        dispatch.choose(config.train.implementation, device)
    data = load_dataset(config.data)
    channels, size = data.train.pixels.shape[1], data.train.pixels.shape[-1]
    if config.train.batch_size > len(data.train):
        raise ValueError(
            f"--batch_size: expected at most the {len(data.train)} training images, found {config.train.batch_size}"
        )
    network = dataclasses.replace(config.network, in_chans=channels, num_classes=len(data.classes))
    network.sizes(size)
    for flag, most in (("shift", size - 1), ("cutout", size), ("first_size", size)):
        if (found := getattr(config.data, flag)) > most:
            raise ValueError(
                f"--{flag}: expected at most {most} for images of {size} pixels a side, found {found}"
            )
    if config.data.first_size:
        try:
            network.sizes(config.data.first_size)
        except ValueError as error:
            raise ValueError(str(error).replace("image_size", "--first_size")) from None
    mean, std = channel_statistics(data.train)
    return (
        dataclasses.replace(config, network=network),
        data,
        Preprocessing(size, channels, mean, std),
        device,
    )


def train(
    config: RunConfig,
    run: Run,
    resume: bool = False,
    should_stop: Callable[[], str | None] = lambda: None,
) -> Iterator[Event]:
    """Trains into *run*, yielding what happens; ``should_stop`` is asked after every :class:`Step`.

    With *resume*, continues from the last intact checkpoint to the weights of an uninterrupted run: bit for bit on
    the CPU with the same threads and versions, and elsewhere as far as the device's kernels repeat themselves.
    Raises ``ValueError`` for data or settings that do not fit, :class:`DivergedError` for a non-finite loss.
    """
    began = time.monotonic()
    config, data, preprocessing, device = prepare(config)
    arithmetic = settle(config.train, run.resolved() if resume else {}, device)
    captures = Captures(device, config.train.capture)
    session = Session(
        config, run, _on_device(data, device), preprocessing, device, arithmetic, captures
    )
    state = _new_state(session)
    resumed = list(_resume(session, state)) if resume else []  # refused before anything is written
    nodes = graph(config.network, preprocessing.size)
    used = {"precision": arithmetic.precision, "implementation": arithmetic.implementation}
    run.describe(config, preprocessing.size, nodes, environment(device, **used))
    pictures.draw_graph(nodes, run.path / "graph.svg", run.path.name)
    yield from _introduce(session, state, nodes)
    yield from resumed
    run.write_metrics(state.rows)
    (run.path / "result.json").unlink(missing_ok=True)  # of fewer epochs
    steps = len(state.losses)
    step = TrainingStep(
        state.model, state.optimizer, state.average, config, preprocessing, arithmetic.precision
    )
    act, score = captures(step, "the training step"), session.scorer(state.evaluated)
    saved = time.monotonic()
    stop: str | None = None
    while state.step < config.train.max_epoch * steps and not stop:
        for event in _train_epoch(session, state, act):
            yield event
            yield from map(Message, captures.tell())
            limit = config.train.time_limit
            stop = should_stop() or (
                TIME_LIMIT if limit and time.monotonic() - began > limit else None
            )
            within = (
                state.step % steps > 0
            )  # the end of an epoch is saved with its row, or not at all
            if within and (stop or time.monotonic() - saved >= config.train.save_every):
                _save_last(session, state)
                saved = time.monotonic()
            if stop:
                break
        if state.step % steps == 0:
            yield _finish_epoch(session, state, score)
            yield from map(Message, captures.tell())
            saved = time.monotonic()
    if stop and (stop != TIME_LIMIT or state.step < config.train.max_epoch * steps):
        yield Stopped(stop)
    if stop in (None, TIME_LIMIT):  # a signal wants out at once; everything is saved already
        yield from _conclude(session, state)


def _train_epoch(
    session: Session, state: State, act: Callable[..., tuple[Tensor, ...]]
) -> Iterator[Step]:
    config, full, steps = session.config, session.preprocessing.size, len(state.losses)
    (epoch, start), seed = divmod(state.step, steps), config.train.seed
    size = training_size(epoch, config.train.max_epoch, config.data.first_size, full)
    images, batch_size = session.training_images(size), config.train.batch_size
    plan = plan_epoch(seed, epoch, len(images), config.data.scaled(size, full))
    batches = Batches(images, batch_size, plan, start, session.device)
    rates, shares = optim.schedule(
        config.optim, epoch, steps, config.train.max_epoch, session.device
    )
    state.model.train()
    clock, before = time.perf_counter(), state.seconds
    looked = clock
    for number, (pixels, labels, *moves) in enumerate(batches, start + 1):
        if config.network.dropout:
            torch.manual_seed(stream(seed, "dropout", state.step).initial_seed())
        loss, wrong = act(pixels, labels, rates[number - 1], shares[number - 1], *moves)
        state.losses[number - 1], state.wrongs[number - 1] = loss, wrong
        state.step += 1
        if (
            session.device.type == "cpu"
            or number == steps
            or time.perf_counter() - looked > LOOK_EVERY
        ):
            mean, error = _progress(state, number, batch_size, len(images))
            looked = time.perf_counter()
            state.seconds = before + looked - clock
            rate = (number - start) * batch_size / (state.seconds - before)
            yield Step(epoch + 1, number, steps, config.train.max_epoch, mean, error, rate)


def _progress(state: State, number: int, batch_size: int, images: int) -> tuple[float, float]:
    """Mean loss and error in percent of the epoch's first *number* steps; raises where a loss is not finite."""
    losses = state.losses[:number].cpu().double()
    finite = losses.isfinite()
    if not finite.all():
        step = state.step - number + int(finite.int().argmin()) + 1
        raise DivergedError(f"the loss of step {step} is not finite; {ADVICE}")
    seen = min(number * batch_size, images)
    return losses.mean().item(), 100 * state.wrongs[:number].sum().item() / seen


def _finish_epoch(session: Session, state: State, score: Scorer) -> EpochDone:
    config, data, steps = session.config, session.data, len(state.losses)
    loss, error = _progress(state, steps, config.train.batch_size, len(data.train))
    tested = _evaluate(session, state.evaluated, data.test, score)
    validated = None if data.val is None else _evaluate(session, state.evaluated, data.val, score)
    if not all(math.isfinite(each.loss) for each in (tested, validated) if each):
        raise DivergedError(
            f"the weights of step {state.step} give a loss that is not finite; {ADVICE}"
        )
    rate = learning_rate(config.optim, state.step - 1, steps, config.train.max_epoch)
    row: dict[str, float | None] = {
        "epoch": state.step // steps, "step": state.step, "lr": rate, "train_loss": loss, "train_error": error,
        "val_loss": validated.loss if validated else None, "val_error": validated.error if validated else None,
        "test_loss": tested.loss, "test_error": tested.error, "seconds": state.seconds,
        "images_per_second": len(data.train) / state.seconds, "eval_seconds": tested.seconds,
        "peak_memory_mb": peak_memory_mb(session.device),
    }  # fmt: skip
    # Without a validation set the last epoch is the one reported, as in the paper; never the best on the test set.
    best = validated is None or validated.error < state.best
    if validated and best:
        state.best = validated.error
    state.rows.append(row)
    state.seconds = 0.0
    session.run.write_metrics(state.rows)
    if best:  # before "last", so that a kill between the two leaves nothing that resuming would not write again
        _save_best(session, state)
    _save_last(session, state)
    return EpochDone(row, config.train.max_epoch)


def _evaluate(session: Session, model: nn.Module, images: Images, score: Scorer) -> Evaluation:
    return evaluate(
        model,
        images,
        session.preprocessing,
        session.device,
        precision=session.precision,
        score=score,
    )


def _save_last(session: Session, state: State) -> None:
    manifest = {
        "epoch": state.step // len(state.losses),
        "about": session.about,
        **state.manifest(),
    }
    session.run.save("last", state.step, _finite(state.tensors(), state.step), manifest)


def _save_best(session: Session, state: State) -> None:
    """The evaluated weights alone, with all that is needed to use them."""
    tensors = {f"model.{name}": value for name, value in state.evaluated.state_dict().items()}
    manifest = {"epoch": state.step // len(state.losses), "about": session.about}
    session.run.save("best", state.step, _finite(tensors, state.step), manifest)


def _finite(tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The same *tensors*: a finite loss may have had gradients that were not, and nothing would undo a save."""
    largest = nn.utils.get_total_norm(
        [t for t in tensors.values() if t.is_floating_point()], math.inf
    )
    if not largest.isfinite():
        raise DivergedError(f"the weights of step {step} are not finite; {ADVICE}")
    return tensors


def _conclude(session: Session, state: State) -> Iterator[Event]:
    """Evaluates the checkpoint that counts on the test images and draws what people look at first."""
    run, data = session.run, session.data
    if not state.rows:  # stopped within the first epoch
        _save_best(session, state)
    trained = load_trained(run.path, "best", session.device, session.arithmetic.implementation)
    found = _evaluate(session, trained.model, data.test, session.scorer(trained.model))
    result = {
        "dataset": data.name, "error": found.error, "top5_error": found.top5_error, "loss": found.loss,
        "images": found.images, "seconds": found.seconds, "epochs": trained.about.epoch,
        "checkpoint": "lowest validation error" if data.val else "last epoch",
        "classes": list(data.classes), "class_errors": found.class_errors(data.classes),
    }  # fmt: skip
    write_json(run.path / "result.json", result)
    title = f"{run.path.name} on {data.name}"
    rows = [EpochMetrics(**row) for row in state.rows]  # type: ignore[arg-type]
    pictures.draw_curves(rows, run.path / "curves.png", title)
    pictures.draw_confusion(
        found.confusion(len(data.classes)), data.classes, run.path / "confusion.png"
    )
    pictures.draw_samples(
        data.test.pixels.cpu(),
        found.labels,
        found.predicted,
        found.confidence,
        data.classes,
        run.path / "samples.png",
    )
    yield Concluded(result)


def _new_state(session: Session) -> State:
    config, device = session.config, session.device
    torch.manual_seed(stream(config.train.seed, "weights").initial_seed())
    model = place(
        SparseNet(config.network, session.arithmetic.implementation, config.train.memory), device
    )
    average = copy.deepcopy(model) if config.optim.ema else None
    steps = -(-len(session.data.train) // config.train.batch_size)
    losses = torch.zeros(steps, device=device)
    wrongs = torch.zeros(steps, dtype=torch.int64, device=device)
    return State(model, optim.sgd(model, config.optim), average, losses, wrongs)


def _resume(session: Session, state: State) -> Iterator[Message]:
    if not any(session.run.checkpoints.glob("last-*.json")):
        yield Message("stopped before the first checkpoint: starting from the beginning")
        return
    checkpoint, warnings = session.run.restore("last")
    yield from (Message(f"warning: {warning}") for warning in warnings)
    known = checkpoint.manifest["about"]["classes"]
    if known != list(session.data.classes):
        raise RunError(
            f"{checkpoint.path}: expected the {len(known)} classes it was trained on, "
            f"found {len(session.data.classes)} classes in the data"
        )
    if Preprocessing(**checkpoint.manifest["about"]["preprocessing"]) != session.preprocessing:
        raise RunError(
            f"{checkpoint.path}: expected the images it was trained on, found others (mean or size differ)"
        )
    steps = len(checkpoint.tensors["epoch.losses"])
    if steps != len(state.losses):
        raise RunError(
            f"{checkpoint.path}: expected the images it was trained on, {steps} steps an epoch, "
            f"found {len(session.data.train)} images, {len(state.losses)} steps an epoch"
        )
    state.load(checkpoint, session.run.metrics())
    yield Message(f"resumed at step {state.step} (epoch {1 + state.step // len(state.losses)})")


def _introduce(session: Session, state: State, nodes: list[Node]) -> Iterator[Message]:
    data, parameters, macs = (
        session.data,
        sum(n.parameters for n in nodes),
        sum(n.macs for n in nodes),
    )
    held = f", {len(data.val)} validation" if data.val else ""
    yield Message(
        f"{data.name}: {len(data.train)} training{held} and {len(data.test)} test images, "
        f"{len(data.classes)} classes, {tuple(data.train.pixels.shape[1:])}"
    )
    if data.skipped:
        yield Message(f"skipped {len(data.skipped)} corrupt images, the first: {data.skipped[0]}")
    net = session.config.network
    yield Message(
        f"{net.fetch if isinstance(net.fetch, str) else 'custom'} network, {net.stage_depths} layers, growth "
        f"{net.growth_rates}: {parameters:,} parameters, {macs:,} MACs"
    )
    yield from map(Message, explain(session.arithmetic, session.config.train, session.device))


def _on_device(data: Dataset, device: torch.device) -> Dataset:
    """The dataset with its pixels on the device when they fill at most half of what is free there."""
    free = None if device.type == "cpu" else free_memory(device)
    return data.to(device) if free is not None and data.nbytes <= free // 2 else data
