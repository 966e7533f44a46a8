"""Checkpoints: tensors in a safetensors file beside a manifest with its hash, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet import files, weights

KEPT = {"last": 2, "best": 1}  # checkpoints of each kind that stay on disk


class RunError(ValueError):
    """A run folder that cannot be used; the message says what was expected, found, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and a manifest: kind, step, epoch, sha256 and whatever the writer added."""

    path: Path
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


def save(
    folder: Path, kind: str, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> None:
    """A checkpoint, whole or not at all; the manifest is written last and makes it valid."""
    data = serialise_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"sparsenet": json.dumps(manifest)},
    )
    stem = folder / f"{kind}-{step:08d}"
    files.write_atomic(stem.with_suffix(".safetensors"), data)
    digest = hashlib.sha256(data).hexdigest()
    files.write_json(
        stem.with_suffix(".json"), {**manifest, "kind": kind, "step": step, "sha256": digest}
    )
    newest = [path for path in _saved(folder, kind) if path.stem <= stem.name][: KEPT[kind]]
    kept = {path.stem for path in newest}  # later steps are of a run that was taken back
    for old in sorted(folder.glob(f"*{kind}-*")):  # manifests before tensors, and what a kill left
        if old.stem not in kept:
            old.unlink()


def restore(folder: Path, kind: str) -> tuple[Checkpoint, list[str]]:
    """The newest intact checkpoint of *kind*, and a warning for each damaged one before it."""
    warnings: list[str] = []
    for manifest_path in _saved(folder, kind):
        try:
            return _read_checkpoint(manifest_path), warnings
        except (OSError, ValueError, SafetensorError) as error:
            warnings.append(f"{manifest_path.stem}: damaged ({error}), passed over")
    found = f"{len(warnings)} damaged: {warnings[0]}" if warnings else "none"
    other = " (--checkpoint last may have one)" if kind == "best" else ""
    raise RunError(f"{folder.parent}: expected an intact '{kind}' checkpoint, found {found}{other}")


def _saved(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.json"), reverse=True)


def _read_checkpoint(manifest_path: Path) -> Checkpoint:
    manifest = json.loads(manifest_path.read_text())
    data = manifest_path.with_suffix(".safetensors").read_bytes()
    if not isinstance(manifest, dict) or hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise ValueError("its hash is not the one in its manifest")
    written = weights.description(data)
    if not isinstance(written, dict) or {**manifest, **written} != manifest:
        raise ValueError("its manifest is not the one it was written with")
    return Checkpoint(manifest_path, parse_tensors(data), manifest)
