"""What this machine offers: devices, precisions, implementations, optional packages, data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsenet.data.config import DataConfig
from sparsenet.data.errors import shortened, unreadable
from sparsenet.data.load import load_dataset
from sparsenet.device import choose_device, computes_in_bf16
from sparsenet.environment import Environment, environment
from sparsenet.extras import install_hint, missing_packages
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import IMPLEMENTATIONS
from sparsenet.ops.measured import MODES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Choice:
    """The implementation that ``auto`` takes for one kind of work, and the seconds it goes by."""

    taken: str
    seconds: dict[str, float] | None  # by implementation; ``None`` where nothing is measured
    busy: bool  # whether the machine was busy, so that one thread alone was timed


@dataclass(frozen=True)
class AutoChoices:
    """What ``auto`` takes on a device."""

    precision: dict[str, str]  # by kind of work: training, inference
    implementation: dict[str, dict[str, Choice]]  # by precision, then by kind of work


@dataclass(frozen=True)
class DataSummary:
    """What lies in a data folder."""

    name: str
    classes: tuple[str, ...]
    train: int  # images
    test: int
    tested_on: str  # what the test images are: "test", "validation" or "held-out"
    shape: tuple[int, ...]  # (C, H, W)
    notes: tuple[str, ...]  # what was left out, and what was taken for what


@dataclass(frozen=True)
class MachineReport:
    """What ``check`` finds; all but *extras* and *data* are by device."""

    environment: Environment
    devices: dict[str, list[str]]  # precisions in which a convolution runs, forward and backward
    implementations: dict[str, dict[str, str | None]]  # why one cannot run; ``None``: it can
    auto: dict[str, AutoChoices]
    extras: dict[str, list[str]]  # what each extra lacks
    data: DataSummary | None


def check(data: DataConfig | None = None, measure: bool = False) -> MachineReport:
    """Looks at the machine and, where some is named, at data.

    What ``auto`` goes by is measured where that has not been done, and with *measure* anew.
    Raises ``ValueError`` for data that cannot be read.
    """
    devices = {str(device): device for device in (torch.device("cpu"), choose_device("auto"))}
    reasons = {
        name: {each: dispatch.unavailable(each, device) for each in IMPLEMENTATIONS}
        for name, device in devices.items()
    }
    return MachineReport(
        environment=environment(choose_device("auto")),
        devices={name: _precisions(device) for name, device in devices.items()},
        implementations=reasons,
        auto={name: _auto_choices(device, measure) for name, device in devices.items()},
        extras=missing_packages(),
        data=_summarise_data(data) if data else None,
    )


def _summarise_data(config: DataConfig) -> DataSummary:
    data = load_dataset(dataclasses.replace(config, skip_corrupt=True))
    return DataSummary(
        name=data.name,
        classes=data.classes,
        train=len(data.train),
        test=len(data.test),
        tested_on=data.tested_on,
        shape=data.test.shape,
        notes=(*data.notes, *unreadable(data.skipped)),
    )


def _precisions(device: torch.device) -> list[str]:
    able = []
    for name, dtype in DTYPES.items():
        try:
            weight = torch.ones(8, 8, 3, 3, device=device, dtype=dtype, requires_grad=True)
            images = torch.ones(1, 8, 8, 8, device=device, dtype=dtype)
            torch.conv2d(images, weight).sum().backward()
        except (RuntimeError, TypeError):
            continue
        able.append(name)
    return able


def _auto_choices(device: torch.device, measure: bool) -> AutoChoices:
    names = ("fp32", "bf16") if computes_in_bf16(device) else ("fp32",)
    implementation = {name: _choices(device, DTYPES[name], measure) for name in names}
    precision = {
        kind: dispatch.choose_precision("auto", device, training=kind == "training")
        for kind in MODES
    }
    return AutoChoices(precision, implementation)


def _choices(device: torch.device, dtype: torch.dtype, measure: bool) -> dict[str, Choice]:
    timings = dispatch.timings(device, dtype, anew=measure)
    choices = {}
    for kind in MODES:
        training = kind == "training"
        taken = dispatch.choose("auto", device, dtype, training)
        seconds = timings.of(training) if timings else None
        choices[kind] = Choice(taken, seconds, timings is not None and timings.busy)
    return choices


def lines(report: MachineReport) -> Iterator[str]:
    """Yields the report as lines for people."""
    env = report.environment
    yield (f"sparsenet {env.sparsenet}, torch {env.torch}, Python {env.python}, {env.platform}")
    for device, precisions in report.devices.items():
        yield f"device {device}: {', '.join(precisions)}"
    threads = f"{env.threads} thread{'s' * (env.threads != 1)}"
    yield f"{env.device} is {env.device_name}; {threads} on the CPU"
    for device, reasons in report.implementations.items():
        for name, reason in reasons.items():
            yield f"{device}: {name} {f'cannot run: {reason}' if reason else 'runs'}"
    for device, auto in report.auto.items():
        yield from _lines_of_choices(device, auto)
    for extra, missing in report.extras.items():
        lacks = f"missing {', '.join(missing)}: {install_hint(extra)}"
        yield f"extra '{extra}': {lacks if missing else 'installed'}"
    if data := report.data:
        yield (
            f"data {data.name}: {data.train} training and {data.test} {data.tested_on} images, "
            f"{len(data.classes)} classes ({shortened(data.classes)}), {data.shape}"
        )
        yield from data.notes


def _lines_of_choices(device: str, auto: AutoChoices) -> Iterator[str]:
    for precision, choices in auto.implementation.items():
        for kind, choice in choices.items():
            seconds = choice.seconds or {}
            took = ", ".join(f"{name} {each:.4f} s" for name, each in seconds.items())
            how = ", on one thread of a busy machine" if choice.busy else ""
            yield (
                f"{device}, {precision}, {kind}: auto takes {choice.taken} "
                f"({took or 'not measured'}{how})"
            )
    for kind, precision in auto.precision.items():
        yield f"{device}, {kind}: auto precision is {precision}"
