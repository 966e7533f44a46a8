"""What this machine offers: devices, precisions, extras, data."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from sparsenet.data.config import DataConfig
from sparsenet.data.load import load_dataset
from sparsenet.device import choose_device, computes_in_bf16
from sparsenet.environment import environment
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import IMPLEMENTATIONS
from sparsenet.ops.measured import MODES

EXTRAS = {
    "train": ("filelock", "matplotlib", "PIL", "pyarrow", "rich", "sklearn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "triton": ("triton",),
}


def check(dataset_dir: str = "", measure: bool = False) -> dict[str, Any]:
    """A JSON value: environment, devices with their precisions, extras with what they lack, the data found.

    What ``auto`` goes by is measured where that has not been done, and with *measure* anew.
    """
    devices = dict.fromkeys([torch.device("cpu"), choose_device("auto")])
    missing = {
        extra: [name for name in names if importlib.util.find_spec(name) is None]
        for extra, names in EXTRAS.items()
    }
    found: dict[str, Any] = {
        "environment": environment(choose_device("auto")),
        "devices": {str(device): _precisions(device) for device in devices},
        "implementations": {
            str(device): {name: dispatch.unavailable(name, device) for name in IMPLEMENTATIONS}
            for device in devices
        },
        "auto": {str(device): _auto(device, measure) for device in devices},
        "extras": {
            extra: {"installed": not names, "missing": names} for extra, names in missing.items()
        },
    }
    if dataset_dir:
        data = load_dataset(DataConfig(dataset_dir=dataset_dir))
        found["data"] = {
            "name": data.name, "classes": list(data.classes), "train": len(data.train), "test": len(data.test),
            "shape": list(data.train.pixels.shape[1:]),
        }  # fmt: skip
    return found


def _auto(device: torch.device, measure: bool) -> dict[str, Any]:
    """By kind of work the precision that is taken; by precision what takes how long, in seconds, and which is taken."""
    found: dict[str, Any] = {"precision": {}, "implementation": {}}
    dtypes = {"fp32": torch.float32} | (
        {"bf16": torch.bfloat16} if computes_in_bf16(device) else {}
    )
    for precision, dtype in dtypes.items():
        figures = dispatch.timings(device, dtype, anew=measure)
        found["implementation"][precision] = {
            kind: {
                "taken": dispatch.choose("auto", device, dtype, kind == "training"),
                "seconds": figures and figures.of(kind == "training"),
                "busy": bool(figures and figures.busy),
            }
            for kind in MODES
        }
    found["precision"] = {
        kind: dispatch.choose_precision("auto", device, training=kind == "training")
        for kind in MODES
    }
    return found


def _precisions(device: torch.device) -> list[str]:
    """Precisions in which a convolution runs, forward and backward."""
    able = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        try:
            weight = torch.ones(8, 8, 3, 3, device=device, dtype=dtype, requires_grad=True)
            torch.conv2d(
                torch.ones(1, 8, 8, 8, device=device, dtype=dtype), weight
            ).sum().backward()
            able.append(name)
        except (RuntimeError, TypeError):
            continue
    return able


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    env = found["environment"]
    shown = [
        f"sparsenet {env['sparsenet']}, torch {env['torch']}, Python {env['python']}, {env['platform']}",
        *(
            f"device {name}: {', '.join(precisions)}"
            for name, precisions in found["devices"].items()
        ),
        f"{env['device_name']}, {env['threads']} threads",
    ]
    for device, reasons in found["implementations"].items():
        shown += [
            f"{device}: {name} {f'cannot run: {why}' if why else 'runs'}"
            for name, why in reasons.items()
        ]
    shown += [line for device, auto in found["auto"].items() for line in _choices(device, auto)]
    for extra, state in found["extras"].items():
        lacks = f"missing {', '.join(state['missing'])}: pip install 'sparsenet[{extra}]'"
        shown.append(f"extra '{extra}': {'installed' if state['installed'] else lacks}")
    if data := found.get("data"):
        shown.append(
            f"data {data['name']}: {data['train']} training and {data['test']} test images, "
            f"{len(data['classes'])} classes, {data['shape']}"
        )
    return shown


def _choices(device: str, auto: dict[str, Any]) -> Iterator[str]:
    """``cpu, fp32, training: auto takes native (native 0.0120 s, shared 0.0210 s, reference 0.0240 s)``."""
    for precision, kinds in auto["implementation"].items():
        for kind, choice in kinds.items():
            seconds = choice["seconds"] or {}
            took = (
                ", ".join(f"{name} {each:.4f} s" for name, each in seconds.items())
                or "not measured"
            )
            how = ", on one thread of a busy machine" if choice["busy"] else ""
            yield f"{device}, {precision}, {kind}: auto takes {choice['taken']} ({took}{how})"
    for kind, precision in auto["precision"].items():
        yield f"{device}, {kind}: auto precision is {precision}"
