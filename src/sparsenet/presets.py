"""Recipes by name: the paper's tables and this package's own defaults, as changes to a run's settings."""

from __future__ import annotations

from typing import Any

from sparsenet.config import RunConfig, nearest, replace
from sparsenet.data.registry import KINDS, resolve

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # arXiv:1801.05895, section 4: 300 epochs, batch 64, 0.1 -> 0.01 -> 0.001. It is the settings' own default.
    "paper": {},
    # A minute on a laptop: 1,797 handwritten digits of 8x8 pixels, where mirroring would change the class.
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
    # A short budget on images of one's own.
    "short": {
        "network": {"depth": 40, "growth_rate": 12},
        "optim": {
            "schedule": "onecycle",
            "lr": 0.2,
            "weight_decay": 5e-4,
            "label_smoothing": 0.1,
            "ema": 0.995,
        },
        "train": {"max_epoch": 30},
    },
}


def preset(name: str) -> RunConfig:
    """The settings of a preset; ``ValueError`` with the known names."""
    if name not in PRESETS:
        raise ValueError(
            f"--preset: expected one of {', '.join(PRESETS)}, found {name!r}{nearest(name, PRESETS)}"
        )
    return replace(RunConfig(), PRESETS[name])


def preset_for(dataset: str, dataset_dir: str) -> str:
    """The preset used where none is named: that of the kind of data set, else the one for images of one's own."""
    kind = KINDS.get(resolve(dataset, dataset_dir))
    return kind.preset if kind else "short"
