"""Recipes by name, as changes to the default settings of a run, and any run's as a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from sparsenet.config import RunConfig, name_of_weights, replace
from sparsenet.data.registry import KINDS, resolve
from sparsenet.texts import nearest

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The settings' own defaults are the paper's (arXiv:1801.05895, section 4): 300 epochs of
    # batches of 64, at a learning rate of 0.1, then 0.01, then 0.001.
    "paper": {"train": {"batch_size": 64}},
    # A minute on a laptop: 1,797 handwritten digits of 8x8 pixels. Mirroring would change them.
    "digits": {
        "network": {"depth": 22, "growth_rate": 12},
        "data": {"dataset": "digits", "mirror": False, "shift": 1},
        "optim": {
            "schedule": "onecycle",
            "lr": 0.2,
            "weight_decay": 5e-4,
            "label_smoothing": 0.05,
            "ema": 0.97,
        },
        "train": {"max_epoch": 30, "batch_size": 64},
    },
    # ImageNet as ResNets are mostly trained on it: 90 epochs at 0.1 for each 256 images a step
    # (arXiv:1706.02677), with a cosine and smoothed labels (arXiv:1812.01187). The network is
    # sparsenet121; --blocks, --growth_rate and --fetch make its kin. The mean crop from 320 pixels
    # a side, 214, is about as large as what the network sees of it.
    "imagenet": {
        "network": {
            "blocks": (6, 12, 24, 16),
            "growth_rate": 32,
            "bottleneck": True,
            "stem": "imagenet",
        },
        "data": {"image_size": 224, "crop": 0.08, "stored_size": 320, "shift": 0},
        "optim": {"schedule": "cosine", "label_smoothing": 0.1},
        "train": {"max_epoch": 90, "batch_size": 256},
    },
    # Weights that were trained before, on a few images of one's own.
    "finetune": {
        "optim": {
            "schedule": "onecycle",
            "lr": 0.05,
            "weight_decay": 5e-4,
            "label_smoothing": 0.1,
            "ema": 0.98,
        },
        "train": {"max_epoch": 40},
    },
    # A short budget on images of one's own (docs/results.md, "In so many minutes").
    "short": {
        "network": {"depth": 22, "growth_rate": (16, 32, 64), "stem": "auto"},
        "optim": {
            "optimizer": "muon",
            "schedule": "onecycle",
            "lr": 0.2,
            "weight_decay": 5e-4,
            "label_smoothing": 0.1,
            "ema": 0.995,
        },
        "train": {"max_epoch": 0},
    },
}


def preset(name: str) -> RunConfig:
    """Returns the settings of a preset; ``ValueError`` with the known names."""
    if name not in PRESETS:
        hint = nearest(name, PRESETS)
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, found {name!r}{hint}")
    return replace(RunConfig(), PRESETS[name])


def preset_for(dataset: str, dataset_dir: str) -> str:
    """Returns the preset that is used where none is named: that of the kind of data set.

    Whatever lies in a folder of one's own is trained by the short one.
    """
    kind = KINDS.get(resolve(dataset, dataset_dir))
    return kind.preset if kind else "short"


PAPER = preset("paper")
RECIPE = (  # the settings that a recipe names where they are not the paper's
    ("train", "batch_size"),
    *(("optim", field.name) for field in dataclasses.fields(PAPER.optim)),
    ("train", "weights"),
    ("network", "dropout"),
    ("data", "image_size"),
    ("data", "mirror"),
    ("data", "shift"),
    ("data", "crop"),
    ("data", "stored_size"),
    ("data", "cutout"),
    ("data", "mixup"),
    ("data", "cutmix"),
    ("data", "trivial_augment"),
    ("data", "first_size"),
    ("data", "sampler"),
    ("data", "val_fraction"),
)


def describe_recipe(config: RunConfig, epochs: int) -> str:
    """Returns as a text how many *epochs* were trained and what is not as the paper has it."""
    planned = config.train.max_epoch or epochs
    trained = str(planned) if epochs == planned else f"{epochs} of {planned}"
    changed = list(unlike_the_paper(config, RECIPE))
    if planned == PAPER.train.max_epoch and not changed:
        return f"the paper's, {trained} epochs"
    return ", ".join([f"{trained} epoch{'' if trained == '1' else 's'}", *changed])


def unlike_the_paper(config: RunConfig, names: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Those of the settings that are not as the paper has them, as texts."""
    for component, name in names:
        value = getattr(getattr(config, component), name)
        if value != getattr(getattr(PAPER, component), name):
            yield _describe_setting(name, value)


def _describe_setting(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, str):
        texts = {"schedule": value, "optimizer": value, "weights": f"from {name_of_weights(value)}"}
        return texts.get(name, f"{words} {value}")
    if isinstance(value, tuple):
        return f"{words} {','.join(f'{each:g}' for each in value)}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
