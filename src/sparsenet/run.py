"""The run folder: configuration, environment, metrics, checkpoints, lock. Whatever is written is written whole."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsenet import checkpoints, files
from sparsenet.checkpoints import Checkpoint, RunError
from sparsenet.config import RunConfig, load
from sparsenet.environment import installed
from sparsenet.extras import require
from sparsenet.graph import Node

COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_error", "val_loss", "val_error", "test_loss", "test_error",
    "seconds", "images_per_second", "eval_seconds", "peak_memory_mb",
)  # fmt: skip
TIMES = (
    "seconds",
    "images_per_second",
    "eval_seconds",
    "peak_memory_mb",
)  # what differs between equal runs


class Run:
    """A run folder. Every method that reads or writes it raises :class:`RunError` in one line."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: Path) -> Run:
        """A new, empty run folder; a folder that already holds a run is left as it is."""
        if (path / "config.json").exists():
            raise RunError(
                f"--out: {path} already holds a run; choose another folder or --resume {path}"
            )
        run = cls(path)
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"--out: expected a new or an empty folder, found files in {path}")
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path / "train.log", "")
        except OSError as error:
            raise RunError(
                f"--out: expected a folder that can be written, {path}: {error.strerror}"
            ) from None
        return run

    def discard_if_unused(self) -> None:
        """Removes a folder that :meth:`create` made and no run was written into."""
        if (self.path / "config.json").exists() or not self.checkpoints.is_dir():
            return
        if {path.name for path in self.path.iterdir()} <= {"checkpoints", "train.log", ".lock"}:
            shutil.rmtree(self.path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run folder."""
        if not (path / "config.json").is_file():
            found = (
                "a folder without one"
                if path.is_dir()
                else "a file"
                if path.exists()
                else "nothing"
            )
            raise RunError(f"{path}: expected a run folder with config.json, found {found}")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder: a second process that trains into it is refused. Freed however the process ends."""
        filelock = require("filelock", "train")
        lock = filelock.FileLock(str(self.path / ".lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"{self.path}: another process is training into this folder") from None
        except OSError as error:
            raise RunError(
                f"{self.path}: expected a folder that can be written: {error.strerror}"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def config(self) -> RunConfig:
        return load(self.path / "config.json", RunConfig())

    def resolved(self) -> dict[str, str]:
        """``precision`` and ``implementation`` that the run has had so far; nothing where that was not recorded."""
        try:
            found = json.loads((self.path / "environment.json").read_text())
            return {
                name: found[name]
                for name in ("precision", "implementation")
                if isinstance(found.get(name), str)
            }
        except (OSError, ValueError, AttributeError):
            return {}

    def describe(
        self,
        config: RunConfig,
        image_size: int,
        nodes: Sequence[Node],
        environment: Mapping[str, Any],
    ) -> None:
        """Writes config.json, requirements.txt, environment.json and, from *nodes*, graph.json."""
        files.write_json(
            self.path / "graph.json",
            {
                "image_size": image_size,
                "parameters": sum(node.parameters for node in nodes),
                "macs": sum(node.macs for node in nodes),
                "nodes": [dataclasses.asdict(node) for node in nodes],
            },
        )
        files.write_json(self.path / "environment.json", environment)
        files.write_atomic(self.path / "requirements.txt", "\n".join(installed()) + "\n")
        located = dataclasses.replace(config, data=config.data.located())
        files.write_json(self.path / "config.json", located.to_dict())

    def log(self, line: str) -> None:
        with (self.path / "train.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def metrics(self) -> list[dict[str, float | None]]:
        """The rows of metrics.csv; a value that was not measured is ``None``."""
        file = self.path / "metrics.csv"
        if not file.exists():
            return []
        try:
            with file.open(newline="") as lines:
                return [
                    {k: json.loads(v) if v else None for k, v in row.items()}
                    for row in csv.DictReader(lines)
                ]
        except (OSError, ValueError) as error:
            raise RunError(
                f"{file}: expected numbers as a run writes them, found: {error}"
            ) from None

    def write_metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        lines = [",".join(COLUMNS)]
        lines += [",".join(_cell(row.get(column)) for column in COLUMNS) for row in rows]
        files.write_atomic(self.path / "metrics.csv", "\n".join(lines) + "\n")

    def save(
        self, kind: str, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """A checkpoint, whole or not at all."""
        checkpoints.save(self.checkpoints, kind, step, tensors, manifest)

    def restore(self, kind: str) -> tuple[Checkpoint, list[str]]:
        """The newest intact checkpoint of *kind*, and a warning for each damaged one before it."""
        return checkpoints.restore(self.checkpoints, kind)


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)
