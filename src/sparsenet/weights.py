"""Weights files: one safetensors file with all that is needed to use a network, and what it measures.

Matrices and convolutions are fp16 in the file, vectors fp32 and counters integers; a network gets them back in fp32.
``__metadata__["sparsenet"]`` is JSON (see :data:`ABOUT`), ``measured`` in it the error of exactly these numbers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet.downloads import fetch
from sparsenet.files import cache_folder

SHIPPED = Path(__file__).with_name(
    "pretrained"
)  # NAME.safetensors, and index.json: NAME to SHA-256
SCHEME = "https://"
LIMIT = 512 * 2**20  # bytes of a weights file
RESULT = {
    "error": float,
    "top5_error": float,
    "images": int,
    "dataset": str,
}  # errors in percent; of which images
LARGEST = 4096  # side of images in pixels
# What a file says of its network: a name to a type, to names that an object has, or to a list's kind of entries.
ABOUT: dict[str, Any] = {
    "sparsenet": str,  # the version that trained it
    "architecture": {"num_classes": int, "in_chans": int},  # and the other fields of Architecture
    "preprocessing": {"size": int, "channels": int, "mean": [float], "std": [float]},
    "classes": [str],
    "dataset": str,
    "recipe": {  # sparsenet.config.recipe
        "data": {
            "test_fraction": float,
            "skip_corrupt": bool,
        },  # which decide which images are the test images
        "optim": dict,
        "train": {"seed": int},
    },
    "epoch": int,
    "measured": {"fp32": RESULT},  # by precision; bf16 too where it was measured
}


@dataclass(frozen=True)
class Weights:
    """The content of a weights file that has been checked."""

    source: str  # what the user named
    path: Path
    tensors: dict[str, Tensor]  # a state dict; what was fp16 is fp32 again
    about: dict[str, Any]  # :data:`ABOUT`


def load(source: str | Path, also: str = "") -> Weights:
    """The weights that *source* names: a file that exists, else an ``https://`` address, else a shipped name.

    An address may end in ``#sha256=HEX``; what it gives is downloaded once, into the user's cache. The hash of a
    shipped file is always checked. *also*: what else the caller would have taken, for the message. Raises
    ``ValueError`` in one line for what names nothing, and for a file that is damaged, too large or of another kind.
    """
    name = str(source)
    if exists(name):
        return _parse(_read(Path(name), name), name, Path(name))
    if name.startswith(SCHEME):
        return _downloaded(name)
    if "://" in name:
        raise ValueError(
            f"{name}: expected an address that begins with {SCHEME}, found {name.split('://')[0]}://"
        )
    if name in shipped():
        return load_shipped(name)
    near = difflib.get_close_matches(name, shipped(), 1, 0.5)
    raise ValueError(
        f"{name}: expected {also}a weights file, its {SCHEME} address or a name that has weights "
        f"({', '.join(shipped()) or 'none has any yet'}), found nothing of that name"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def exists(source: str) -> bool:
    """Whether a file or folder is there; ``False`` for what cannot be the name of one."""
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def shipped() -> dict[str, str]:
    """Names of the weights that come with the package, each with the SHA-256 of its file."""
    found: dict[str, str] = json.loads((SHIPPED / "index.json").read_text())
    return found


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A weights file of :func:`rounded` *tensors*; ``ValueError`` where *about* has not what :data:`ABOUT` lists."""
    if wrong := _wrong(about):
        raise ValueError(
            f"weights: expected what a weights file says of its network, found {wrong}"
        )
    whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
    return serialise_tensors(whole, {"sparsenet": json.dumps(about)})


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """*tensors* as a weights file holds them; ``ValueError`` naming one whose numbers fp16 does not have."""
    found = {}
    for name, value in tensors.items():
        wanted = torch.float16 if value.ndim >= 2 else torch.float32
        found[name] = value.detach().to(wanted) if value.is_floating_point() else value
        if not found[name].isfinite().all():
            raise ValueError(
                f"{name}: expected numbers within ±65504, which fp16 has, found others"
            )
    return found


def load_shipped(name: str) -> Weights:
    """The weights of a network that come with the package; ``ValueError`` in one line where it has none."""
    if name not in shipped():
        names = ", ".join(shipped()) or "none has any yet"
        raise ValueError(
            f"pretrained: expected the name of a network that has weights ({names}), found {name!r}"
        )
    path = SHIPPED / f"{name}.safetensors"
    data = _read(path, name)
    if hashlib.sha256(data).hexdigest() != shipped()[name]:
        raise ValueError(
            f"{path}: expected the weights that the package came with, found others: install it again"
        )
    return _parse(data, name, path)


def _downloaded(address: str) -> Weights:
    url, _, fragment = address.partition("#")
    pinned = re.fullmatch(r"(?:sha256=([0-9a-f]{64}))?", fragment.lower())
    if not pinned:
        raise ValueError(
            f"{address}: expected #sha256= and 64 hexadecimal digits at its end, found #{fragment}"
        )
    key = hashlib.sha256(address.encode()).hexdigest()[
        :32
    ]  # with the hash: a kept file is the one asked for
    kept = cache_folder() / "weights" / f"{key}.safetensors"
    if kept.exists():
        with suppress(ValueError):  # damaged meanwhile: fetched again
            return _checked(kept, address, pinned[1])
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            part = Path(folder) / kept.name
            _fetch(url, part, address)
            found = _checked(part, address, pinned[1])
            part.replace(kept)
    except OSError as error:
        raise ValueError(
            f"{address}: expected a cache that can be written, found: {error}"
        ) from None
    return Weights(address, kept, found.tensors, found.about)


def _fetch(url: str, part: Path, address: str) -> None:
    try:
        fetch(url, part, limit=LIMIT)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no such address can be
        raise ValueError(
            f"{address}: expected a weights file, found: {error or type(error).__name__}"
        ) from None


def _checked(path: Path, address: str, sha256: str | None) -> Weights:
    data = _read(path, address)
    found = hashlib.sha256(data).hexdigest()
    if found != (sha256 or found):
        raise ValueError(f"{address}: expected a file of this SHA-256, found {found}; not kept")
    return _parse(data, address, path)


def _read(path: Path, where: str) -> bytes:
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(
                f"{where}: expected at most {LIMIT / 2**20:.0f} MiB of weights, found more"
            )
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{where}: expected a readable weights file, found: {error.strerror}"
        ) from None


def description(data: bytes) -> Any:
    """The JSON value that a safetensors file's metadata have under ``sparsenet``; ``None`` where there is none."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get("sparsenet", "null"))


def _parse(data: bytes, where: str, path: Path) -> Weights:
    try:
        stored = parse_tensors(data)
        about = description(data)
    except (
        SafetensorError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{where}: expected a safetensors file, found another kind or damage ({error})"
        ) from None
    if wrong := _wrong(about):
        raise ValueError(
            f"{where}: expected a file from sparsenet export --format safetensors, found {wrong}"
        )
    # Copied: what safetensors gives does not begin where kernels expect a tensor to begin.
    tensors = {
        name: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in stored.items()
    }
    return Weights(where, path, tensors, about)


def _wrong(about: Any) -> str | None:
    """What :data:`ABOUT` does not allow in *about*, in one clause."""
    if not isinstance(about, dict):
        return "no description in it"
    for name, kind in ABOUT.items():
        if not _fits(about.get(name), kind):
            return f"a description whose {name!r} is missing or of another kind"
    if not all(_fits(result, RESULT) for result in about["measured"].values()):
        return "a description whose 'measured' has more than results"
    if unknown := about["preprocessing"].keys() - ABOUT["preprocessing"].keys():
        return f"a description whose 'preprocessing' has {min(unknown)!r}, which this version does not know"
    of = (result["dataset"] for result in about["measured"].values())
    if not all(name.isprintable() for name in (about["dataset"], *about["classes"], *of)):
        return "names that cannot be printed"
    network, images = about["architecture"], about["preprocessing"]
    channels = {network["in_chans"], images["channels"], len(images["mean"]), len(images["std"])}
    if (
        len(channels) > 1
        or not 1 <= images["size"] <= LARGEST
        or not all(map(math.isfinite, images["mean"]))
    ):
        return "a description whose 'preprocessing' does not fit the network"
    if not all(0 < std < math.inf for std in images["std"]):
        return "a description whose 'preprocessing' divides by nothing"
    if len(about["classes"]) != network["num_classes"]:
        return f"{len(about['classes'])} names for {network['num_classes']} classes"
    return None


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            _fits(value.get(name), inner) for name, inner in kind.items()
        )
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(entry, kind[0]) for entry in value)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
