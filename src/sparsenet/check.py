"""What this machine offers: devices, precisions, extras, data."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from sparsenet import ops
from sparsenet.data import DataConfig, load_dataset
from sparsenet.device import choose_device
from sparsenet.run import environment

EXTRAS = {
    "train": ("filelock", "matplotlib", "PIL", "pyarrow", "rich", "sklearn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "triton": ("triton",),
}


def check(dataset_dir: str = "") -> dict[str, Any]:
    """A JSON value: environment, devices with their precisions, extras with what they lack, the data found."""
    devices = dict.fromkeys([torch.device("cpu"), choose_device("auto")])
    missing = {
        extra: [name for name in names if importlib.util.find_spec(name) is None] for extra, names in EXTRAS.items()
    }
    found: dict[str, Any] = {
        "environment": environment(choose_device("auto")),
        "devices": {str(device): _precisions(device) for device in devices},
        "implementations": {
            str(device): {name: ops.unavailable(name, device) for name in ops.IMPLEMENTATIONS} for device in devices
        },
        "extras": {extra: {"installed": not names, "missing": names} for extra, names in missing.items()},
    }
    if dataset_dir:
        data = load_dataset(DataConfig(dataset_dir=dataset_dir))
        found["data"] = {
            "name": data.name, "classes": list(data.classes), "train": len(data.train), "test": len(data.test),
            "shape": list(data.train.pixels.shape[1:]),
        }  # fmt: skip
    return found


def _precisions(device: torch.device) -> list[str]:
    """Precisions in which a convolution runs, forward and backward."""
    able = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        try:
            weight = torch.ones(8, 8, 3, 3, device=device, dtype=dtype, requires_grad=True)
            torch.conv2d(torch.ones(1, 8, 8, 8, device=device, dtype=dtype), weight).sum().backward()
            able.append(name)
        except (RuntimeError, TypeError):
            continue
    return able


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    env = found["environment"]
    shown = [
        f"sparsenet {env['sparsenet']}, torch {env['torch']}, Python {env['python']}, {env['platform']}",
        *(f"device {name}: {', '.join(precisions)}" for name, precisions in found["devices"].items()),
        f"{env['device_name']}, {env['threads']} threads",
    ]
    for device, reasons in found["implementations"].items():
        shown += [f"{device}: {name} {f'cannot run: {why}' if why else 'runs'}" for name, why in reasons.items()]
    for extra, state in found["extras"].items():
        lacks = f"missing {', '.join(state['missing'])}: pip install 'sparsenet[{extra}]'"
        shown.append(f"extra '{extra}': {'installed' if state['installed'] else lacks}")
    if data := found.get("data"):
        shown.append(
            f"data {data['name']}: {data['train']} training and {data['test']} test images, "
            f"{len(data['classes'])} classes, {data['shape']}"
        )
    return shown
