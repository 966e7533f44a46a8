"""DenseNets in files of torchvision, timm and MONAI, read as what they are made of.

All three name tensors alike: ``features.denseblock1.denselayer1.conv1.weight``. MONAI's say
``.layers.conv1`` and ``class_layers.out`` for the classifier, and old files of torchvision
``conv.1``. What wraps a network in a training program puts a prefix before all names.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet import addresses, weights
from sparsenet.adoption.state_dict import SPELLINGS, load_torchvision, respelled
from sparsenet.architecture import Architecture
from sparsenet.files import read_bytes
from sparsenet.model import SparseNet

STEM = "features.conv0.weight"
# Averaged weights first: they are what is evaluated where there are some.
WRAPPED = (
    *("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model"),
    *("net", "network", "params", "module"),
)
# What reading a damaged file raises.
DAMAGE = (
    *(OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AssertionError),
    *(zipfile.BadZipFile, struct.error),
)
MOST_WRAPPERS = 4  # of a state dict in each other
LAYER = re.compile(r"features\.denseblock(\d+)\.denselayer\d+\.conv2\.weight")
OF_MONAI = ((r"(denselayer\d+)\.layers\.", r"\1."), (r"^class_layers\.out\.", "classifier."))


def read_densenet(path: Path, source: str) -> tuple[Architecture, dict[str, Tensor]]:
    """The network in a file, and its tensors as this library names them, fp32.

    Raises ``ValueError`` in one line that begins with *source*.
    """
    tensors = _named_alike(_read_tensors(path, source), source)
    architecture = _architecture(tensors, source)
    with torch.device("meta"):
        model = SparseNet(architecture)
    model = model.to_empty(device="cpu")
    try:
        load_torchvision(model, tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).partition(': ')[2]}") from None
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if problem := weights.not_numbers(state):
        raise ValueError(f"{source}: expected numbers to compute with, found {problem}")
    return architecture, state


def _read_tensors(path: Path, source: str) -> dict[str, Tensor]:
    """What a file of PyTorch or of safetensors holds; nothing in it is run."""
    try:
        if weights.is_safetensors(path):
            return dict(weights.parse(read_bytes(path, addresses.LIMIT))[0])
        _check_size(path)
        with warnings.catch_warnings(action="ignore"):
            found: Any = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{unsafe[1]} in it" if unsafe else "another kind or damage"
        raise ValueError(f"{source}: expected a file of tensors alone, found {what}") from None
    except DAMAGE as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{source}: expected a readable weights file, found: {reason}") from None
    for _ in range(MOST_WRAPPERS):
        inner = [found.get(key) for key in WRAPPED] if isinstance(found, Mapping) else []
        dicts = [each for each in inner if isinstance(each, Mapping) and each]
        if not dicts:
            break
        found = dicts[0]
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        expected = "the names and tensors of a network"
        raise ValueError(f"{source}: expected {expected}, found {type(found).__name__}")
    return dict(found)


def _check_size(path: Path) -> None:
    """Raises ``ValueError`` where a file, or what is packed in it, is too large."""
    sizes = [path.stat().st_size]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sizes.append(sum(entry.file_size for entry in archive.infolist()))
    if max(sizes) > addresses.LIMIT:
        limit = addresses.LIMIT // 2**20
        raise ValueError(f"{max(sizes) // 2**20:,} MiB, more than {limit} MiB")


def _named_alike(found: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of *found* with torchvision's names, without what wraps them."""
    stems = [name for name in found if name == STEM or name.endswith(f".{STEM}")]
    if len(stems) != 1:
        names = ", ".join(repr(name) for name in list(found)[:3]) or "nothing"
        raise ValueError(
            f"{source}: expected weights of this library, or of a DenseNet of torchvision, timm or "
            f"MONAI, found {names if not stems else ' and '.join(stems)}"
        )
    prefix = stems[0].removesuffix(STEM)
    inner = {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}
    return respelled(inner, (*SPELLINGS, *OF_MONAI), source)


def _architecture(tensors: Mapping[str, Tensor], source: str) -> Architecture:
    """What shapes say of the network, whose other tensors have then to fit it."""
    layers = Counter(match[1] for name in tensors if (match := LAYER.fullmatch(name)))
    blocks = [layers[str(number)] for number in range(1, 1 + len(layers))]
    first = "features.denseblock1.denselayer1"
    classifier = tensors.get("classifier.weight")
    try:
        stem, growth = tensors[STEM].shape, tensors[f"{first}.conv2.weight"].shape[0]
        return Architecture(
            fetch="dense",
            blocks=tuple(blocks),
            growth_rate=growth,
            bottleneck=True,
            bottleneck_factor=tensors[f"{first}.conv1.weight"].shape[0] // growth,
            stem="imagenet",
            stem_width=stem[0],
            in_chans=stem[1],
            num_classes=0 if classifier is None else classifier.shape[0],
        )
    except KeyError as error:
        raise ValueError(f"{source}: expected a DenseNet's {error}, found no such tensor") from None
    except (AttributeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{source}: expected the weights of a DenseNet, found: {error}") from None
