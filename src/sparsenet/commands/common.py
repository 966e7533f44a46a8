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

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset
from sparsenet.data.load import load_dataset
from sparsenet.data.registry import lies_in_folder
from sparsenet.run import Run
from sparsenet.trained import Trained, load_trained


def load_network(args: argparse.Namespace, device: torch.device) -> Trained:
    """Loads what RUN names, and warns of damaged checkpoints that were passed over."""
    trained = load_trained(args.run, args.checkpoint, device)
    for warning in trained.warnings:
        print(f"sparsenet: warning: {warning}", file=sys.stderr)
    return trained


def load_images(args: argparse.Namespace, trained: Trained) -> Dataset:
    """Loads the images of the run, or those that the flags name.

    Raises ``ValueError`` where they have other classes than the network.
    """
    data = load_dataset(_data_config(args, trained))
    if data.classes != trained.classes:
        raise ValueError(
            f"--dataset_dir: expected the {len(trained.classes)} classes of the training "
            f"{list(trained.classes)[:5]}, found {len(data.classes)} classes "
            f"{list(data.classes)[:5]}"
        )
    return data


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
            test_fraction=recipe["test_fraction"], skip_corrupt=recipe["skip_corrupt"]
        )
    dataset = args.dataset or stored.dataset
    if not args.dataset and args.dataset_dir and not lies_in_folder(dataset):
        dataset = "auto"
    folder = args.dataset_dir or (stored.dataset_dir if lies_in_folder(dataset) else "")
    return dataclasses.replace(
        stored,
        dataset=dataset,
        dataset_dir=folder,
        dataset_name="" if args.dataset or args.dataset_dir else stored.dataset_name,
        image_size=trained.preprocessing.size,
        in_chans=trained.preprocessing.channels,
        download=False,
    )


def print_result(value: Any, lines: Iterable[str], as_json: bool) -> int:
    """Prints *lines*, or *value* (dataclasses, containers, numbers, text) as one JSON value."""
    text = json.dumps(msgspec.to_builtins(value), indent=2) if as_json else "\n".join(lines)
    print(text)
    return 0
