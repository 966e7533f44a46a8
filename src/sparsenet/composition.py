"""The settings of a new run, from what is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsenet import presets, zoo
from sparsenet.config import RunConfig, changed, differences, located
from sparsenet.data.config import POINTERS
from sparsenet.run import Run
from sparsenet.start import read_start
from sparsenet.validation import check_type


def compose(
    settings: Mapping[str, Any], base: RunConfig | None = None, model: str = ""
) -> RunConfig:
    """*base*, then the network *model*, then single *settings* by their names.

    Without a *base* it is the preset for the data. Trained weights in *settings* come with their
    network and the size and normalisation of their images. Raises ``ValueError`` in one line.
    """
    source = located(settings.get("weights", ""))
    if base is None:
        base = _base(settings)
    if source:
        base = read_start(source).settings(base)
    if model:
        base = dataclasses.replace(base, network=zoo.architecture(model))
    config = changed(base, settings)
    if not source:
        return config
    data = config.data
    if settings.get("in_chans") and "mean" not in settings:  # those of the weights may be others
        fitting = len(data.mean) in (1, data.in_chans)
        data = data if fitting else dataclasses.replace(data, mean=(), std=())
    return dataclasses.replace(config, data=data)


def pointed(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """*config* for the data that the settings in *given* name: ``DataConfig.pointed_at``."""
    pointers = {name: given[name] for name in POINTERS if name in given}
    for name, value in pointers.items():
        check_type(name, value, str)
    return dataclasses.replace(config, data=config.data.pointed_at(pointers))


def resumed(run: Run, asked: RunConfig) -> RunConfig:
    """The settings with which *run* is gone on with as it is *asked*.

    What is left to the images stays as they decided when it began. Raises ``ValueError`` where the
    run cannot be gone on with so.
    """
    before = run.config()
    if asked.network.stem == "auto":
        network = dataclasses.replace(asked.network, stem=before.network.stem)
        asked = dataclasses.replace(asked, network=network)
    if not asked.train.max_epoch:
        train = dataclasses.replace(asked.train, max_epoch=before.train.max_epoch)
        asked = dataclasses.replace(asked, train=train)
    if others := differences(before, asked):
        expected = "settings differ from the run's"
        raise ValueError(f"--resume {run.path}: {expected}: {'; '.join(others)}")
    return asked


def _base(settings: Mapping[str, Any]) -> RunConfig:
    if settings.get("weights"):
        return presets.preset("finetune")
    if settings.get("labels"):
        return presets.preset("short")
    data = settings.get("dataset", "auto"), settings.get("dataset_dir", "")
    return presets.preset(presets.preset_for(*data))


def name_of(config: RunConfig) -> str:
    """What is trained and when."""
    net, data = config.network, config.data
    name = data.dataset if data.dataset != "auto" else Path(data.dataset_dir).name or "digits"
    fetch = net.fetch.replace(":", "") if isinstance(net.fetch, str) else "custom"
    growth = "_".join(map(str, dict.fromkeys(net.growth_rates)))
    bottleneck = "bc-" if net.bottleneck else ""
    return f"{name}-{fetch}-{bottleneck}{net.depth}-{growth}-{datetime.now():%Y%m%d-%H%M%S}"
