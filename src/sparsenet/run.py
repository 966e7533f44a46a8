"""The run folder: its lock, log, metrics and description. Files are written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet import files
from sparsenet.arithmetic import Arithmetic
from sparsenet.checkpoints import RunError
from sparsenet.config import RunConfig, load
from sparsenet.environment import Environment, installed
from sparsenet.extras import require
from sparsenet.graph import Node, totals
from sparsenet.results import EpochMetrics


class Run:
    """A run folder. Methods that read or write it raise ``RunError`` in one line."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """The folder of ``sparsenet.checkpoints``."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: Path) -> Run:
        """Makes a new, empty run folder; a folder that holds anything is left as it is."""
        if (path / "config.json").exists():
            raise RunError(
                f"--out: {path} already holds a run; choose another folder or --resume {path}"
            )
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"--out: expected a new or an empty folder, found files in {path}")
        run = cls(path)
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path / "train.log", "")
        except OSError as error:
            raise RunError(
                f"--out: expected a folder that can be written, {path}: {error.strerror}"
            ) from None
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens an existing run folder."""
        if (path / "config.json").is_file():
            return cls(path)
        content = "nothing"
        if path.exists():
            content = "a folder without one" if path.is_dir() else "a file"
        raise RunError(f"{path}: expected a run folder with config.json, found {content}")

    def discard_if_unused(self) -> None:
        """Removes a folder that ``create`` made and no run was written into."""
        if (self.path / "config.json").exists() or not self.checkpoints.is_dir():
            return
        if {path.name for path in self.path.iterdir()} <= {"checkpoints", "train.log", ".lock"}:
            shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder, so that a second process that trains into it is refused.

        It is free again however the process ends.
        """
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

    def arithmetic(self) -> Arithmetic:
        """The arithmetic of the run so far; ``auto`` where that was not recorded."""
        try:
            return files.read_json(self.path / "environment.json", Arithmetic)
        except ValueError:
            return Arithmetic()

    def images(self) -> dict[str, Tensor]:
        """What ``describe`` wrote of the images; empty where there is no such file."""
        try:
            return parse_tensors((self.path / "images.safetensors").read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{self.path / 'images.safetensors'}: expected a readable file, found: {error}"
            ) from None

    def describe(
        self,
        config: RunConfig,
        image_size: int,
        nodes: Sequence[Node],
        environment: Environment,
        images: Mapping[str, Tensor],
    ) -> None:
        """Writes config.json, requirements.txt, environment.json and, from *nodes*, graph.json.

        *images* say which ones the run is made with: ``sparsenet.data.identity.to_tensors``.
        """
        parameters, macs = totals(nodes)
        graph = {
            "image_size": image_size,
            "parameters": parameters,
            "macs": macs,
            "nodes": nodes,
        }
        files.write_json(self.path / "graph.json", graph)
        files.write_json(self.path / "environment.json", environment)
        files.write_atomic(self.path / "images.safetensors", serialise_tensors(dict(images)))
        files.write_atomic(self.path / "requirements.txt", "\n".join(installed()) + "\n")
        located = dataclasses.replace(config, data=config.data.located())
        files.write_json(self.path / "config.json", located.to_dict())

    def log(self, line: str) -> None:
        with (self.path / "train.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def metrics(self) -> list[EpochMetrics]:
        """The rows of metrics.csv, none where there is no such file."""
        file = self.path / "metrics.csv"
        if not file.exists():
            return []
        try:
            with file.open(newline="") as lines:
                rows = [
                    {column: cell for column, cell in row.items() if cell}
                    for row in csv.DictReader(lines)
                ]
            return msgspec.convert(rows, list[EpochMetrics], strict=False)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{file}: expected numbers as a run writes them, found: {error}"
            ) from None

    def write_metrics(self, rows: Sequence[EpochMetrics]) -> None:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(EpochMetrics))
        writer.writerows(map(dataclasses.astuple, rows))
        files.write_atomic(self.path / "metrics.csv", table.getvalue())
