"""Run folders, read as rows of a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparsenet.config import COMPONENTS, RunConfig, from_dict
from sparsenet.data.config import DataConfig
from sparsenet.data.identity import digest
from sparsenet.data.registry import KINDS
from sparsenet.data.splits import IMAGES_OF, SPLITS
from sparsenet.data.tree import list_folder
from sparsenet.files import read_json
from sparsenet.presets import PAPER, describe_recipe, unlike_the_paper
from sparsenet.run import Run
from sparsenet.summary import MeasuredRun, RunSummary
from sparsenet.validation import Count, Name, Percent
from sparsenet.weights import in_folder

T = TypeVar("T")

RUN_FILES = ("config.json", "metrics.csv", "result.json")  # any of them makes a folder a run
DETAILS = (  # those that it names only where they tell rows apart
    ("data", "image_column"),
    ("data", "label_column"),
    ("data", "test_fraction"),
    ("data", "mean"),
    ("data", "std"),
    ("train", "sync_statistics"),
)


@dataclass(frozen=True)
class Environment:
    """What environment.json says of a run's speed."""

    device: Name | None = None
    device_name: Name | None = None
    threads: Count | None = None
    torch: Name | None = None
    batch_size: Count | None = None
    precision: Name | None = None
    implementation: Name | None = None
    ranks: Count | None = None

    def machine(self, precision: str | None, memory: str = "normal") -> str:
        """Returns as a text the device, its threads and processes, the version of PyTorch,
        *precision*, and *memory* where it is lean.
        """
        parts = [self.device_name or self.device]
        if self.device == "cpu" and self.threads:
            parts.append(f"{self.threads} thread{'' if self.threads == 1 else 's'}")
        if self.torch:
            parts.append(f"torch {self.torch}")
        parts.append(precision)
        if self.ranks and self.ranks > 1:
            parts.append(f"{self.ranks} processes")
        if memory != "normal":
            parts.append(f"{memory} memory")
        return ", ".join(part for part in parts if part and part != "auto")


@dataclass(frozen=True)
class Result:
    """What result.json says as far as the table shows it."""

    error: Percent
    dataset: Name | None = None
    epochs: Count | None = None


@dataclass(frozen=True)
class Costs:
    """What graph.json says of the whole network."""

    image_size: Count | None = None
    parameters: Count | None = None
    macs: Count | None = None


def run_folders(path: Path) -> list[Path]:
    """Returns *path* where it is a run folder, else the run folders below it."""
    if any((path / name).is_file() for name in RUN_FILES) and not in_folder(path):
        return [path]
    others = {file.parent for file in list_folder(path).others if file.name in RUN_FILES}
    found = {folder for folder in others if not in_folder(folder)}  # no exported network
    folders: dict[Path, Path] = {}
    for folder in sorted(found, key=lambda each: (each.resolve() != each.absolute(), each)):
        folders.setdefault(folder.resolve(), folder)  # a link to one comes after it
    return sorted(folders.values())


def read_summaries(paths: Iterable[Path]) -> list[RunSummary]:
    """Returns a row for each group of runs that differ in their seeds only, the best first.

    Where rows have one recipe and differ in which images they saw or in other details, it says so.
    *paths* are run folders and folders that hold some; a run that is named twice counts once.
    Raises ``ValueError`` in one line for a path without any run and for a damaged file.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        below = run_folders(path)
        if not below:
            expected = f"{', '.join(RUN_FILES[:-1])} or {RUN_FILES[-1]}"
            raise ValueError(f"{path}: expected a run folder with {expected}, found none")
        for folder in below:
            folders.setdefault(folder.resolve(), folder)
    groups: dict[tuple[RunSummary, int], list[MeasuredRun]] = {}
    repeats: Counter[tuple[RunSummary, int | None]] = Counter()
    for folder in folders.values():
        setup, run = read_run(folder)
        # The same seed again is not one more seed: it belongs to another row.
        groups.setdefault((setup, repeats[setup, run.seed]), []).append(run)
        repeats[setup, run.seed] += 1
    rows = []
    for (setup, _), measured in groups.items():
        measured.sort(key=lambda run: run.seed or 0)
        rows.append(dataclasses.replace(setup, runs=tuple(measured)))
    return sorted(_told_apart(rows), key=lambda row: (row.error is None, row.error or 0.0))


def read_run(path: Path) -> tuple[RunSummary, MeasuredRun]:
    """Returns what a run folder says of the network and its training, and what was measured.

    The summary is without the run. Raises ``ValueError`` in one line for a damaged file.
    """
    folder = Run(path)
    config, known = _read_config(folder.file("config.json"))
    environment = _read_if_there(folder.file("environment.json"), Environment)
    if not config.train.batch_size:
        came_to = (environment and environment.batch_size) or PAPER.train.batch_size
        train = dataclasses.replace(config.train, batch_size=came_to)
        config = dataclasses.replace(config, train=train)
    costs = _read_if_there(folder.file("graph.json"), Costs) or Costs()
    result = _read_if_there(folder.file("result.json"), Result)
    seed = config.train.seed if "train" in known else None
    run = MeasuredRun(path, seed, None, tuple(folder.metrics()))
    tested = run.column("test_error") or run.column("val_error")
    if result or tested:
        run = dataclasses.replace(run, error=result.error if result else tested[-1])
    machine = implementation = None
    if environment:
        precision = environment.precision or config.train.precision
        machine = environment.machine(precision, config.train.memory)
        implementation = environment.implementation or config.train.implementation
    epochs = len(run.metrics) or (result.epochs if result else None) or 0
    dataset = _name_of_data(config.data) if "data" in known else None
    setup = RunSummary(
        runs=(),
        network=config.network if "network" in known else None,
        machine=machine,
        implementation=None if implementation == "auto" else implementation,
        image_size=costs.image_size,
        batch_size=config.train.batch_size if "train" in known else None,
        parameters=costs.parameters,
        macs=costs.macs,
        dataset=(result.dataset if result else None) or dataset,
        recipe=describe_recipe(config, epochs) if "train" in known else None,
        details=_details(folder, config),
        is_final=result is not None,
    )
    return setup, run


def _name_of_data(data: DataConfig) -> str:
    """What the data of a run without a result are called."""
    kind = KINDS.get(data.dataset)
    is_one = kind and (kind.downloader or not kind.in_folder)  # data set, whatever its place is
    return data.dataset_name or (not is_one and Path(data.dataset_dir).stem) or data.dataset


def _details(folder: Run, config: RunConfig) -> tuple[str, ...]:
    """What tells a run apart and neither its recipe nor the name of its data says.

    Runs of older versions do not say which images they were made with.
    """
    images = folder.images()
    said = [
        f"{IMAGES_OF[name]} images {digest(images[f'{name}.ids'], images[f'{name}.labels'])}"
        for name in SPLITS
        if f"{name}.ids" in images
    ]
    if config.train.weights:  # of which a recipe says the last part
        said.append(f"weights {config.train.weights}")
    return (*said, *unlike_the_paper(config, DETAILS))


def _told_apart(rows: Iterable[RunSummary]) -> Iterator[RunSummary]:
    """*rows* whose recipes also say in which details those of the same data and recipe differ."""
    groups: dict[tuple[str | None, str | None], list[RunSummary]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.recipe), []).append(row)
    for (_, recipe), group in groups.items():
        common = set.intersection(*(set(row.details) for row in group))
        for row in group:
            own = [each for each in row.details if each not in common]
            yield dataclasses.replace(row, recipe=", ".join(filter(None, [recipe, *own])) or None)


def _read_config(file: Path) -> tuple[RunConfig, set[str]]:
    """The settings of a run, perhaps of another version, and the components that it names."""
    written = _read_if_there(file, dict[str, dict[str, Any]]) or {}
    settings = {}
    for component, owner in COMPONENTS.items():
        names = {field.name for field in dataclasses.fields(owner)}
        values = written.get(component, {})
        settings[component] = {name: values[name] for name in values.keys() & names}
    named = {component for component in COMPONENTS if component in written}
    return from_dict(settings, str(file), PAPER), named


def _read_if_there(file: Path, kind: type[T]) -> T | None:
    return read_json(file, kind) if file.is_file() else None
