"""The run folder: its lock, log, metrics and description. Files are written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import msgspec
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet import files, weights
from sparsenet.arithmetic import Arithmetic
from sparsenet.checkpoints import RunError
from sparsenet.config import MOST_EPOCHS, RunConfig, load
from sparsenet.data.identity import checked
from sparsenet.environment import Environment, installed
from sparsenet.extras import require
from sparsenet.graph import Node, totals
from sparsenet.results import EpochMetrics

MOST_IMAGES = 2**30  # bytes of images.safetensors, 16 for each image
STARTED = {"checkpoints", "train.log", ".lock"}  # what a folder holds before it is described
# Of its weights and epochs.
PICTURES = ("curves.png", "confusion.png", "reliability.png", "samples.png", "filters.png")
WRITTEN = (
    *("config.json", "graph.json", "environment.json", "result.json", "metrics.csv"),
    *("images.safetensors", "requirements.txt", "graph.svg"),
    *PICTURES,
)
# What a kill leaves of files.write_atomic.
HALF = re.compile(rf"\.({'|'.join(map(re.escape, WRITTEN))})\.[0-9a-f]{{8}}")


class Run:
    """A run folder. Methods that read or write it raise ``RunError`` in one line."""

    def __init__(self, path: Path):
        self.path = path
        self.is_new, self.was_there = False, True  # as ``create`` finds it
        self.lock: tuple[int, int] | None = None  # which file holds it, while it is held
        self._began = False  # described by this process
        self._lines: list[str] = []  # of the log until then

    @property
    def is_described(self) -> bool:
        """Whether it says what run it holds, so that it can be resumed."""
        return self.file("config.json").is_file()

    @property
    def checkpoints(self) -> Path:
        """The folder of ``sparsenet.checkpoints``."""
        return self.file("checkpoints")

    def file(self, name: str) -> Path:
        """The path of what has this name in the folder.

        ``RunError`` for a link, which may lead to what is not to be shown or written, and for a
        pipe or a device.
        """
        path = self.path / name
        if self.lock and not self._is_held():
            raise RunError(
                f"{self.path}: expected the folder in which the run began, found another in its "
                "place; nothing more is written into it"
            )
        if path.is_symlink() or files.is_special(path):
            found = "a link" if path.is_symlink() else "a pipe or device"
            raise RunError(f"{path}: expected what the run wrote itself, found {found}; remove it")
        return path

    def read(self, name: str, limit: int = files.MOST_BYTES) -> bytes:
        """The content of what has this name; ``RunError`` where it is none of at most *limit*."""
        file = self.file(name)
        try:
            return files.read_bytes(file, limit)
        except OSError as error:
            found = error.strerror or error
            raise RunError(f"{file}: expected a readable file, found: {found}") from None

    @classmethod
    def create(cls, path: Path) -> Run:
        """Makes a new, empty run folder; a folder that holds anything is left as it is.

        What a process that was killed while it loaded its data has left counts as nothing.
        """
        require("filelock", "train")  # which holds the folder: missed before there is one
        run = cls(path)
        run.is_new, run.was_there = True, path.is_dir()
        run._refuse_content()
        with _writing(path):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            run.file("train.log").touch()
        return run

    @classmethod
    def create_one_of_its_own(cls, path: Path) -> Run:
        """As ``create``, but with a number after the name of *path* where somebody has that name.

        Of several processes each gets another folder.
        """
        with _writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        for number in count():
            own = path.with_name(f"{path.name}-{number}") if number else path
            with _writing(own), suppress(FileExistsError):
                own.mkdir()
                break
        run = cls.create(own)
        run.was_there = False
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens an existing run folder."""
        run = cls(path)
        run._refuse_links()
        if run.is_described:
            return run
        content = "nothing"
        if path.exists():
            content = "a folder without one" if path.is_dir() else "a file"
        raise RunError(f"{path}: expected a run folder with config.json, found {content}")

    def _refuse_links(self) -> None:
        for name in sorted(STARTED):  # which are written into
            self.file(name)

    def _refuse_content(self) -> None:
        self._refuse_links()
        if self.is_described:
            raise RunError(
                f"--out: {self.path} already holds a run; choose another folder or "
                f"--resume {self.path}"
            )
        if self.was_there and not self._is_unused():
            raise RunError(f"--out: expected a new or an empty folder, found files in {self.path}")

    def _is_unused(self) -> bool:
        """Whether there is nothing in the folder but what ``create`` and ``locked`` make."""
        log = self.path / "train.log"
        if {path.name for path in self.path.iterdir() if not HALF.fullmatch(path.name)} - STARTED:
            return False
        if self.checkpoints.exists() and any(self.checkpoints.iterdir()):
            return False
        lock = self.path / ".lock"
        if lock.exists() and lock.stat().st_size:  # somebody else's, as the program's is empty
            return False
        return not log.exists() or not log.stat().st_size

    def _discard_if_unused(self) -> None:
        with suppress(OSError):
            if not self._is_unused():
                return
            self.checkpoints.rmdir()
            for path in list(self.path.iterdir()):
                if path.name in STARTED or HALF.fullmatch(path.name):
                    path.unlink()
            if not self.was_there:
                self.path.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder, so that a second process that trains into it is refused.

        It is free again however the process ends. A new run that ends before it is described
        leaves nothing: neither the folder nor, where that was there before, anything in it.
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
            if self.is_new:  # another process may have begun, and even ended, before it was held
                self._refuse_content()
            self.checkpoints.mkdir(exist_ok=True)  # another that gave up may have removed it
            self.lock = _identity(self.path / ".lock")
            for path in self.path.iterdir():
                if HALF.fullmatch(path.name) and path.is_file():
                    path.unlink()
            yield
        finally:
            moved = self.lock is not None and not self._is_held()
            self.lock = None
            if self.is_new and not moved:
                self._discard_if_unused()
            lock.release()

    def _is_held(self) -> bool:
        """Whether the folder is the one that ``locked`` holds: it may have been moved away."""
        return _identity(self.path / ".lock") == self.lock

    def config(self) -> RunConfig:
        return load(self.file("config.json"), RunConfig())

    def arithmetic(self) -> Arithmetic:
        """The arithmetic of the run so far; ``auto`` where that was not recorded."""
        file = self.file("environment.json")
        try:
            return files.read_json(file, Arithmetic) if file.exists() else Arithmetic()
        except ValueError as error:
            advice = "without that file the run goes on with what is fastest here"
            raise RunError(f"{error}; {advice}") from None

    def images(self) -> dict[str, Tensor]:
        """What ``describe`` wrote of the images; empty where there is no such file."""
        file = self.file("images.safetensors")
        if not file.exists():
            return {}
        data = self.read(file.name, MOST_IMAGES)
        try:
            return checked(weights.parse(data)[0])
        except ValueError as error:
            raise RunError(f"{file}: expected a readable file, found: {error}") from None

    def describe(
        self,
        config: RunConfig,
        image_size: int,
        nodes: Sequence[Node],
        environment: Environment,
        images: Mapping[str, Tensor],
    ) -> None:
        """Writes config.json, requirements.txt, environment.json and, from *nodes*, graph.json.

        With the first of them the folder can be resumed. *images* say which ones the run is made
        with: ``sparsenet.data.identity.to_tensors``.
        """
        located = dataclasses.replace(config, data=config.data.located())
        files.write_json(self.path / "config.json", located.to_dict())
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
        self._began = True

    def log(self, line: str) -> None:
        """Writes a line to train.log, where those before ``describe`` wait for it.

        A run that is refused or ends before it is described leaves everything as it was.
        """
        self._lines.append(line)
        if not self._began:
            return
        with self.file("train.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{each}\n" for each in self._lines)
        self._lines.clear()

    def metrics(self) -> list[EpochMetrics]:
        """The rows of metrics.csv, none where there is no such file."""
        file = self.file("metrics.csv")
        if not file.exists():
            return []
        try:
            lines = self.read(file.name).decode().splitlines(keepends=True)
            if len(lines) > 2 * MOST_EPOCHS:
                raise ValueError(f"{len(lines):,} lines")
            rows = [
                {column: cell for column, cell in row.items() if cell}
                for row in csv.DictReader(lines)
            ]
            return msgspec.convert(rows, list[EpochMetrics], strict=False)
        except RunError:
            raise
        except (ValueError, csv.Error) as error:
            raise RunError(
                f"{file}: expected numbers as a run writes them, found: {error}"
            ) from None

    def write_metrics(self, rows: Sequence[EpochMetrics]) -> None:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(EpochMetrics))
        writer.writerows(map(dataclasses.astuple, rows))
        files.write_atomic(self.file("metrics.csv"), table.getvalue())


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"--out: expected a folder that can be written, {path}: {error.strerror}"
        ) from None
