"""What several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from sparsenet.data.config import POINTERS, DataConfig
from sparsenet.data.registry import lies_in_folder
from sparsenet.data.selection import Known, Selection, select_images
from sparsenet.run import Run
from sparsenet.trained import Trained, load_trained


def load_network(args: argparse.Namespace, device: torch.device) -> Trained:
    """Loads what RUN names, and warns of damaged checkpoints that were passed over."""
    trained = load_trained(args.run, args.checkpoint, device)
    for warning in trained.warnings:
        print(f"sparsenet: warning: {warning}", file=sys.stderr)
    return trained


def load_images(args: argparse.Namespace, trained: Trained) -> Selection:
    """Loads the images of the run, or those that the flags name, and prints notes about them.

    Raises ``ValueError`` where there are none, or some of a class that the network does not know.
    """
    ids = Run.open(trained.path).images() if trained.path.is_dir() else {}
    own = not any(getattr(args, name) for name in POINTERS)
    known = Known(ids, trained.about.data, own)
    selection = select_images(_data_config(args, trained), args.split, trained.classes, known)
    for note in selection.notes:
        print(f"sparsenet: {note}", file=sys.stderr)
    return selection


def _data_config(args: argparse.Namespace, trained: Trained) -> DataConfig:
    is_run = trained.path.is_dir()
    if not is_run and not args.dataset_dir and lies_in_folder(args.dataset or "auto"):
        raise ValueError(
            "--dataset_dir: expected the folder of the test images, which a weights file does not "
            "know (or --dataset digits), found none"
        )
    if is_run:
        stored = Run.open(trained.path).config().data
    else:  # a weights file knows only how its test images were found
        recipe = trained.about.recipe["data"]
        stored = DataConfig(
            **{name: recipe[name] for name in ("test_fraction", "val_fraction", "skip_corrupt")}
        )
    given = {name: getattr(args, name) for name in POINTERS if getattr(args, name)}
    return dataclasses.replace(
        stored.pointed_at(given),
        image_size=trained.preprocessing.size,
        in_chans=trained.preprocessing.channels,
        download=False,
    )


def print_result(value: Any, lines: Iterable[str], as_json: bool) -> int:
    """Prints *lines*, or *value* (dataclasses, containers, numbers, text) as one JSON value."""
    text = json.dumps(msgspec.to_builtins(value), indent=2) if as_json else "\n".join(lines)
    print(text)
    return 0
