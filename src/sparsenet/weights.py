"""Weights files: all that is needed to use a trained network, in one safetensors file.

Matrices and convolutions are fp16 in the file, vectors fp32 and counters integers; a network gets
them back in fp32. The file's metadata hold an ``About`` as JSON under ``sparsenet``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from sparsenet import addresses
from sparsenet.addresses import FILE, HUB, LIMIT, SCHEME
from sparsenet.data.config import DataConfig
from sparsenet.data.identity import DataRecord
from sparsenet.data.preprocessing import RULE, Preprocessing
from sparsenet.data.tree import SUFFIXES
from sparsenet.files import parse_json, read_bytes, read_json, with_home
from sparsenet.texts import nearest, shown
from sparsenet.validation import LONGEST_NAME, Count, Name, Percent, Value

SHIPPED = Path(__file__).with_name("pretrained")  # NAME.safetensors; index.json: NAME to SHA-256
CONFIG = "config.json"  # beside FILE in a folder as the hub has them
Key = Annotated[str, msgspec.Meta(pattern=r"^\w+$", max_length=100)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256
DTYPES = {  # of tensors that can be compared and computed with
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
MOST_HEADER = 2**24  # bytes; a topology may be a table


@dataclass(frozen=True)
class Measured:
    """What a network measures on test images; errors are percentages."""

    error: Percent
    top5_error: Percent
    images: Count
    dataset: Name
    split: Name = "test"  # what these images are: also "validation", "held-out", "training" or ""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its network."""

    sparsenet: Name  # the version that trained it
    architecture: dict[Name, Value]  # the fields of Architecture
    preprocessing: Preprocessing
    classes: tuple[Name, ...]
    dataset: Name
    recipe: dict[Name, dict[Name, Value]]  # sparsenet.config.recipe
    data: DataRecord | None = None  # of the images; older versions did not record them

    def data_settings(self) -> DataConfig:
        """How the test images were found, as far as it says."""
        said: dict[str, Any] = self.recipe["data"]
        known = ("test_fraction", "val_fraction", "skip_corrupt")
        return DataConfig(**{name: said[name] for name in known if name in said})

    def problem(self) -> str | None:
        """What in it does not fit together, in one clause."""
        images, classes = self.preprocessing, self.architecture.get("num_classes")
        if images.channels != self.architecture.get("in_chans"):
            return "'preprocessing' that does not fit the network"
        if problem := images.problem():
            return f"'preprocessing' with {problem}"
        if len(self.classes) != classes:
            return f"{len(self.classes)} names for {classes} classes"
        return None


@dataclass(frozen=True)
class About(Description):
    """What a weights file says of its network."""

    epoch: Count = field(kw_only=True)
    # By precision, the results of exactly the numbers in the file; a run has none.
    measured: dict[Name, Measured] = field(default_factory=dict)
    rule: str = RULE  # for people: how an image becomes what the network takes


@dataclass(frozen=True)
class Weights:
    """The content of a weights file that has been checked."""

    source: str  # what the user named
    path: Path
    tensors: dict[str, Tensor]  # a state dict; what was fp16 is fp32 again
    about: About


def load(source: str | Path, alternatives: str = "") -> Weights:
    """Loads what *source* names: a file that exists, else an address, else a shipped name.

    A folder as the Hugging Face hub has it stands for the ``FILE`` in it.

    An address is one that ``addresses.fetch`` takes, and may end in ``#sha256=HEX``. The hashes
    of a shipped file and of one in the cache are always checked. The error for a source that names
    nothing also lists *alternatives*, other things that the caller accepts.

    Raises ``ValueError`` in one line for a source that names nothing, and for a file that is
    damaged, too large or of another kind.
    """
    name = with_home(str(source))
    scheme, separator, _ = name.partition("://")
    if in_folder(name):
        return _load_folder(Path(name), name)
    if os.path.exists(name):  # noqa: PTH110 - where pathlib raises for what no file can be called
        return _load_file(Path(name), name)
    if addresses.can_fetch(name):
        return _load_address(name)
    if separator:
        expected = f"an address that begins with {SCHEME} or {HUB}"
        raise ValueError(f"{name}: expected {expected}, found {scheme}://")
    if name in shipped():
        return load_shipped(name)
    hint = nearest(name, shipped())
    raise ValueError(
        f"{name}: expected {alternatives}a weights file, its {SCHEME} address or a name that has "
        f"weights ({', '.join(shipped())}), found nothing of that name{hint}"
    )


def in_folder(path: Path | str) -> bool:
    """Whether *path* is a folder of weights as the hub has them, and not a run's."""
    there, *of_run = (
        os.path.exists(os.path.join(path, name))  # noqa: PTH110, PTH118 - pathlib raises
        for name in (FILE, "checkpoints", "train.log", "metrics.csv", "result.json")
    )
    return there and not any(of_run)


def load_shipped(name: str) -> Weights:
    """Loads weights that come with the package; ``ValueError`` where a network has none."""
    if name not in shipped():
        expected = f"the name of a network that has weights ({', '.join(shipped())})"
        raise ValueError(f"pretrained: expected {expected}, found {name!r}")
    path = SHIPPED / f"{name}.safetensors"
    return dataclasses.replace(_load_file(path, str(path), shipped()[name]), source=name)


def shipped() -> dict[str, str]:
    """Names of the weights that come with the package, each with the SHA-256 of its file."""
    return read_json(SHIPPED / "index.json", dict[Key, Digest])


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The *tensors* of a state dict in the precisions of a weights file.

    Raises ``ValueError`` naming a tensor with numbers that fp16 does not have.
    """
    state = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            value = value.detach().to(torch.float16 if value.ndim >= 2 else torch.float32)
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected numbers within ±65504, those of fp16, found others")
        state[name] = value
    return state


def pack(tensors: Mapping[str, Tensor], about: About) -> bytes:
    """The content of a weights file with ``rounded`` tensors.

    Raises ``ValueError`` for what ``load`` would refuse in *about*.
    """
    if problem := _problem(about):
        raise ValueError(f"weights: expected a network that a file can describe, found {problem}")
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    # One entry alone, as safetensors writes several in an order of chance.
    return serialise_tensors(contiguous, {"sparsenet": msgspec.json.encode(about).decode()})


def parse(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """The tensors in a safetensors file, and the JSON value under ``sparsenet`` in its metadata.

    That is ``None`` where there is none. Raises ``ValueError`` for a damaged file.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if end > MOST_HEADER:
        raise ValueError(f"a header of {end:,} bytes, more than {MOST_HEADER:,}")
    try:
        # Copied because what safetensors gives does not begin where kernels expect a tensor to.
        tensors = {name: tensor.clone() for name, tensor in parse_tensors(data).items()}
    except (SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)[:400]) from None  # it may quote all that it has read
    for name, tensor in tensors.items():
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"a tensor with a name that none here has, {shown(name)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is of {tensor.dtype}, which no network here has")
    header = parse_json(data[8:end], dict[str, dict[str, Any]], "its header")
    text = header.get("__metadata__", {}).get("sparsenet", "null")
    return tensors, parse_json(text, object, "its description")


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor of another shape or type than *expected*, missing or left over.

    The numbers of batches of batch norms may be missing, as older versions counted none.
    """

    def shape_and_type(tensors: Mapping[str, Tensor], name: str) -> tuple[Any, ...] | None:
        return (*tensors[name].shape, tensors[name].dtype) if name in tensors else None

    for name in sorted(expected.keys() | found.keys()):
        have, want = shape_and_type(found, name), shape_and_type(expected, name)
        if have != want and not (have is None and name.endswith("num_batches_tracked")):
            return f"{name} of {have} instead of {want}"
    return None


def not_numbers(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of the *tensors* that no network can compute with, in one clause, or ``None``."""
    for name, tensor in tensors.items():
        # In fp32, as networks get them.
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            return f"NaN or infinity in {name}"
        if name.endswith("running_var") and (tensor < 0).any():
            return f"a negative variance in {name}"
    return None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors; ``OSError`` where it cannot be read."""
    with path.open("rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= MOST_HEADER


def is_our_own(path: Path) -> bool:
    """Whether a file says that it is of this library; ``ValueError`` where it cannot be read."""
    try:
        if not is_safetensors(path):
            return False
        with path.open("rb") as file:
            header = file.read(8 + int.from_bytes(file.read(8), "little"))
    except OSError as error:
        found = error.strerror or error
        raise ValueError(f"{path}: expected a readable weights file, found: {found}") from None
    return b'"sparsenet"' in header


def _load_folder(folder: Path, source: str) -> Weights:
    """The weights of a folder, whose ``CONFIG`` must not say anything else of them."""
    stored, own = _parse_file(folder / FILE, source)
    found = _checked(stored, own, source)
    if (config := folder / CONFIG).exists():
        said = read_json(config, dict[str, Any])
        for name, value in own.items():
            if said.get(name, value) != value:
                raise ValueError(
                    f"{config}: expected what {FILE} says of itself, found another {name!r}; what "
                    "is changed here has no effect on the weights"
                )
    return Weights(source, folder / FILE, *found)


def _load_address(address: str) -> Weights:
    weights, path = addresses.fetch(address, _load_file)
    return dataclasses.replace(weights, path=path)


def _load_file(path: Path, source: str, sha256: str = "") -> Weights:
    return Weights(source, path, *_checked(*_parse_file(path, source, sha256), source))


def _parse_file(path: Path, source: str, sha256: str = "") -> tuple[dict[str, Tensor], Any]:
    """What ``parse`` finds in a file."""
    try:
        data = read_bytes(path, LIMIT)
    except OSError as error:
        found = error.strerror or error
        raise ValueError(f"{source}: expected a readable weights file, found: {found}") from None
    if sha256 and (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{source}: expected SHA-256 {sha256}, found {actual}: install it again")
    try:
        return parse(data)
    except ValueError as error:
        problem = _other_kind(path) or f"another kind or damage ({error})"
        raise ValueError(f"{source}: expected a safetensors file, found {problem}") from None


def _other_kind(path: Path) -> str:
    """What a file is by its name, where people give such a file instead of weights, and advice."""
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return "an ONNX file; give the run or weights that it was exported from"
    return "an image; the network comes before the images" if suffix in SUFFIXES else ""


def _checked(
    stored: Mapping[str, Tensor], value: Any, source: str
) -> tuple[dict[str, Tensor], About]:
    """A state dict in fp32 and what is said of it."""
    try:
        about = _parse_about(value)
    except ValueError as error:
        expected = "a file from sparsenet export --format safetensors"
        raise ValueError(f"{source}: expected {expected}, found {error}") from None
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in stored.items()
    }
    if wrong := not_numbers(tensors):
        raise ValueError(f"{source}: expected numbers to compute with, found {wrong}")
    return tensors, about


def _parse_about(value: Any) -> About:
    if not isinstance(value, dict):
        raise ValueError("no description in it")
    about = msgspec.convert(value, About)
    known = {field.name for field in dataclasses.fields(Preprocessing)}
    if unknown := value["preprocessing"].keys() - known:
        name = min(unknown)
        raise ValueError(f"'preprocessing' with {name!r}, which this version does not know")
    if problem := _problem(about):
        raise ValueError(problem)
    return about


def _problem(about: About) -> str | None:
    """What in a file's description does not fit together, in one clause."""
    if problem := about.problem():
        return problem
    data = about.recipe.get("data", {})
    test_images = type(data.get("test_fraction")), type(data.get("skip_corrupt"))
    fraction = data.get("val_fraction", 0.0)
    datasets = [about.dataset, *(measured.dataset for measured in about.measured.values())]
    for name in (*about.classes, *datasets):
        if any(unicodedata.category(each) in ("Cc", "Cs") for each in name):
            return f"the name {shown(name)}, which has what is no character of a text"
    if "fp32" not in about.measured:
        return "no 'measured' in fp32"
    if test_images != (float, bool) or not isinstance(fraction, float) or not 0 <= fraction < 1:
        return "a 'recipe' that does not say which images are the test images"
    return None
