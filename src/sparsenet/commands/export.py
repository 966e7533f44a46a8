"""``sparsenet export``."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from sparsenet.commands.common import load_images, load_network
from sparsenet.device import choose_device
from sparsenet.display import say, warn
from sparsenet.export import FORMATS
from sparsenet.files import failure
from sparsenet.trained import Trained


def run(args: argparse.Namespace) -> int:
    format = FORMATS[args.format]
    asked = f"with --format {args.format}, found"
    if format.on_cpu_only and args.device not in ("auto", "cpu"):
        raise ValueError(f"--device: expected auto or cpu {asked} {args.device!r}")
    if args.opset is not None and args.format != "onnx":
        raise ValueError(f"--opset: expected none {asked} {args.opset}")
    trained = load_network(args, choose_device("cpu" if format.on_cpu_only else args.device))
    try:
        data = load_images(args, trained)
    except ValueError as error:
        if format.needs_data or args.dataset or args.dataset_dir:
            raise
        problem = f"compared on random inputs only, the data is not here ({error})"
        warn(f"sparsenet export: {problem}")
        data = None
    target = Path(args.out) if args.out else _default_target(args, trained)
    try:
        say(import_module(format.module).export(trained, target, data, args.opset))
    except OSError as error:  # such as a full disk
        raise OSError(f"--out: expected to write {target}, found: {failure(error)}") from error
    return 0


def _default_target(args: argparse.Namespace, trained: Trained) -> Path:
    """In the run folder, but for weights, which may lie anywhere, where the program runs.

    There it may be anybody's file, and is not replaced: raises ``ValueError``.
    """
    is_folder, of_run = FORMATS[args.format].is_folder, trained.path.is_dir()
    name = "model" if of_run and not is_folder else trained.name or "model"
    target = Path(f"{name}{'-' if is_folder else '.'}{args.format}")
    if of_run:
        return trained.path / target
    if target.exists():
        raise ValueError(f"--out: expected a name, as {target} is there already, found none")
    return target
