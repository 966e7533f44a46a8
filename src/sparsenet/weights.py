"""Weights files: all that is needed to use a trained network, in one safetensors file.

Matrices and convolutions are fp16 in the file, vectors fp32 and counters integers; a network gets
them back in fp32. The file's metadata hold an :class:`About` as JSON under ``sparsenet``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet.data.images import Preprocessing
from sparsenet.downloads import ChecksumError, DownloadError, download
from sparsenet.files import cache_folder

SHIPPED = Path(__file__).with_name("pretrained")  # NAME.safetensors; index.json: NAME to SHA-256
SCHEME = "https://"
LIMIT = 512 * 2**20  # bytes of a weights file
MAX_IMAGE_SIZE = 4096  # pixels


@dataclass(frozen=True)
class Measured:
    """What a network measures on test images; errors are percentages."""

    error: float
    top5_error: float
    images: int
    dataset: str


@dataclass(frozen=True)
class TestSplit:
    """The part of a recipe that decides which images are the test images."""

    test_fraction: float
    skip_corrupt: bool


@dataclass(frozen=True)
class About:
    """What a weights file says of its network."""

    sparsenet: str  # the version that trained it
    architecture: dict[str, Any]  # the fields of Architecture
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    dataset: str
    recipe: dict[str, dict[str, Any]]  # sparsenet.config.recipe
    epoch: int
    # By precision, the results of exactly the numbers in the file; a run has none.
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def test_split(self) -> TestSplit:
        """Raises ``ValueError`` where the recipe does not say it."""
        return msgspec.convert(self.recipe.get("data"), TestSplit)


@dataclass(frozen=True)
class Weights:
    """The content of a weights file that has been checked."""

    source: str  # what the user named
    path: Path
    tensors: dict[str, Tensor]  # a state dict; what was fp16 is fp32 again
    about: About


def load(source: str | Path, alternatives: str = "") -> Weights:
    """Loads what *source* names: a file that exists, else an https address, else a shipped name.

    An address may end in ``#sha256=HEX``; it is downloaded once, into the user's cache. The hash of
    a shipped file is always checked. The error for a source that names nothing also lists
    *alternatives*, other things that the caller accepts.

    Raises ``ValueError`` in one line for a source that names nothing, and for a file that is
    damaged, too large or of another kind.
    """
    name = str(source)
    if exists(name):
        return _parse(_read(Path(name), name), name, Path(name))
    if name.startswith(SCHEME):
        return _load_address(name)
    scheme, separator, _ = name.partition("://")
    if separator:
        expected = f"an address that begins with {SCHEME}"
        raise ValueError(f"{name}: expected {expected}, found {scheme}://")
    if name in shipped():
        return load_shipped(name)
    near = difflib.get_close_matches(name, shipped(), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{name}: expected {alternatives}a weights file, its {SCHEME} address or a name that has "
        f"weights ({_shipped_names()}), found nothing of that name{hint}"
    )


def load_shipped(name: str) -> Weights:
    """Loads the weights of a network that come with the package.

    Raises ``ValueError`` in one line where it has none.
    """
    if name not in shipped():
        expected = f"the name of a network that has weights ({_shipped_names()})"
        raise ValueError(f"pretrained: expected {expected}, found {name!r}")
    path = SHIPPED / f"{name}.safetensors"
    return _parse(_read(path, str(path), shipped()[name]), name, path)


def shipped() -> dict[str, str]:
    """Names of the weights that come with the package, each with the SHA-256 of its file."""
    index: dict[str, str] = json.loads((SHIPPED / "index.json").read_text())
    return index


def _shipped_names() -> str:
    return ", ".join(shipped()) or "none has any yet"


def exists(source: str) -> bool:
    """Whether a file or folder is there; ``False`` for what cannot be the name of one."""
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The *tensors* of a state dict in the precisions of a weights file.

    Raises ``ValueError`` naming a tensor with numbers that fp16 does not have.
    """
    state = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            value = value.detach().to(torch.float16 if value.ndim >= 2 else torch.float32)
        if not value.isfinite().all():
            expected = "numbers within ±65504, which fp16 has"
            raise ValueError(f"{name}: expected {expected}, found others")
        state[name] = value
    return state


def pack(tensors: Mapping[str, Tensor], about: About) -> bytes:
    """The content of a weights file with :func:`rounded` tensors."""
    try:
        _check(about)
    except ValueError as error:
        raise ValueError(f"weights: expected a network to describe, found {error}") from None
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    return serialise_tensors(contiguous, {"sparsenet": msgspec.json.encode(about).decode()})


def description(data: bytes) -> Any:
    """The JSON value under ``sparsenet`` in a safetensors file's metadata, ``None`` without one."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = msgspec.json.decode(data[8:end], type=dict[str, dict[str, Any]])
    return msgspec.json.decode(header.get("__metadata__", {}).get("sparsenet", "null"))


def _load_address(address: str) -> Weights:
    url, _, fragment = address.partition("#")
    checksum = fragment.lower()
    if not re.fullmatch(r"(sha256=[0-9a-f]{64})?", checksum):
        expected = "#sha256= and 64 hexadecimal digits at its end"
        raise ValueError(f"{address}: expected {expected}, found #{fragment}")
    # With the checksum in the key, the file in the cache is the one that was asked for.
    key = hashlib.sha256(address.encode()).hexdigest()[:32]
    cached = cache_folder() / "weights" / f"{key}.safetensors"
    if cached.exists():
        with suppress(ValueError):  # damaged meanwhile: downloaded again
            sha256 = checksum.removeprefix("sha256=")
            return _parse(_read(cached, address, sha256), address, cached)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            file = download(url, Path(folder) / cached.name, checksum, LIMIT)
            weights = _parse(_read(file, address), address, cached)
            file.replace(cached)
    except ChecksumError as error:
        raise ValueError(f"{address}: {error}") from None
    except DownloadError as error:
        raise ValueError(f"{address}: expected a weights file, found: {error}") from None
    except OSError as error:
        expected = "a cache that can be written"
        raise ValueError(f"{address}: expected {expected}, found: {error}") from None
    return weights


def _read(path: Path, source: str, sha256: str = "") -> bytes:
    try:
        if path.stat().st_size > LIMIT:
            expected = f"at most {LIMIT / 2**20:.0f} MiB of weights"
            raise ValueError(f"{source}: expected {expected}, found more")
        data = path.read_bytes()
    except OSError as error:
        expected = "a readable weights file"
        raise ValueError(f"{source}: expected {expected}, found: {error.strerror}") from None
    if sha256 and (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{source}: expected SHA-256 {sha256}, found {actual}: install it again")
    return data


def _parse(data: bytes, source: str, path: Path) -> Weights:
    try:
        stored = parse_tensors(data)
        value = description(data)
    except (SafetensorError, LookupError, RecursionError, TypeError, ValueError) as error:
        problem = f"another kind or damage ({error})"
        raise ValueError(f"{source}: expected a safetensors file, found {problem}") from None
    try:
        about = _parse_about(value)
    except ValueError as error:
        expected = "a file from sparsenet export --format safetensors"
        raise ValueError(f"{source}: expected {expected}, found {error}") from None
    tensors = {}
    for name, tensor in stored.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # Copied because what safetensors gives does not begin where kernels expect a tensor to.
        tensors[name] = tensor.to(dtype, copy=True)
    return Weights(source, path, tensors, about)


def _parse_about(value: Any) -> About:
    if not isinstance(value, dict):
        raise ValueError("no description in it")
    try:
        about = msgspec.convert(value, About)
    except msgspec.ValidationError as error:
        raise ValueError(f"a description of another kind: {error}") from None
    known = {field.name for field in dataclasses.fields(Preprocessing)}
    if unknown := value["preprocessing"].keys() - known:
        name = min(unknown)
        raise ValueError(f"'preprocessing' with {name!r}, which this version does not know")
    _check(about)
    return about


def _check(about: About) -> None:
    """Raises ``ValueError`` with a clause on what does not fit together in a file's *about*."""
    architecture, images = about.architecture, about.preprocessing
    channels = {architecture.get("in_chans"), images.channels, len(images.mean), len(images.std)}
    fits = len(channels) == 1 and 1 <= images.size <= MAX_IMAGE_SIZE
    if not fits or not all(map(math.isfinite, images.mean)):
        raise ValueError("'preprocessing' that does not fit the network")
    if not all(0 < std < math.inf for std in images.std):
        raise ValueError("'preprocessing' that divides by nothing")
    classes = architecture.get("num_classes")
    if len(about.classes) != classes:
        raise ValueError(f"{len(about.classes)} names for {classes} classes")
    if "fp32" not in about.measured:
        raise ValueError("no 'measured' in fp32")
    datasets = [about.dataset, *(measured.dataset for measured in about.measured.values())]
    if not all(name.isprintable() for name in (*about.classes, *datasets)):
        raise ValueError("names that cannot be printed")
    _ = about.test_split
