"""What is measured, as JSON files and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.bench.record import Spread
from sparsenet.environment import Environment
from sparsenet.files import read_json
from sparsenet.summary import markdown_table

DIVERGED = "diverged"
TRIALS = "*@*.json"  # the names of their files
COSTS = {
    "network": "network",
    "parameters": "parameters",
    "macs": "million MACs",
    "weights": "weights in fp16 (MB)",
    "memory": "memory (MB)",
    "speed": "images/s",
}


@dataclass(frozen=True)
class Costs:
    """What a network costs, measured on random pixels in a process of its own."""

    network: str  # a ``Candidate``
    side: int  # of the images, in pixels
    batch_size: int
    precision: str
    implementation: str
    parameters: int
    macs: int  # multiply-accumulates of an image
    weights_bytes: int  # of a weights file: matrices in fp16, vectors in fp32
    peak_memory_mb: float | None  # of training, above what the process had before the network
    step_seconds: dict[int, Spread]  # of a training step, by the side of its images
    environment: Environment

    @property
    def images_per_second(self) -> float:
        """Of training, on whole images."""
        return self.batch_size / self.step_seconds[self.side].median


@dataclass(frozen=True)
class Trial:
    """A training that was as long as the time allows at the speed that was measured."""

    data: str
    network: str  # a ``Candidate``
    minutes: float  # that it would take on the idle machine, evaluation not counted
    seed: int
    epochs: int  # of which the last one may have been cut short
    steps: int
    train_images: int
    test_images: int
    error: float | None  # wrong test images after the last step, in percent; ``None``: it diverged
    seconds: float  # that the training took here
    eval_seconds: float
    costs: Costs
    environment: Environment


def trial_name(data: str, network: str, minutes: float, seed: int) -> str:
    """The path of a trial's file below the folder of all, without its suffix."""
    return f"{data}/{network}@{minutes:g}min-seed{seed}"


def read_trials(paths: Iterable[Path]) -> list[Trial]:
    """The trials in files and in folders of such; ``ValueError`` where a file is damaged."""
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob(TRIALS))}
    return [read_json(file, Trial) for file in sorted(files)]


def table(trials: Sequence[Trial]) -> str:
    """The errors on one data set by network and minutes, in Markdown, and where they were measured.

    A cell has the mean over the seeds, and in brackets each of them where there are several. The
    networks come in the order of their errors after the longest time. Raises ``ValueError`` for
    trials on several data sets.
    """
    names = {(trial.data, trial.train_images, trial.test_images) for trial in trials}
    if len(names) != 1:
        found = ", ".join(sorted(f"{name} ({a}, {b} images)" for name, a, b in names))
        raise ValueError(f"expected trials on one data set, found {found or 'none'}")
    times = sorted({trial.minutes for trial in trials}, reverse=True)
    networks = {trial.network: trial.costs for trial in trials}

    def errors(network: str, minutes: float) -> list[float | None]:
        own = [trial for trial in trials if (trial.network, trial.minutes) == (network, minutes)]
        return [trial.error for trial in sorted(own, key=lambda trial: trial.seed)]

    def rank(network: str) -> list[float]:
        means = [_mean(errors(network, minutes)) for minutes in times]
        return [1000.0 if mean is None else mean for mean in means]

    headings = COSTS | {f"{minutes:g}": f"{minutes:g} min" for minutes in reversed(times)}
    rows = [
        _costs(networks[network])
        | {f"{minutes:g}": _errors(errors(network, minutes)) for minutes in times}
        | {"network": network}
        for network in sorted(networks, key=rank)
    ]
    machines = sorted({_machine(trial.costs.environment) for trial in trials})
    return f"{markdown_table(rows, headings)}\nMeasured on {' and '.join(machines)}.\n"


def _costs(costs: Costs) -> dict[str, str]:
    memory = costs.peak_memory_mb
    return {
        "parameters": f"{costs.parameters:,}",
        "macs": f"{costs.macs / 1e6:,.1f}",
        "weights": f"{costs.weights_bytes / 1e6:.2f}",
        "memory": "" if memory is None else f"{memory:,.0f}",
        "speed": f"{costs.images_per_second:,.0f}",
    }


def _errors(errors: Sequence[float | None]) -> str:
    texts = [DIVERGED if error is None else f"{error:.1f}" for error in errors]
    if len(texts) < 2:
        return "".join(texts)
    mean = _mean(errors)
    return f"{DIVERGED if mean is None else f'{mean:.1f}'} ({', '.join(texts)})"


def _mean(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return fmean(known) if len(known) == len(errors) and known else None


def _machine(environment: Environment) -> str:
    threads = f"{environment.threads} thread{'' if environment.threads == 1 else 's'}"
    return f"{environment.device_name}, {threads}, torch {environment.torch}"
