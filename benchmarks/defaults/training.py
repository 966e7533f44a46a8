"""Images, costs, and trainings that are as long as a number of minutes allows."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.bench.record import Spread
from benchmarks.defaults.candidates import Candidate
from benchmarks.defaults.record import Costs, Trial
from sparsenet import optim
from sparsenet.arithmetic import Arithmetic, choose_arithmetic
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset, Images
from sparsenet.data.images import read_images
from sparsenet.data.load import load_dataset
from sparsenet.data.preprocessing import Form, Preprocessing, channel_statistics
from sparsenet.data.sampling import Batches, batch_ends, plan_epoch, resized, stream
from sparsenet.device import place
from sparsenet.environment import environment
from sparsenet.evaluation import EvaluationStep, NotFiniteError, evaluate, recompute_statistics
from sparsenet.memory import memory_mb, peak_memory_mb
from sparsenet.model import SparseNet
from sparsenet.preparation import BATCH_SIZE
from sparsenet.schedule import ema_rate, learning_rate
from sparsenet.step import TrainingStep
from sparsenet.train import FEW_STEPS, FEWEST_BATCHES
from sparsenet.weights import rounded

CPU = torch.device("cpu")
CLASSES = 10
WARM_UP, FEWEST_STEPS = 2, 5  # steps that are not timed, and that are timed at least
DRAWN_BATCHES = 8  # of random pixels


@dataclass(frozen=True)
class Cut:
    """A part of CIFAR-10: the first images of each class, made larger or not."""

    train_images: int  # at most so many of all classes together
    test_images: int
    side: int  # pixels

    def of(self, data: Dataset) -> Data:
        train, test = self._part(data.train, self.train_images), data.test
        test = self._part(test, self.test_images)
        statistics = channel_statistics(train)
        return Data(train, test, Preprocessing(self.side, 3, *statistics), len(data.classes))

    def _part(self, images: Images, most: int) -> Images:
        each = most // CLASSES
        firsts = [
            (images.labels == label).nonzero().flatten()[:each]
            for label in images.labels.unique().tolist()
        ]
        part = images[torch.cat(firsts).sort().values]
        return read_images(part, Form(self.side, 3)).images  # as those of any other size are read


CUTS = {
    "50000-32": Cut(50_000, 10_000, 32),
    "5000-96": Cut(5_000, 2_000, 96),
    "500-96": Cut(500, 2_000, 96),
    # For the size of images that have none in common: by default these are not trained on.
    "5000-64": Cut(5_000, 2_000, 64),
    "5000-128": Cut(5_000, 2_000, 128),
}


@dataclass(frozen=True)
class Data:
    """What is trained and tested on."""

    train: Images
    test: Images
    preprocessing: Preprocessing
    classes: int


def load(folder: str) -> Dataset:
    """CIFAR-10 from a folder, of which ``CUTS`` are made. Raises ``DataError``."""
    return load_dataset(DataConfig(dataset_dir=folder, in_chans=3))


class Training:
    """A network with all that trains it, ours and a plain one in the same way."""

    def __init__(
        self,
        candidate: Candidate,
        images: Images,
        preprocessing: Preprocessing,
        precision: str = "auto",
    ):
        self.candidate, self.images, self.preprocessing = candidate, images, preprocessing
        self.config = candidate.config
        self.arithmetic = arithmetic(candidate, precision)
        self.batch_size = self.config.train.batch_size or BATCH_SIZE
        self.step = 0

    def begin(self, classes: int, seed: int) -> None:
        """Draws the first weights."""
        self.seed = seed
        torch.manual_seed(stream(seed, "weights").initial_seed())
        model = self.candidate.build(classes, self.arithmetic.implementation)
        self.model: nn.Module = model if self.candidate.plain else place(model, CPU)
        self.model.train()
        self.average = copy.deepcopy(self.model) if self.config.optim.ema else None
        optimizer = optim.new_optimizer(cast(SparseNet, self.model), self.config.optim)
        of_step = self.config, self.preprocessing, self.arithmetic.precision
        self._make_step = TrainingStep(self.model, optimizer, self.average, *of_step)

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average

    def epoch(self, number: int, side: int, steps: int) -> Iterator[Tensor]:
        """Makes the steps of an epoch of a run of *steps*, yielding the loss of each."""
        images = self._sized(side)
        data = self.config.data.scaled(side, self.preprocessing.size)
        plan = plan_epoch(self.seed, number, len(images), data)
        for pixels, labels, *moves in Batches(images, self.batch_size, plan):
            rate = learning_rate(self.config.optim, self.step, 1, steps)  # a step is an epoch here
            rates = torch.tensor(rate), torch.tensor(ema_rate(self.config.optim.ema, self.step))
            loss, _ = self._make_step(pixels, labels, *rates, torch.ones(2), *moves)
            self.step += 1
            yield loss

    def _sized(self, side: int) -> Images:
        if self._resized.shape[-1] != side:
            self._resized = resized(self.images, side)
        return self._resized

    @cached_property
    def _resized(self) -> Images:
        return self.images

    def settle(self) -> None:
        """After few steps, takes statistics from images, as the program does."""
        if self.step >= FEW_STEPS:
            return
        order = torch.randperm(
            len(self.images), generator=stream(self.seed, "statistics", self.step)
        )
        images = self.images[order[: max(self.step, FEWEST_BATCHES) * self.batch_size]]
        sizes = self.batch_size, self.arithmetic.precision
        recompute_statistics(self.evaluated, images, self.preprocessing, CPU, *sizes)


def arithmetic(candidate: Candidate, precision: str = "auto") -> Arithmetic:
    """The precision and the implementation that the program would take, for plain networks too.

    A *precision* other than ``auto`` stands for the candidate's ``auto``.
    """
    return choose_arithmetic(candidate.config.train, CPU, Arithmetic(precision))


def measure(text: str, side: int, seconds: float) -> Costs:
    """Measures what a candidate costs, each size of its images for so many *seconds* at least.

    To be called in a process of its own, as the peak of memory is the process's.
    """
    candidate, random = Candidate.parse(text), torch.Generator().manual_seed(0)
    preprocessing = Preprocessing(side, 3, (0.5,) * 3, (0.25,) * 3)
    drawn = DRAWN_BATCHES * (candidate.config.train.batch_size or BATCH_SIZE)
    pixels = torch.randint(256, (drawn, 3, side, side), dtype=torch.uint8, generator=random)
    labels = torch.randint(CLASSES, (drawn,), generator=random)
    training = Training(candidate, Images(pixels, labels), preprocessing)
    base = memory_mb(CPU)
    training.begin(CLASSES, seed=0)
    first = candidate.config.data.first_size
    timed = {
        size: Spread.of(_time_steps(training, size, seconds))
        for size in [side, *(range(first, side, 4) if first else ())]
    }
    peak = peak_memory_mb(CPU)
    parameters = sum(each.numel() for each in training.model.parameters())
    return Costs(
        network=text,
        side=side,
        batch_size=training.batch_size,
        precision=training.arithmetic.precision,
        implementation="plain" if candidate.plain else training.arithmetic.implementation,
        parameters=parameters,
        macs=candidate.macs(CLASSES, side),
        weights_bytes=sum(each.nbytes for each in rounded(training.model.state_dict()).values()),
        peak_memory_mb=None if peak is None or base is None else round(peak - base, 1),
        step_seconds=timed,
        environment=environment(CPU),
    )


def _time_steps(training: Training, side: int, seconds: float) -> list[float]:
    """The seconds of steps on images of *side* pixels, from one's end to the next one's."""
    taken: list[float] = []
    last = time.perf_counter()
    for epoch in count():
        for _ in training.epoch(epoch, side, steps=10**6):  # so that the rate stays low
            now = time.perf_counter()
            taken.append(now - last)
            last = now
            timed = taken[WARM_UP:]
            if len(timed) >= FEWEST_STEPS and sum(timed) >= seconds:
                return timed
    raise AssertionError


@dataclass(frozen=True)
class Length:
    """How long a training is; its last epoch may be cut short."""

    epochs: int
    steps: int


def length_of(candidate: Candidate, seconds: float, images: int, costs: Costs) -> Length:
    """The training of at least a step that takes so many *seconds* at the speed of *costs*.

    A smaller last batch of an epoch counts as a whole one.
    """
    per_epoch = len(batch_ends(images, costs.batch_size))
    step = {side: spread.median for side, spread in costs.step_seconds.items()}
    epochs = 1
    while True:
        before = sum(per_epoch * step[side] for side in candidate.sizes(epochs, costs.side)[:-1])
        last = round((seconds - before) / step[costs.side])  # steps, of whole images
        if last <= per_epoch:
            return Length(epochs, (epochs - 1) * per_epoch + max(last, 1))
        epochs += max((last - 1) // per_epoch, 1)


def train(
    name: str, data: Data, candidate: Candidate, minutes: float, seed: int, costs: Costs
) -> Trial:
    """Trains on *data*, which is called *name*, and tests after the last step.

    The precision is that of the *costs*, whatever is fastest on the machine that trains.
    """
    length = length_of(candidate, 60 * minutes, len(data.train), costs)
    training = Training(candidate, data.train, data.preprocessing, costs.precision)
    training.begin(data.classes, seed)
    began = time.perf_counter()
    finite = _make_steps(training, length)
    seconds = time.perf_counter() - began
    error, eval_seconds = None, 0.0
    if finite:
        training.settle()
        precision = training.arithmetic.precision
        step = EvaluationStep(training.evaluated, data.preprocessing, precision)
        try:
            result = evaluate(step, data.test, CPU)
            error, eval_seconds = result.error, result.seconds
        except NotFiniteError:
            error = None
    return Trial(
        data=name,
        network=str(candidate),
        minutes=minutes,
        seed=seed,
        epochs=length.epochs,
        steps=length.steps,
        train_images=len(data.train),
        test_images=len(data.test),
        error=error,
        seconds=seconds,
        eval_seconds=eval_seconds,
        costs=costs,
        environment=environment(CPU, training.batch_size, training.arithmetic.precision),
    )


def _make_steps(training: Training, length: Length) -> bool:
    """Makes all steps, or as many as have a finite loss, which it returns whether they have."""
    for epoch, side in enumerate(
        training.candidate.sizes(length.epochs, training.preprocessing.size)
    ):
        for loss in training.epoch(epoch, side, length.steps):
            if not loss.isfinite():
                return False
            if training.step == length.steps:
                return True
    raise AssertionError
