"""The settings of a new run, from what is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsenet import presets, zoo
from sparsenet.config import RunConfig, changed, checked, differences, located
from sparsenet.data.config import POINTERS
from sparsenet.run import Run
from sparsenet.start import read_start
from sparsenet.validation import check_type


def compose(
    settings: Mapping[str, Any], base: RunConfig | None = None, model: str = ""
) -> RunConfig:
    """*base*, then the network *model*, then single *settings* by their names.

    Without a *base* it is the preset for the data. Trained weights in *settings* come with their
    network and the size and normalisation of their images, and those in *base* with what it leaves
    open of these images. Raises ``ValueError`` in one line.
    """
    base = _base(settings) if base is None else checked(base)
    source, channels = located(settings.get("weights", "")), settings.get("in_chans", 0)
    start = None
    if source:
        start = read_start(source)
        base = start.settings(base, channels)
    elif base.train.weights:
        start = read_start(located(base.train.weights))
        base = start.completed(base, channels)
    if model:
        base = dataclasses.replace(base, network=zoo.architecture(model))
    config = changed(base, settings)
    if start and config.network.stem == "auto":
        network = dataclasses.replace(config.network, stem=start.architecture.stem)
        config = dataclasses.replace(config, network=network)
    check_effect(config, settings)
    return config


def check_effect(config: RunConfig, given: Iterable[str]) -> None:
    """Raises ``ValueError`` where one of the settings *given*, by their names, changes nothing."""
    network, schedule = config.network, config.optim.schedule
    expected = {
        "drop_1": ("schedule step", f"schedule {schedule}", schedule == "step"),
        "drop_2": ("schedule step", f"schedule {schedule}", schedule == "step"),
        "reduction": ("aggregation concat", "aggregation sum", network.aggregation == "concat"),
        "bottleneck_factor": ("bottleneck", "none", network.bottleneck),
    }
    for name in given:
        needed, found, has_effect = expected.get(name, ("", "", True))
        if not has_effect:
            raise ValueError(
                f"--{name}: expected --{needed}, without which it has no effect, found {found}"
            )


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


def beneath(
    stated: RunConfig, settings: Mapping[str, Any], base: RunConfig | None = None
) -> RunConfig:
    """What the settings of a file go on top of, where they and *settings* come to *stated*.

    It is *base*, or else the preset for the data, with the network of weights that the file names.
    """
    named = {name: getattr(stated.data, name) for name in ("dataset", "dataset_dir", "labels")}
    base = base or _base({**named, "weights": stated.train.weights, **settings})
    if stated.train.weights and "weights" not in settings:
        channels = settings.get("in_chans", stated.data.in_chans)
        base = read_start(located(stated.train.weights)).settings(base, channels)
    return base


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
