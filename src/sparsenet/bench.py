"""Time and memory of the implementations, side by side in one run and checked for equality before any timing."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet import zoo
from sparsenet.device import memory_mb, peak_memory_mb, use_large_pages
from sparsenet.model import SparseNet
from sparsenet.ops import IMPLEMENTATIONS
from sparsenet.run import environment

WARM_UP = 2
TOLERANCE = {"fp32": 2e-2, "bf16": 0.3}  # relative; rounding grows with depth, a wrong gradient is off by 1


def bench(
    name: str, batch_size: int, image_size: int, steps: int, precision: str, device: torch.device
) -> dict[str, Any]:
    """Figures of a named network: seconds of a training step and of an inference pass, peak memory in MB.

    Implementations take turns step by step in this process, so that all see the same machine; memory is
    measured above the base (model, optimizer and data made) in a process of its own for each. Raises
    ``ValueError`` where an implementation's logits differ from the reference's.
    """
    zoo.architecture(name).sizes(image_size)
    names = list(IMPLEMENTATIONS)
    workloads = {each: Workload(name, each, batch_size, image_size, precision, device) for each in names}
    _compare(workloads, precision)
    seconds: dict[str, dict[str, list[float]]] = {each: {"train": [], "infer": []} for each in names}
    for turn in range(WARM_UP + steps):
        for each, work in workloads.items():
            for kind, act in (("train", work.train_step), ("infer", work.infer)):
                taken = _timed(act, device)
                if turn >= WARM_UP:
                    seconds[each][kind].append(taken)
    memory = {each: _memory(name, each, batch_size, image_size, precision, device) for each in names}
    rows = [{"implementation": each, **_spread(seconds[each]), "peak_memory_mb": memory[each]} for each in names]
    what = {"model": name, "batch_size": batch_size, "image_size": image_size, "precision": precision}
    return {**what, "steps": steps, "environment": environment(device), "rows": rows}


class Workload:
    """One implementation with an optimizer and a fixed random batch; ``train_step`` and ``infer`` are timed."""

    def __init__(
        self,
        name: str,
        implementation: str,
        batch_size: int,
        image_size: int,
        precision: str,
        device: torch.device,
    ):
        torch.manual_seed(0)
        self.model: SparseNet = zoo.create_model(name, implementation=implementation).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9, nesterov=True)
        self.images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        self.labels = torch.randint(self.model.num_classes, (batch_size,), device=device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def logits_and_gradients(self) -> tuple[Tensor, Tensor]:
        """Of one training step without its update: ``(N, classes)`` and all parameters' in one vector."""
        self.train_step(update=False)
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        with self.autocast:
            return self.model(self.images).detach().float().cpu(), torch.cat(gradients).float().cpu()

    def train_step(self, update: bool = True) -> float:
        self.model.train()
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if update:
            self.optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def infer(self) -> Tensor:
        self.model.eval()
        with self.autocast:
            logits: Tensor = self.model(self.images)
        return logits.float().cpu()


def _compare(workloads: dict[str, Workload], precision: str) -> None:
    truth, *others = ((name, work.logits_and_gradients()) for name, work in workloads.items())
    for name, found in others:
        for what, value, expected in zip(("logits", "gradients"), found, truth[1], strict=True):
            difference = ((value - expected).norm() / expected.norm()).item()
            if not difference <= TOLERANCE[precision]:
                raise ValueError(
                    f"bench: {name}'s {what} differ from {truth[0]}'s by {difference:.1e}; nothing was timed"
                )


def _timed(act: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    act()  # both kinds end with a value on the CPU, so the device has finished
    return time.perf_counter() - begin


def _spread(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        f"{kind}_seconds": {"median": statistics.median(all_), "min": min(all_), "max": max(all_)}
        for kind, all_ in seconds.items()
    }


def _memory(*arguments: Any) -> float:
    """Peak memory of two training steps above the base, in MB, from a process of its own."""
    command = [sys.executable, "-m", "sparsenet.bench", json.dumps([str(argument) for argument in arguments])]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        said = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise ValueError(f"bench: measuring memory failed: {said[-1]}")
    return float(found.stdout)


def _measure_memory(name: str, implementation: str, batch: str, size: str, precision: str, device_name: str) -> float:
    device = torch.device(device_name)
    work = Workload(name, implementation, int(batch), int(size), precision, device)
    base = memory_mb(device) or float("nan")
    for _ in range(2):
        work.train_step()
    return round((peak_memory_mb(device) or float("nan")) - base, 1)


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines of a Markdown table, with ratios to the first row."""
    env, rows = found["environment"], found["rows"]
    lines = [
        f"{found['model']}, batch {found['batch_size']}, {found['image_size']}², {found['precision']}, "
        f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, median of {found['steps']} (min–max)",
        "",
        "| implementation | training step, s | ratio | inference, s | ratio | peak memory above base, MB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        cells = [row["implementation"]]
        for key in ("train_seconds", "infer_seconds"):
            spread = row[key]
            cells.append(f"{spread['median']:.3f} ({spread['min']:.3f}–{spread['max']:.3f})")
            cells.append(f"{spread['median'] / first[key]['median']:.2f}")
        cells += [f"{row['peak_memory_mb']:.0f}", f"{row['peak_memory_mb'] / first['peak_memory_mb']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    use_large_pages()
    print(_measure_memory(*json.loads(sys.argv[1])))
