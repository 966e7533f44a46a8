"""Checkpoints: a safetensors file and a manifest with its hash, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet import addresses, files, weights
from sparsenet.results import EpochMetrics
from sparsenet.texts import one_line
from sparsenet.validation import Amount, Count, Percent
from sparsenet.weights import Description

T = TypeVar("T")

KEPT = {"last": 2, "best": 1}  # checkpoints of each kind that stay on disk
IDENTITY = ("kind", "step", "sha256")  # what a manifest has beside what the tensors' file says
LIMIT = 6 * addresses.LIMIT  # bytes: weights, momenta and averaged weights, each in twice the bits
NUMBER = r"\d{8,}"  # a step in the name of a file


class RunError(ValueError):
    """A run folder that cannot be used: one line with what was expected, found, and to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # names in damaged files may have line breaks


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of its tensors, in a JSON file beside them."""

    kind: Literal["last", "best"]
    step: Count  # optimizer steps since the start of the run
    epoch: Count  # epochs that were finished
    about: Description  # what is needed to use the weights
    seconds: Amount = 0.0  # training time of the epoch that has begun; only in "last"
    best: Percent | None = None  # lowest validation error so far; only in "last"
    rows: list[EpochMetrics] | None = None  # of metrics.csv; only in "last", not in older ones
    sha256: str = ""  # of the tensors' file; ``save`` fills it in


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and is intact; *path* is that of its manifest."""

    path: Path
    tensors: dict[str, Tensor]
    manifest: Manifest

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with *prefix*, named without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def save(folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint whole or not at all, then removes older ones of its kind.

    The manifest is written last and makes the checkpoint valid.
    """
    description = dataclasses.asdict(manifest)
    if manifest.kind == "best":  # weights alone, without the state of their training
        del description["seconds"], description["best"], description["rows"]
    identity = {name: description.pop(name) for name in IDENTITY}
    data = serialise_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"sparsenet": json.dumps(description)},
    )
    if len(data) > LIMIT:
        expected = f"a checkpoint of at most {files.size_text(LIMIT)}, which is what is read"
        raise RunError(f"{folder.parent}: expected {expected}, found {files.size_text(len(data))}")
    identity["sha256"] = hashlib.sha256(data).hexdigest()
    stem = folder / f"{manifest.kind}-{manifest.step:08d}"
    files.write_atomic(stem.with_suffix(".safetensors"), data)
    files.write_json(stem.with_suffix(".json"), description | identity)
    _remove_others(folder, manifest.kind, manifest.step)


def _remove_others(folder: Path, kind: str, newest: int) -> None:
    # Later steps are of a run that was taken back.
    manifests = [path for path in saved(folder, kind) if _step_of(path) <= newest]
    kept = {path.stem for path in manifests[: KEPT[kind]]}
    whole = rf"{kind}-{NUMBER}\.(json|safetensors)"
    half = rf"\.{whole}\.\w+"  # named by files.write_atomic, and left by a kill
    for path in sorted(folder.iterdir()):  # manifests before tensors
        if re.fullmatch(f"{whole}|{half}", path.name) and path.stem not in kept:
            # An older one that stays does no harm, one of a later step would be taken for the last.
            with suppress(OSError) if _step_of(path) <= newest else nullcontext():
                path.unlink()


def saved(folder: Path, kind: str) -> list[Path]:
    """The manifests of *kind* in *folder*, newest first, whether intact or not."""
    name = re.compile(rf"{kind}-{NUMBER}\.json")
    manifests = [path for path in folder.glob("*.json") if name.fullmatch(path.name)]
    return sorted(manifests, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2].partition(".")[0])


def restore(folder: Path, kind: str, use: Callable[[Checkpoint], T]) -> tuple[T, list[str]]:
    """What *use* makes of the newest intact checkpoint of *kind*, and a warning for each before it.

    Where it raises ``ValueError`` that one is damaged, and the one before is taken; where
    ``RunError``, it is intact and no other would do. Raises ``RunError`` where there is none.
    """
    warnings: list[str] = []
    tried: set[Path] = set()
    # Looked up anew each time: a run that goes on replaces those that were found.
    while paths := [path for path in saved(folder, kind) if path not in tried]:
        tried.add(paths[0])
        try:
            return use(_read(paths[0])), warnings
        except RunError:
            raise
        except (OSError, ValueError) as error:
            if paths[0] in saved(folder, kind):
                warnings.append(f"{paths[0].stem}: damaged ({error}), passed over")
    state = f"{len(warnings)} damaged: {warnings[0]}" if warnings else "none"
    other = " (--checkpoint last may have one)" if kind == "best" else ""
    raise RunError(f"{folder.parent}: expected an intact '{kind}' checkpoint, found {state}{other}")


def _read(path: Path) -> Checkpoint:
    tensors_file = path.with_suffix(".safetensors")
    if path.is_symlink() or tensors_file.is_symlink():
        raise ValueError("expected files that the run wrote itself, found a link")
    manifest = files.read_json(path, Manifest)
    if path.stem != f"{manifest.kind}-{manifest.step:08d}":
        raise ValueError("its manifest is that of another")
    data = files.read_bytes(tensors_file, LIMIT)
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise ValueError("its hash is not the one in its manifest")
    tensors, description = weights.parse(data)
    if not isinstance(description, dict):
        raise ValueError("its tensors come without a description")
    written = {name: getattr(manifest, name) for name in IDENTITY}
    if msgspec.convert({**description, **written}, Manifest) != manifest:
        raise ValueError("its manifest is not the one it was written with")
    if problem := manifest.about.problem() or weights.not_numbers(tensors):
        raise ValueError(problem)
    return Checkpoint(path, tensors, manifest)
