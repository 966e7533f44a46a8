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
from sparsenet.run import Run
from sparsenet.trained import Trained, load_trained


def load_run(args: argparse.Namespace, device: torch.device) -> Trained:
    trained = load_trained(args.run, args.checkpoint, device)
    for warning in trained.warnings:
        print(f"sparsenet: warning: {warning}", file=sys.stderr)
    return trained


def data_now(args: argparse.Namespace, trained: Trained) -> Dataset:
    """The run's images, or those that the flags name; ``ValueError`` where they have other classes."""

    if not (trained.path.is_dir() or args.dataset_dir or args.dataset == "digits"):
        expected = "the folder of the test images, which a weights file does not know (or --dataset digits)"
        raise ValueError(f"--dataset_dir: expected {expected}, found none")
    stored = _stored_data(trained)
    dataset = args.dataset or (
        "auto" if args.dataset_dir and stored.dataset == "digits" else stored.dataset
    )
    asked = dataclasses.replace(
        stored,
        dataset=dataset,
        dataset_dir=args.dataset_dir or ("" if dataset == "digits" else stored.dataset_dir),
        dataset_name="" if args.dataset or args.dataset_dir else stored.dataset_name,
        image_size=trained.preprocessing.size,
        in_chans=trained.preprocessing.channels,
        download=False,
    )
    data = load_dataset(asked)
    if data.classes != trained.classes:
        raise ValueError(
            f"--dataset_dir: expected the {len(trained.classes)} classes of the training {list(trained.classes)[:5]}, "
            f"found {len(data.classes)} classes {list(data.classes)[:5]}"
        )
    return data


def _stored_data(trained: Trained) -> DataConfig:
    """What a run or a weights file says of its data; a weights file only how its test images are found."""
    if trained.path.is_dir():
        return Run.open(trained.path).config().data
    told = trained.about.recipe["data"]
    return DataConfig(test_fraction=told["test_fraction"], skip_corrupt=told["skip_corrupt"])


def print_result(value: Any, lines: Iterable[str], as_json: bool) -> int:
    """Print *lines*, or *value* (dataclasses, containers, numbers, text) as one JSON value."""
    text = json.dumps(msgspec.to_builtins(value), indent=2) if as_json else "\n".join(lines)
    print(text)
    return 0
