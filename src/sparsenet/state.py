"""The state of training: what a checkpoint holds and a resumed run starts from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from sparsenet import checkpoints, optim, weights
from sparsenet.checkpoints import Checkpoint, Manifest, RunError
from sparsenet.config import LENGTH, WERE_AUTO, RunConfig
from sparsenet.data.identity import differences, to_tensors
from sparsenet.data.sampling import batch_ends, growing_epochs, stream, training_size
from sparsenet.device import place
from sparsenet.model import SparseNet
from sparsenet.preparation import Setup
from sparsenet.ranks import Ranks
from sparsenet.results import EpochMetrics, best_row
from sparsenet.run import Run
from sparsenet.schedule import learning_rate
from sparsenet.stage import synchronise_statistics
from sparsenet.start import Start
from sparsenet.texts import shown
from sparsenet.weights import Description


class DivergedError(RuntimeError):
    """The loss or the weights are no longer numbers."""

    def __init__(self, subject: str):
        advice = "start again with a lower --lr, with --grad_clip or with --precision fp32"
        super().__init__(f"{subject} not finite; {advice}")


@dataclass
class TrainingState:
    """All that training changes."""

    model: SparseNet
    optimizer: torch.optim.SGD
    average: nn.Module | None
    losses: Tensor  # (steps an epoch,) float32: this epoch's losses, on the device
    mistakes: Tensor  # (steps an epoch,) int64: this epoch's numbers of wrong images
    step: int = 0  # optimizer steps made since the start of the run
    seconds: float = 0.0  # training time of this epoch so far
    best: float | None = None  # lowest validation error so far, in percent
    rows: list[EpochMetrics] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.losses)

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.step // self.steps_per_epoch

    @property
    def best_row(self) -> EpochMetrics | None:
        return best_row(self.rows)

    def waited(self, config: RunConfig) -> int:
        """How many epochs have brought no lower validation error; none before images are whole."""
        if not self.best_row:
            return 0
        growing = growing_epochs(config.train.max_epoch) if config.data.first_size else 0
        return max(self.epoch - max(self.best_row.epoch, growing), 0)

    def ended(self, config: RunConfig) -> bool:
        """Whether no epoch is to come: all are trained, or the last ones were no better."""
        patience = config.train.patience
        patient = not patience or self.waited(config) < patience
        return self.epoch >= config.train.max_epoch or not patient

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and become the best: the average where there is one."""
        return self.model if self.average is None else self.average

    def save(self, kind: Literal["last", "best"], folder: Path, about: Description) -> None:
        """Writes a checkpoint: all of the state as ``last``, the evaluated weights as ``best``.

        Raises ``DivergedError`` where they are not finite.
        """
        tensors = self._tensors() if kind == "last" else _named("model.", self.evaluated)
        check_finite(tensors, self.step)
        manifest = Manifest(kind, self.step, self.epoch, about, self.seconds, self.best, self.rows)
        checkpoints.save(folder, manifest, tensors)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = _named("model.", self.model)
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors[f"optimizer.{index}"] = entry["momentum_buffer"]
        if self.average is not None:
            tensors |= _named("average.", self.average)
        return tensors | {"epoch.losses": self.losses, "epoch.wrongs": self.mistakes}

    def _unused(self) -> list[nn.Parameter]:
        """Parameters on which no output depends, which have no gradient and so no momentum."""
        found: list[nn.Parameter] = []
        for number, stage in enumerate(self.model.architecture.stages):
            for layer in range(stage.topology.depth):
                if layer + 1 not in stage.topology.used:
                    module = self.model.get_submodule(f"stages.{number}.layers.{layer}")
                    found += module.parameters()
        return found

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises ``ValueError`` where a checkpoint of the kind ``last`` cannot be loaded."""
        manifest, expected = checkpoint.manifest, self._tensors()
        parameters = self._parameters()
        unused = self._unused()
        for index, parameter in enumerate(parameters):
            name = f"optimizer.{index}"
            if name in checkpoint.tensors or not any(parameter is each for each in unused):
                expected[name] = parameter
        if problem := weights.misfit(checkpoint.tensors, expected):
            raise ValueError(problem)
        finished = manifest.step // self.steps_per_epoch
        complete = True  # where an older version wrote no rows
        if manifest.rows is not None:
            numbers = [row.epoch for row in manifest.rows]
            # Some may be missing, where they were when a run of an older version was resumed.
            rising = all(before < after for before, after in pairwise([0, *numbers]))
            complete = rising and numbers[-1:] in ([], [finished])
        if manifest.epoch != finished or not complete:
            raise ValueError("its numbers of steps, epochs and rows do not fit together")

    def share(self, ranks: Ranks) -> None:
        """Makes this the state of the first of *ranks*."""
        if ranks.size == 1:
            return
        momenta = sorted(self.optimizer.state_dict()["state"])
        told = ranks.tell((self.step, self.seconds, self.best, self.rows, momenta))
        self.step, self.seconds, self.best, self.rows, momenta = told
        if not ranks.is_first:
            parameters = self._parameters()
            self._set_momenta({index: torch.empty_like(parameters[index]) for index in momenta})
        ranks.spread([tensor for _, tensor in sorted(self._tensors().items())])

    def load(self, checkpoint: Checkpoint, rows: list[EpochMetrics]) -> None:
        """Loads a checkpoint of the kind ``last``, and the *rows* of the epochs before it."""
        self.model.load_state_dict(checkpoint.part("model."))
        if self.average is not None:
            self.average.load_state_dict(checkpoint.part("average."))
        parameters, buffers = self._parameters(), checkpoint.part("optimizer.")
        # Laid out as the parameter, which a fused update asks for.
        momenta = {
            int(name): torch.empty_like(parameters[int(name)]).copy_(buffer)
            for name, buffer in buffers.items()
        }
        self._set_momenta(momenta)
        self.losses.copy_(checkpoint.tensors["epoch.losses"])
        self.mistakes.copy_(checkpoint.tensors["epoch.wrongs"])
        manifest = checkpoint.manifest
        self.step, self.seconds, self.best = manifest.step, manifest.seconds, manifest.best
        self.rows = rows

    def _parameters(self) -> list[nn.Parameter]:
        """Those of the optimizer, by the numbers that it has for them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _set_momenta(self, momenta: Mapping[int, Tensor]) -> None:
        state = {index: {"momentum_buffer": momentum} for index, momentum in momenta.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _named(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raises ``DivergedError`` where a tensor is not finite.

    A finite loss may have had gradients that were not, and nothing would undo a save.
    """
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    if not nn.utils.get_total_norm(floating, math.inf).isfinite():
        raise DivergedError(f"the weights of step {step} are")


def new_state(setup: Setup, start: Start | None = None) -> TrainingState:
    """The state before the first step, with the weights of *start* where there is one."""
    config, device = setup.config, setup.device
    torch.manual_seed(stream(config.train.seed, "weights").initial_seed())
    implementation = setup.arithmetic.implementation
    model = place(SparseNet(config.network, implementation, config.train.memory), device)
    if setup.synchronised:
        synchronise_statistics(model)
    if start:
        start.load_into(model, setup.data.classes)
    try:
        model.freeze(config.optim.freeze)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    average = copy.deepcopy(model) if config.optim.ema else None
    steps = len(batch_ends(len(setup.data.train), config.train.batch_size))
    losses = torch.zeros(steps, device=device)
    mistakes = torch.zeros(steps, dtype=torch.int64, device=device)
    return TrainingState(model, optim.new_optimizer(model, config.optim), average, losses, mistakes)


def restore(state: TrainingState, setup: Setup, run: Run) -> list[str]:
    """Loads the last intact checkpoint of *run* into a new *state*; returns lines for the user.

    Raises ``RunError`` where there are only damaged ones or none that should be, and where the
    data or the settings are others.
    """
    if not checkpoints.saved(run.checkpoints, "last"):
        _check_nothing_is_lost(run)
        return ["stopped before the first checkpoint: starting from the beginning"]

    def fitting(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        changed = _check_data(checkpoint, setup, run)
        _check_settings(checkpoint, setup.about)
        _check_steps(checkpoint, state.steps_per_epoch)
        state.check(checkpoint)
        return checkpoint, changed

    (checkpoint, changed), warnings = checkpoints.restore(run.checkpoints, "last", fitting)
    rows, said = _rows(checkpoint, run)
    state.load(checkpoint, rows)
    lines = [f"warning: {warning}" for warning in [*warnings, *said, *changed]]
    epochs = setup.config.train.max_epoch
    trained = math.ceil(state.step / state.steps_per_epoch)
    if trained > epochs:
        raise RunError(
            f"{run.path}: expected --max_epoch of at least {trained}, as many as have begun, "
            f"found {epochs}"
        )
    if state.epoch >= epochs:
        return [*lines, f"finished: all {epochs} epochs are trained; --max_epoch N adds to them"]
    if state.ended(setup.config):
        waited = f"no better epoch among the last {state.waited(setup.config)}"
        return [*lines, f"finished: {waited}; a larger --patience, or 0, goes on"]
    lines.append(f"resumed at step {state.step} (epoch {1 + state.epoch})")
    now, before = setup.config, run.config()
    return lines + _rate_jump(state, now, before) + _size_jump(state, setup, now, before)


def reasons(setup: Setup, state: TrainingState, best: int) -> Iterator[str]:
    """Why the run ended before its last epoch, and why the weights of epoch *best* are the best."""
    settings, row = setup.config.train, state.best_row
    if state.epoch < settings.max_epoch and state.ended(setup.config):
        yield (
            f"ended after epoch {state.epoch} of {settings.max_epoch}: none of the last "
            f"{state.waited(setup.config)} had a lower {setup.data.chosen_on} error than before "
            f"(--patience {settings.patience})"
        )
    if row and row.epoch == best:
        why = f"their {setup.data.chosen_on} error, {row.val_error:.2f} %, is the lowest"
        yield f"the best weights are those of epoch {best} of {state.epoch}: {why}"


def has_own_best(state: TrainingState, setup: Setup, run: Run) -> bool:
    """Whether the ``best`` checkpoint is one of this run up to the step of *state*.

    It is of a later step where an older ``last`` was taken, and of another run where somebody put
    it there.
    """

    def check(checkpoint: Checkpoint) -> None:
        _check_settings(checkpoint, setup.about)
        if checkpoint.manifest.step > state.step:
            raise RunError("of a later step")

    try:
        checkpoints.restore(run.checkpoints, "best", check)
    except RunError:
        return False
    return True


def _check_nothing_is_lost(run: Run) -> None:
    """Raises ``RunError`` where there is more than a kill before the first ``last`` can leave."""
    found = []
    if (run.path / "result.json").exists():
        found.append("result.json")
    if (rows := len(run.metrics())) > 1:
        found.append(f"{rows} epochs in metrics.csv")
    if checkpoints.saved(run.checkpoints, "best"):
        best, _ = checkpoints.restore(run.checkpoints, "best", attrgetter("manifest"))
        if best.epoch > 1:
            found.append(f"a 'best' checkpoint of epoch {best.epoch}")
    if found:
        raise RunError(
            f"{run.path}: expected a 'last' checkpoint to go on from, found none, but "
            f"{' and '.join(found)}; put it back, or start a new run with --config {run.path}"
        )


def _rows(checkpoint: Checkpoint, run: Run) -> tuple[list[EpochMetrics], list[str]]:
    """The rows of the epochs before *checkpoint*, and a warning where metrics.csv lacks some."""
    manifest = checkpoint.manifest
    run.file("metrics.csv")  # a link or a pipe is refused, not replaced
    try:
        found, problem = run.metrics(), ""
    except RunError as error:
        if manifest.rows is None:
            raise
        found, problem = [], f"{error}; "
    if manifest.rows is None:  # of an older version
        if len(found) < manifest.epoch:
            problem = f"metrics.csv has {len(found)} of {manifest.epoch} epochs"
        return found[: manifest.epoch], [problem] if problem else []
    rows = manifest.rows
    lacking = manifest.epoch - len(rows)
    missing = [f"the rows of {lacking} epochs are lost"] if lacking else []
    if found[: len(rows)] == rows:
        return rows, missing
    return rows, [*missing, f"{problem}metrics.csv is written anew from the checkpoint"]


def _check_settings(checkpoint: Checkpoint, asked: Description) -> None:
    """Raises ``RunError`` where settings are not those that the checkpoint was trained with.

    ``Run`` compares what is asked for with config.json, which somebody may have changed.
    """
    about = checkpoint.manifest.about
    before = {**about.recipe, "network": about.architecture}
    now = {**asked.recipe, "network": asked.architecture}
    now = msgspec.json.decode(msgspec.json.encode(now))  # with lists, as in a file
    changed = {}
    for component, settings in before.items():
        for name, value in settings.items():
            found = now.get(component, {}).get(name, value)  # older versions had other settings
            was_auto = name in WERE_AUTO and value == "auto"
            if found != value and name not in LENGTH and not was_auto:
                changed[name] = f"{name} {shown(value)} -> {shown(found)}"
    if not changed:
        return
    advice = "put back what was changed in config.json"
    if changed.keys() == {"precision"}:  # which environment.json has where config.json says auto
        advice = f"go on with --precision {about.recipe['train']['precision']}"
    raise RunError(
        f"{checkpoint.path}: expected the settings that it was trained with, found others: "
        f"{'; '.join(changed.values())}; {advice}"
    )


def _rate_jump(state: TrainingState, now: RunConfig, before: RunConfig) -> list[str]:
    """A line where another number of epochs changes the learning rate with which a run goes on."""

    def rate(config: RunConfig, step: int) -> float:
        return learning_rate(config.optim, step, state.steps_per_epoch, config.train.max_epoch)

    last, coming = rate(before, max(state.step - 1, 0)), rate(now, state.step)
    if rate(before, state.step) == coming:
        return []
    epochs = f"{now.train.max_epoch} epochs instead of {before.train.max_epoch}"
    return [
        f"warning: the learning rate goes from {last:.4g} to {coming:.4g}, since the "
        f"{now.optim.schedule} schedule is that of {epochs}; a new run with --max_epoch "
        f"{now.train.max_epoch} would not have this jump"
    ]


def _size_jump(state: TrainingState, setup: Setup, now: RunConfig, before: RunConfig) -> list[str]:
    """A line where another number of epochs changes the size of the images in the coming one."""
    full = setup.preprocessing.size

    def size(config: RunConfig) -> int:
        return training_size(state.epoch, config.train.max_epoch, config.data.first_size, full)

    last, coming = size(before), size(now)
    if last == coming:
        return []
    return [
        f"warning: the side of training images goes from {last} to {coming} pixels, since they "
        f"grow over {now.train.max_epoch} epochs now (--first_size)"
    ]


def _check_data(checkpoint: Checkpoint, setup: Setup, run: Run) -> list[str]:
    """Raises ``RunError`` for other training images; returns a warning of other test images."""
    data, about = setup.data, checkpoint.manifest.about
    if about.classes != tuple(data.classes):
        before, now = about.classes, data.classes
        lost, new = ([c for c in a if c not in b] for a, b in ((before, now), (now, before)))
        change = ", ".join([*(f"-{name}" for name in lost), *(f"+{name}" for name in new)][:6])
        raise RunError(
            f"{checkpoint.path}: expected the {len(before)} classes it was trained on, "
            f"found {len(now)} classes in the data ({change or 'in another order'})"
        )
    expected = f"{checkpoint.path}: expected the images it was trained on"
    warnings: list[str] = []
    now_read = setup.about.data
    if about.data and now_read and about.data != now_read:
        changes = differences(run.images(), to_tensors(data)) or "other copies of some"
        if about.data.without_test() != now_read.without_test():
            raise RunError(f"{expected}, found others ({changes}); a new run trains on them")
        warnings.append(f"the test images are others than before ({changes})")
    if about.preprocessing != setup.preprocessing:
        raise RunError(f"{expected}, found others (mean or size differ)")
    return warnings


def _check_steps(checkpoint: Checkpoint, steps: int) -> None:
    """Raises ``RunError`` where an epoch has another number of steps, as in older versions."""
    losses = checkpoint.tensors.get("epoch.losses")
    before = steps if losses is None else losses.numel()
    if before != steps:
        raise RunError(
            f"{checkpoint.path}: expected the images and batches that it was trained on, "
            f"{before} steps an epoch, found {steps}"
        )
