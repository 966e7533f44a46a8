"""What several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from sparsenet.data.config import POINTERS, READING, DataConfig
from sparsenet.data.registry import lies_in_folder
from sparsenet.data.selection import Known, Selection, select_images
from sparsenet.display import say, warn
from sparsenet.files import is_address, user_path
from sparsenet.flags import values
from sparsenet.run import Run
from sparsenet.trained import Trained, load_trained


def load_network(args: argparse.Namespace, device: torch.device) -> Trained:
    """Loads what RUN names, and warns of damaged checkpoints that were passed over."""
    trained = load_trained(args.run, args.checkpoint, device)
    for warning in trained.warnings:
        warn(f"sparsenet: warning: {warning}")
    return trained


def load_images(args: argparse.Namespace, trained: Trained) -> Selection:
    """Loads the images of the run, or those that the flags name, and prints notes about them.

    Raises ``ValueError`` where there are none, or some of a class that the network does not know.
    """
    ids = Run.open(trained.path).images() if trained.path.is_dir() else {}
    if ids and trained.about.data and not trained.about.data.are_trained_on(ids):
        raise ValueError(
            f"{trained.path}/images.safetensors: expected the images that the weights were trained "
            "on, found others; without that file the images are told by the settings"
        )
    named = any(getattr(args, name) for name in POINTERS)
    stored = _stored_data(trained)
    config = _data_config(args, trained, stored)
    place = config.dataset_dir
    if not named and place and not is_address(place) and not user_path(place).exists():
        expected = "where the images of the run lie now"
        raise ValueError(
            f"--dataset_dir: expected {expected}, found nothing at {user_path(place).absolute()}"
        )
    own = trained.path.is_dir() and _same_place(config, stored)
    known = Known(ids, trained.about.data, own, named)
    selection = select_images(config, args.split or "", trained.classes, known)
    for note in selection.notes:
        warn(f"sparsenet: {note}")
    return selection


def _same_place(config: DataConfig, other: DataConfig) -> bool:
    first, second = config.located(), other.located()
    return (first.dataset_dir, first.labels) == (second.dataset_dir, second.labels)


def _stored_data(trained: Trained) -> DataConfig:
    """The settings of the data that a run, or as far as it knows them a weights file, was given."""
    if trained.path.is_dir():
        return Run.open(trained.path).config().data
    return trained.about.data_settings()


def _data_config(args: argparse.Namespace, trained: Trained, stored: DataConfig) -> DataConfig:
    if (
        not trained.path.is_dir()
        and not args.dataset_dir
        and lies_in_folder(args.dataset or "auto")
    ):
        raise ValueError(
            "--dataset_dir: expected the folder of the test images, which a weights file does not "
            "know (or --dataset digits), found none"
        )
    given = {name: getattr(args, name) for name in POINTERS if getattr(args, name)}
    reading = values({name: text for name, text in vars(args).items() if name in READING})
    return dataclasses.replace(
        stored.pointed_at(given),
        image_size=trained.preprocessing.size,
        in_chans=trained.preprocessing.channels,
        grey_range=trained.preprocessing.grey_range,
        max_megapixels=args.max_megapixels or trained.preprocessing.max_megapixels,
        **{"download": False, **reading},
    )


def print_result(value: Any, lines: Iterable[str], as_json: bool) -> int:
    """Prints *lines*, or *value* (dataclasses, containers, numbers, text) as one JSON value."""
    if as_json:
        print(json_text(value))
    else:
        say(*lines)
    return 0


def json_text(value: Any) -> str:
    """*value* as JSON; ``ValueError`` for one with NaN or infinity, which JSON does not have."""
    try:
        return json.dumps(msgspec.to_builtins(value), indent=2, allow_nan=False)
    except ValueError:
        expected = "--json: expected finite numbers"
        raise ValueError(f"{expected}, found one that is NaN or infinity") from None
