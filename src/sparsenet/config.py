"""The settings of a run, composed of the dataclasses that its components own."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsenet.architecture import WRITTEN, Architecture
from sparsenet.data.config import DataConfig
from sparsenet.files import is_address, parse_json, readable, user_path
from sparsenet.ops.implementations import IMPLEMENTATIONS, MEMORY
from sparsenet.schedule import OptimConfig
from sparsenet.texts import nearest, shown
from sparsenet.validation import check_settings, check_type, plain, setting
from sparsenet.yaml_files import read_yaml

MOST_BYTES = 2**24  # of a JSON file of settings, of which a topology may be a table
MOST_EPOCHS = 100_000
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@dataclass(frozen=True)
class TrainConfig:
    """How a run is driven. Raises ``ValueError`` naming the field."""

    weights: str = setting(
        "",
        "trained weights to start from: a run; a weights file, or that of a DenseNet of "
        "torchvision, timm or MONAI (.pth, .safetensors), also by an address (https://, hf://); or "
        "a name (sparsenet models)",
    )
    seed: int = setting(0, "all randomness is a function of (seed, epoch, position)")
    batch_size: int = setting(0, "images a step; 0: 64, or a quarter of fewer than 256 images")
    max_epoch: int = setting(
        300,
        "epochs in all, resumed ones included; 0: by the number of training images, 30 for "
        "50,000, and 10 to 400",
    )
    device: str = setting("auto", "auto, cpu, cuda, npu, mps, xpu or any device PyTorch knows")
    precision: str = setting(
        "auto", "auto: bf16 where the device is no slower in it", ("auto", "fp32", "bf16")
    )
    implementation: str = setting(
        "auto", "engine; auto: the fastest here", ("auto", *IMPLEMENTATIONS)
    )
    sync_statistics: str = setting(
        "auto",
        "batch statistics over all processes; auto: where each has fewer than 32 images",
        ("auto", "on", "off"),
    )
    rank_timeout: float = setting(600.0, "seconds to wait for another process before giving up")
    memory: str = setting("normal", "lean: bottlenecks are computed again in backward", MEMORY)
    capture: bool = setting(True, "replay the step as a CUDA graph where the device can")
    patience: int = setting(
        0, "epochs without a lower validation error after which the run ends; 0: all of them"
    )
    time_limit: float = setting(
        0.0, "seconds after which the run saves and ends, the reading of images with them; 0: none"
    )
    save_every: float = setting(120.0, "seconds between checkpoints within an epoch")
    track: str = setting("none", f"where to follow the run: some of {','.join(TRACKERS)}")

    def __post_init__(self) -> None:
        ranges = {
            "seed": (0, 2**63 - 1),
            "batch_size": (0, 10**6),
            "max_epoch": (0, MOST_EPOCHS),
            "patience": (0, MOST_EPOCHS),
            "time_limit": (0, 10**9),
            "save_every": (0, 10**9),
            "rank_timeout": (1, 10**6),
        }
        rules = [
            (name, least <= getattr(self, name) <= most, f"at least {least} and at most {most:,}")
            for name, (least, most) in ranges.items()
        ]
        known = self.track == "none" or not set(self.trackers) - set(TRACKERS)
        expected = f"none, or with commas some of {', '.join(TRACKERS)}"
        check_settings(self, *rules, ("track", known, expected))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in *track*, each once."""
        return () if self.track == "none" else tuple(dict.fromkeys(self.track.split(",")))


@dataclass(frozen=True)
class RunConfig:
    """Everything that is needed to run again."""

    network: Architecture = field(default_factory=Architecture)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON value, which ``from_dict`` reads back."""
        return dataclasses.asdict(self)


COMPONENTS: dict[str, type] = {
    "network": Architecture,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
DECIDED_BY_DATA = ("in_chans", "num_classes")  # fields of the network that no flag sets
LENGTH = {"max_epoch", "patience"}  # settings that say when a run ends, and change nothing before
MAY_CHANGE = {  # settings that a resumed run may have other values of
    *LENGTH,
    "time_limit",
    "save_every",
    "track",
    "device",
    "memory",
    "capture",
    "rank_timeout",
    "dataset_dir",
    "labels",
    "download",
    "cache",
}
# Settings that a resumed run may give a value where it began with ``auto``: that implementation may
# not run on another machine, and a checkpoint says itself in which precision it was trained.
WERE_AUTO = {"precision", "implementation"}


@dataclass(frozen=True)
class Setting:
    """A field of a component that a flag or a file can set."""

    component: str
    name: str
    kind: Any  # its type, as far as a JSON file can write it
    default: Any
    help: str
    choices: tuple[str, ...]

    def check(self, value: Any, source: str) -> None:
        """Raises ``ValueError`` where *value*, from the JSON file *source*, has another type."""
        check_type(f"{source}: {self.name}", value, self.kind)


def settings() -> Iterator[Setting]:
    """Yields every setting of a run that a flag can set."""
    for each in _fields():
        if each.component != "network" or each.name not in DECIDED_BY_DATA:
            yield each


def _fields() -> Iterator[Setting]:
    for component, owner in COMPONENTS.items():
        kinds = typing.get_type_hints(owner)
        if component == "network":
            kinds["fetch"] = WRITTEN["fetch"]
        for each in dataclasses.fields(owner):
            help_text, choices = each.metadata.get("help", ""), each.metadata.get("choices", ())
            yield Setting(component, each.name, kinds[each.name], each.default, help_text, choices)


def replace(base: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Returns *base* with fields of its components replaced: ``{"optim": {"lr": 0.2}}``."""
    network = dict(changes.get("network", {}))
    if "depth" in network:  # a depth replaces the base's stages, and the other way round
        network.setdefault("blocks", ())
    elif network.get("blocks", base.network.blocks):
        network["depth"] = 0
    components = {}
    for name in COMPONENTS:
        changed = network if name == "network" else changes.get(name, {})
        components[name] = dataclasses.replace(getattr(base, name), **changed)
    return RunConfig(**components)


def changed(base: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Returns *base* with single settings replaced, by their names: ``{"lr": 0.2}``.

    NumPy's numbers become Python's. Raises ``ValueError`` for a name that no setting has, and for a
    value of another type, also in *base*, which a program may have made.
    """
    base = checked(base)
    known = {each.name: each for each in settings()}
    changes: dict[str, dict[str, Any]] = {component: {} for component in COMPONENTS}
    for name, given in values.items():
        if name not in known:
            hint = nearest(name, known)
            raise ValueError(f"{name}: expected a setting, found none of that name{hint}")
        value = plain(given)
        if not callable(value):  # as a topology may be
            check_type(name, value, known[name].kind)
        if name == "weights":
            value = located(value)
        changes[known[name].component][name] = value
    return replace(base, changes)


def checked(config: RunConfig) -> RunConfig:
    """*config* in Python's own types; ``ValueError`` where a field is of another than its own."""
    components: dict[str, dict[str, Any]] = {component: {} for component in COMPONENTS}
    for each in _fields():
        value = plain(getattr(getattr(config, each.component), each.name))
        check_type(each.name, value, each.kind)
        components[each.component][each.name] = value
    return replace(config, components)


def located(source: str) -> str:
    """*source*, as an absolute path where it is a path that exists."""
    path = user_path(source)
    return str(path.absolute()) if source and path.exists() else source


def from_dict(value: Any, source: str, base: RunConfig) -> RunConfig:
    """Returns *base* with what a JSON value sets.

    Raises ``ValueError`` naming *source* and what is unknown or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(value).__name__}")
    for component, fields in value.items():
        if component not in COMPONENTS or not isinstance(fields, dict):
            expected = f"objects named {', '.join(COMPONENTS)}"
            raise ValueError(f"{source}: expected {expected}, found {component!r}")
        known = {each.name for each in dataclasses.fields(COMPONENTS[component])}
        for name in sorted(set(fields) - known):
            hint = nearest(name, known)
            raise ValueError(f"{source}: {component} has no setting {name!r}{hint}")
    for each in _fields():
        if each.name in value.get(each.component, {}):
            each.check(value[each.component][each.name], source)
    try:
        return replace(base, value)
    except ValueError as error:  # what no run can have, such as a negative rate
        raise ValueError(f"{source}: {error}") from None


def load(path: Path, base: RunConfig) -> RunConfig:
    """``SettingsFile.on`` for the file at *path*."""
    return SettingsFile.read(path).on(base)


@dataclass(frozen=True)
class SettingsFile:
    """What a JSON or YAML file says of settings; a run's config.json says what all of them were."""

    source: str
    stated: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> SettingsFile:
        """The file at *path*, or that of a run's folder; ``ValueError`` in one line."""
        if path.is_dir():
            path = path / "config.json"
        if path.suffix.lower() in (".yaml", ".yml"):
            return cls(str(path), read_yaml(path, dict[str, Any], MOST_BYTES))
        data = readable(path, MOST_BYTES)
        stated = parse_json(data, dict[str, Any], str(path))

        def once(pairs: list[tuple[str, Any]]) -> None:
            for name, count in Counter(name for name, _ in pairs).items():
                if count > 1:  # of which one would be lost
                    raise ValueError(f"{path}: expected each name once, found {shown(name)} again")

        json.loads(data, object_pairs_hook=once)
        return cls(str(path), stated)

    @property
    def is_of_a_run(self) -> bool:
        """Whether it is a run's config.json, which says what no flag can set as well."""
        decided = [each for each in _fields() if each.name in DECIDED_BY_DATA]
        return self.stated.keys() >= COMPONENTS.keys() and all(map(self._states, decided))

    def on(self, base: RunConfig) -> RunConfig:
        """Returns *base* with what the file sets; ``ValueError`` in one line where that is wrong.

        What a run's config.json leaves out, as an older version's does, was the default: nothing of
        *base* is left.
        """
        return from_dict(self.stated, self.source, RunConfig() if self.is_of_a_run else base)

    def asked(self) -> list[str]:
        """Names of settings for which the file asks for more than the default.

        Of a run's config.json it is none.
        """
        if self.is_of_a_run:
            return []
        found = [(each, self.stated[each.component]) for each in settings() if self._states(each)]
        return [each.name for each, fields in found if fields[each.name] != each.default]

    def _states(self, setting: Setting) -> bool:
        fields = self.stated.get(setting.component)
        return isinstance(fields, dict) and setting.name in fields


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Returns what resuming *old* as *new* would change and must not: ``name old -> new``."""
    changes = []
    for each in settings():
        before = getattr(getattr(old, each.component), each.name)
        after = getattr(getattr(new, each.component), each.name)
        was_auto = each.name in WERE_AUTO and before == "auto"
        if before != after and each.name not in MAY_CHANGE and not was_auto:
            changes.append(f"{each.name} {before!r} -> {after!r}")
    return changes


def recipe(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns how a network was trained, as a JSON value: what matters for the result alone."""
    left_out = MAY_CHANGE - LENGTH
    train = dataclasses.replace(config.train, weights=name_of_weights(config.train.weights))
    components = dataclasses.replace(config, train=train).to_dict()
    del components["network"]
    return {
        component: {name: value for name, value in fields.items() if name not in left_out}
        for component, fields in components.items()
    }


def name_of_weights(source: str) -> str:
    """What of *source* says which weights, and not where they lie here or how to get at them."""
    if is_address(source):
        source = re.split(r"[?#]", source)[0].rstrip("/")
    return source if source.startswith("hf://") else re.split(r"[/\\]", source)[-1]
