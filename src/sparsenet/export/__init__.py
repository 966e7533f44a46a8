"""Trained networks as files that run elsewhere. A new format is an entry here and its module."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Format:
    """What is known of a format before its module, which needs PyTorch, is imported.

    The module has a function ``export(trained, target, data, opset)`` that writes *target*, a file
    or a new folder, and returns a line to print. *data* is ``None`` where the images are not at
    hand and the format does not need them.
    """

    module: str
    help: str
    needs_data: bool = False  # the test images must be there
    on_cpu_only: bool = False
    is_folder: bool = False


FORMATS = {  # the names are also the suffixes of the files, and names of the folders
    "onnx": Format("sparsenet.export.onnx", "onnx, checked against the model", on_cpu_only=True),
    "safetensors": Format(
        "sparsenet.export.safetensors",
        "safetensors: weights in fp16, with their error on the test images",
        needs_data=True,
    ),
    "hf": Format(
        "sparsenet.export.hf",
        "hf: a folder for the Hugging Face hub, with such weights and a model card",
        needs_data=True,
        is_folder=True,
    ),
}
RUNTIMES = ("onnxruntime", "openvino")  # that run an ONNX file: sparsenet.export.runtimes


def check_target(target: Path, source: Path, format: str) -> None:
    """Raises ``ValueError`` for what could not be written, before there is work done.

    A file may not be the *source* of the weights, or have the suffix of another format. In a folder
    there may be nothing yet.
    """
    if target.resolve() == source.resolve():
        expected = "another file than the weights themselves"
        raise ValueError(f"--out: expected {expected}, found {target}")
    if (suffix := target.suffix.removeprefix(".")) in FORMATS and suffix != format:
        expected = f"a name that ends in .{format}, or --format {suffix}"
        raise ValueError(f"--out: expected {expected}, found {target}")
    what, folder = "file", target.parent
    if FORMATS[format].is_folder:
        check_empty(target, "--out")
        what, folder = "folder", target if target.exists() else folder
    if (what == "file" and target.is_dir()) or not folder.is_dir():
        raise ValueError(f"{target}: expected the name of a {what} in a folder that exists")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{target}: expected a folder that can be written, found one that cannot")


def check_empty(folder: Path, where: str) -> None:
    """Raises ``ValueError``, at *where*, if a new *folder* would replace or join what is there."""
    try:
        if folder.is_dir() and not any(folder.iterdir()):
            return
    except OSError as error:
        expected = "a folder that can be read"
        raise ValueError(f"{where}: expected {expected}, {folder}: {error.strerror}") from None
    if folder.exists() or folder.is_symlink():
        found = f"files in {folder}" if folder.is_dir() else f"a file, {folder}"
        raise ValueError(f"{where}: expected a new or an empty folder, found {found}")
