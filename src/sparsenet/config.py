"""What a run is made of: each component owns its settings, a run composes them, flags are read off them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsenet.architecture import Architecture
from sparsenet.data.config import DataConfig
from sparsenet.ops.implementations import IMPLEMENTATIONS, MEMORY
from sparsenet.schedule import OptimConfig
from sparsenet.topology import fetch_from_file


@dataclass(frozen=True)
class TrainConfig:
    """How the run is driven. Raises ``ValueError`` naming the field."""

    seed: int = field(
        default=0, metadata={"help": "all randomness is a function of (seed, epoch, position)"}
    )
    batch_size: int = field(default=64, metadata={"help": "images a step"})
    max_epoch: int = field(default=300, metadata={"help": "epochs in all, resumed ones included"})
    device: str = field(
        default="auto",
        metadata={"help": "auto, cpu, cuda, npu, mps, xpu or any device PyTorch knows"},
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "auto: bf16 where the device is no slower in it",
            "choices": ("auto", "fp32", "bf16"),
        },
    )
    implementation: str = field(
        default="auto",
        metadata={"help": "engine; auto: the fastest here", "choices": ("auto", *IMPLEMENTATIONS)},
    )
    memory: str = field(
        default="normal",
        metadata={"help": "lean: bottlenecks are computed again in backward", "choices": MEMORY},
    )
    capture: bool = field(
        default=True, metadata={"help": "replay the step as a CUDA graph where the device can"}
    )
    time_limit: float = field(
        default=0.0, metadata={"help": "seconds after which the run ends and saves; 0: none"}
    )
    save_every: float = field(
        default=120.0, metadata={"help": "seconds between checkpoints within an epoch"}
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("max_epoch", 1),
            ("time_limit", 0),
            ("save_every", 0),
            ("seed", 0),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig:
    """Everything needed to run again."""

    network: Architecture = field(default_factory=Architecture)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value; :func:`from_dict` reads it back."""
        return dataclasses.asdict(self)


COMPONENTS: dict[str, type] = {
    "network": Architecture,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
FOUND_IN_DATA = ("in_chans", "num_classes")  # fields of the network that the dataset decides
MAY_CHANGE = (  # when resuming
    "max_epoch", "time_limit", "save_every", "device", "memory", "capture", "dataset_dir", "download",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One field of one component: its flag, help text and type exist nowhere else."""

    component: str
    name: str
    kind: Any
    default: Any
    help: str
    choices: tuple[str, ...] | None

    def parse(self, text: str) -> Any:
        """The value that *text* on a command line stands for; ``ValueError`` if it is none."""
        if self.kind is bool:
            truth = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            if text.lower() not in truth:
                raise ValueError(f"--{self.name}: expected true or false, found {text!r}")
            return truth[text.lower()]
        if self.kind in (int, float):
            try:
                number = self.kind(text)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                what = "a whole number" if self.kind is int else "a number"
                raise ValueError(f"--{self.name}: expected {what}, found {text!r}")
            return number
        if self.name == "fetch" and ".py:" in text:
            return fetch_from_file(text)
        if self.name in ("growth_rate", "blocks"):
            try:
                return tuple(int(part) for part in text.split(","))
            except ValueError:
                raise ValueError(
                    f"--{self.name}: expected whole numbers like 16,32,64, found {text!r}"
                ) from None
        return text

    def check(self, value: Any, source: str) -> None:
        """``ValueError`` where *value*, from the JSON file *source*, has another type than the setting."""
        if self.kind is bool:
            fits, expected = isinstance(value, bool), "true or false"
        elif self.kind is int:
            fits, expected = _is_whole(value), "a whole number"
        elif self.kind is float:
            fits, expected = _is_whole(value) or isinstance(value, float), "a number"
        elif self.kind is str:
            fits, expected = isinstance(value, str), "a text"
        elif self.name == "fetch":
            fits = isinstance(value, str) or (
                isinstance(value, list) and all(map(_are_whole, value))
            )
            expected = "a name or a list of lists of whole numbers"
        else:
            fits, expected = _is_whole(value) or _are_whole(value), "whole numbers"
        if not fits:
            raise ValueError(f"{source}: {self.name}: expected {expected}, found {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_whole, value))


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """``; did you mean ...?`` where a known name is near."""
    near = difflib.get_close_matches(name, list(known), 1, likeness)
    return f"; did you mean {near[0]}?" if near else ""


def settings() -> Iterator[Setting]:
    """Every setting of a run that a flag can change."""
    for component, owner in COMPONENTS.items():
        kinds = typing.get_type_hints(owner)
        for f in dataclasses.fields(owner):
            if not (component == "network" and f.name in FOUND_IN_DATA):
                text, choices = f.metadata.get("help", ""), f.metadata.get("choices")
                yield Setting(component, f.name, kinds[f.name], f.default, text, choices)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, grouped by component; flags not given leave no trace in the namespace."""
    groups = {
        name: parser.add_argument_group(f"{name} (defaults without a preset)")
        for name in COMPONENTS
    }
    for s in settings():
        default = (
            ",".join(map(str, s.default))
            if isinstance(s.default, tuple)
            else str(s.default).lower()
        )
        shown = s.help if default in ("", "0", "0.0", "false") else f"{s.help} (default {default})"
        if s.choices:
            shown = f"{shown}; one of {', '.join(map(str, s.choices))}"
        groups[s.component].add_argument(
            f"--{s.name}",
            default=argparse.SUPPRESS,
            choices=None if s.choices is None else tuple(map(str, s.choices)),
            help=shown,
            metavar="VALUE",
            **({"nargs": "?", "const": "true"} if s.kind is bool else {}),  # type: ignore[arg-type]
        )


def from_flags(flags: Mapping[str, str], base: RunConfig) -> RunConfig:
    """*base* with the settings in *flags* (name to command-line text) replaced."""
    changes: dict[str, dict[str, Any]] = {component: {} for component in COMPONENTS}
    for s in settings():
        if s.name in flags:
            changes[s.component][s.name] = s.parse(flags[s.name])
    return replace(base, changes)


def replace(base: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """*base* with fields of its components replaced: ``{"optim": {"lr": 0.2}}``."""
    network = dict(changes.get("network", {}))
    if "depth" in network:  # a depth replaces the base's stages, and the other way round
        network.setdefault("blocks", ())
    elif network.get("blocks", base.network.blocks):
        network["depth"] = 0
    merged = {**changes, "network": network}
    return RunConfig(
        **{
            name: dataclasses.replace(getattr(base, name), **merged.get(name, {}))
            for name in COMPONENTS
        }
    )


def from_dict(value: Any, source: str, base: RunConfig) -> RunConfig:
    """*base* with what a JSON value sets; ``ValueError`` naming *source* and what is unknown."""
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(value).__name__}")
    for component, fields in value.items():
        if component not in COMPONENTS or not isinstance(fields, dict):
            raise ValueError(
                f"{source}: expected objects named {', '.join(COMPONENTS)}, found {component!r}"
            )
        known = {f.name for f in dataclasses.fields(COMPONENTS[component])}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"{source}: {component} has no setting {unknown[0]!r}{nearest(unknown[0], known)}"
            )
        for s in settings():
            if s.component == component and s.name in fields:
                s.check(fields[s.name], source)
    return replace(base, value)


def load(path: Path, base: RunConfig) -> RunConfig:
    """*base* with what a JSON file sets; ``ValueError`` in one line where there is no such file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a readable configuration, found: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected JSON, found {error.msg} in line {error.lineno}"
        ) from None
    return from_dict(value, str(path), base)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What resuming *old* as *new* would change and must not: ``name old -> new``."""
    found = []
    for s in settings():
        before, after = (getattr(getattr(config, s.component), s.name) for config in (old, new))
        settled = (
            s.name == "implementation" and before == "auto"
        )  # the one it came to may not run here
        if before != after and s.name not in MAY_CHANGE and not settled:
            found.append(f"{s.name} {before!r} -> {after!r}")
    return found


def recipe(config: RunConfig) -> dict[str, dict[str, Any]]:
    """How a network was trained, as a JSON value: what matters for the result, and not where or with what it ran."""
    given = config.to_dict()
    del given["network"]
    without = set(MAY_CHANGE) - {"max_epoch"}
    return {
        part: {name: value for name, value in own.items() if name not in without}
        for part, own in given.items()
    }
