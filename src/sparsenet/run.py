"""The run folder: configuration, environment, metrics, checkpoints, lock. Whatever is written is written whole."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet import weights, zoo
from sparsenet.architecture import Architecture, Node
from sparsenet.config import RunConfig, load
from sparsenet.data.images import Preprocessing
from sparsenet.device import device_name, place
from sparsenet.extras import require
from sparsenet.files import write_atomic
from sparsenet.model import SparseNet

COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_error", "val_loss", "val_error", "test_loss", "test_error",
    "seconds", "images_per_second", "eval_seconds", "peak_memory_mb",
)  # fmt: skip
TIMES = ("seconds", "images_per_second", "eval_seconds", "peak_memory_mb")  # what differs between equal runs
KEPT = {"last": 2, "best": 1}  # checkpoints of each kind that stay on disk


class RunError(ValueError):
    """A run folder that cannot be used; the message says what was expected, found, and what to do."""


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and a manifest: kind, step, epoch, sha256 and whatever the writer added."""

    path: Path
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


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
            raise RunError(f"--out: {path} already holds a run; choose another folder or --resume {path}")
        run = cls(path)
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"--out: expected a new or an empty folder, found files in {path}")
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "train.log", "")
        except OSError as error:
            raise RunError(f"--out: expected a folder that can be written, {path}: {error.strerror}") from None
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
            found = "a folder without one" if path.is_dir() else "a file" if path.exists() else "nothing"
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
            raise RunError(f"{self.path}: expected a folder that can be written: {error.strerror}") from None
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
            return {name: found[name] for name in ("precision", "implementation") if isinstance(found.get(name), str)}
        except (OSError, ValueError, AttributeError):
            return {}

    def describe(
        self, config: RunConfig, image_size: int, nodes: Sequence[Node], environment: Mapping[str, Any]
    ) -> None:
        """Writes config.json, requirements.txt, environment.json and, from *nodes*, graph.json."""
        write_json(
            self.path / "graph.json",
            {
                "image_size": image_size,
                "parameters": sum(node.parameters for node in nodes),
                "macs": sum(node.macs for node in nodes),
                "nodes": [dataclasses.asdict(node) for node in nodes],
            },
        )
        write_json(self.path / "environment.json", environment)
        write_atomic(self.path / "requirements.txt", "\n".join(installed()) + "\n")
        located = dataclasses.replace(config, data=config.data.located())
        write_json(self.path / "config.json", located.to_dict())

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
                return [{k: json.loads(v) if v else None for k, v in row.items()} for row in csv.DictReader(lines)]
        except (OSError, ValueError) as error:
            raise RunError(f"{file}: expected numbers as a run writes them, found: {error}") from None

    def write_metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        lines = [",".join(COLUMNS)]
        lines += [",".join(_cell(row.get(column)) for column in COLUMNS) for row in rows]
        write_atomic(self.path / "metrics.csv", "\n".join(lines) + "\n")

    def save(self, kind: str, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
        """A checkpoint, whole or not at all; the manifest is written last and makes it valid."""
        data = serialise_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {"sparsenet": json.dumps(manifest)},
        )
        stem = self.checkpoints / f"{kind}-{step:08d}"
        write_atomic(stem.with_suffix(".safetensors"), data)
        digest = hashlib.sha256(data).hexdigest()
        write_json(stem.with_suffix(".json"), {**manifest, "kind": kind, "step": step, "sha256": digest})
        newest = [path for path in self._saved(kind) if path.stem <= stem.name][: KEPT[kind]]
        kept = {path.stem for path in newest}  # later steps are of a run that was taken back
        for old in sorted(self.checkpoints.glob(f"*{kind}-*")):  # manifests before tensors, and what a kill left
            if old.stem not in kept:
                old.unlink()

    def restore(self, kind: str) -> tuple[Checkpoint, list[str]]:
        """The newest intact checkpoint of *kind*, and a warning for each damaged one before it."""
        warnings: list[str] = []
        for manifest_path in self._saved(kind):
            try:
                return _read_checkpoint(manifest_path), warnings
            except (OSError, ValueError, SafetensorError) as error:
                warnings.append(f"{manifest_path.stem}: damaged ({error}), passed over")
        found = f"{len(warnings)} damaged: {warnings[0]}" if warnings else "none"
        other = " (--checkpoint last may have one)" if kind == "best" else ""
        raise RunError(f"{self.path}: expected an intact '{kind}' checkpoint, found {found}{other}")

    def _saved(self, kind: str) -> list[Path]:
        return sorted(self.checkpoints.glob(f"{kind}-*.json"), reverse=True)


def _read_checkpoint(manifest_path: Path) -> Checkpoint:
    manifest = json.loads(manifest_path.read_text())
    data = manifest_path.with_suffix(".safetensors").read_bytes()
    if not isinstance(manifest, dict) or hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise ValueError("its hash is not the one in its manifest")
    written = weights.description(data)
    if not isinstance(written, dict) or {**manifest, **written} != manifest:
        raise ValueError("its manifest is not the one it was written with")
    return Checkpoint(manifest_path, parse_tensors(data), manifest)


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)


def installed() -> list[str]:
    """``name==version`` of every installed package, sorted."""
    found = {(d.metadata["Name"], d.version) for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return sorted((f"{name}=={version}" for name, version in found), key=str.lower)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and commit: what a figure needs beside it."""
    return {
        "sparsenet": version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(device),
        "driver": {"cuda": torch.version.cuda, "hip": torch.version.hip} if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def version() -> str:
    """The installed version of this package."""
    try:
        return importlib.metadata.version("sparsenet")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


@dataclass(frozen=True)
class Trained:
    """A trained network and all that is needed to use it."""

    path: Path  # the run folder, or the weights file
    model: SparseNet  # in evaluation mode
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    dataset: str
    info: dict[str, Any]  # epoch, recipe, version: what the weights say of themselves
    warnings: tuple[str, ...] = ()  # damaged checkpoints that were passed over


def load_trained(
    source: Path | str, kind: str = "best", device: torch.device | str = "cpu", implementation: str = "auto"
) -> Trained:
    """The network of a run folder, from its ``best`` or ``last`` checkpoint, or of whatever names weights.

    That is, in this order: a folder or file that exists, an ``https://`` address, a name of
    :func:`sparsenet.list_models` that has weights. Raises ``ValueError`` in one line (:class:`RunError` for a run
    folder).
    """
    if weights.exists(str(source)) and Path(source).is_dir():
        return _from_run(Path(source), kind, device, implementation)
    found = weights.load(source, also="a run folder, ")
    if kind != "best":
        raise ValueError(f"--checkpoint: expected none for {source}, which is one set of weights, found {kind!r}")
    model = zoo.filled(zoo.stored_architecture(found), found, implementation)
    return _trained(found.path, model, device, found.about)


def _from_run(path: Path, kind: str, device: torch.device | str, implementation: str) -> Trained:
    checkpoint, warnings = Run.open(path).restore(kind)
    about = checkpoint.manifest["about"]
    try:
        model = SparseNet(Architecture(**about["architecture"]), implementation)
    except TypeError as error:
        raise RunError(f"{checkpoint.path}: expected an architecture that this version knows, found: {error}") from None
    averaged = any(name.startswith("average.") for name in checkpoint.tensors)
    prefix = "average." if averaged else "model."  # the weights that are evaluated
    tensors = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{checkpoint.path}: its weights do not fit its architecture ({error})") from None
    info = {**about, "epoch": checkpoint.manifest["epoch"], "step": checkpoint.manifest["step"]}
    return _trained(path, model, device, info, tuple(warnings))


def _trained(
    path: Path, model: SparseNet, device: torch.device | str, info: dict[str, Any], warnings: tuple[str, ...] = ()
) -> Trained:
    return Trained(
        path,
        place(model.eval(), device),
        Preprocessing(**info["preprocessing"]),
        tuple(info["classes"]),
        info["dataset"],
        info,
        warnings,
    )
