"""``sparsenet export``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from sparsenet.commands.common import data_now, load_run
from sparsenet.device import choose_device
from sparsenet.export import FORMATS
from sparsenet.trained import Trained


def run(args: argparse.Namespace) -> int:
    """Exports a run's network."""
    kind = FORMATS[args.format]
    if kind.on_cpu_only and args.device not in ("auto", "cpu"):
        raise ValueError(
            f"--device: expected auto or cpu with --format {args.format}, found {args.device!r}"
        )
    if args.opset is not None and args.format != "onnx":
        raise ValueError(f"--opset: expected none with --format {args.format}, found {args.opset}")
    trained = load_run(args, choose_device("cpu" if kind.on_cpu_only else args.device))
    try:
        data = data_now(args, trained)
    except ValueError as error:
        if kind.needs_data or args.dataset or args.dataset_dir:
            raise
        print(
            f"sparsenet export: compared on random inputs only, the data is not here ({error})",
            file=sys.stderr,
        )
        data = None
    report = import_module(kind.module).export(trained, _target(args, trained), data, args.opset)
    print(report.summary())
    return 0


def _target(args: argparse.Namespace, trained: Trained) -> Path:
    """The file to write: as asked, or by default in the run folder; for weights in the folder where one is."""
    if args.out:
        return Path(args.out)
    if trained.path.is_dir():
        return trained.path / f"model.{args.format}"
    return Path(f"{Path(urlsplit(args.run).path).stem or 'model'}.{args.format}")
