"""The same network in plain modules of PyTorch, every reader with a batch norm of its own."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import SparseNet
from sparsenet.ops.plan import Plan


class PlainUnit(nn.Module):
    def __init__(self, width: int, kernel: int, out: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(self.norm(x)))  # type: ignore[no-any-return]


class PlainStage(nn.Module):
    def __init__(self, stage: Any):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*(PlainUnit(*unit) for unit in stage.units(layer)))
            for layer in range(1, stage.topology.depth + 1)
        )
        self.norm = nn.BatchNorm2d(stage.out_width)
        self.relu = nn.ReLU()
        self.sources = stage.topology.sources
        self.aggregation = stage.aggregation

    def forward(self, x: Tensor) -> Tensor:
        features = [x]

        def gather(read: tuple[int, ...]) -> Tensor:
            chosen = [features[j] for j in read]
            return (
                torch.cat(chosen, 1) if self.aggregation == "concat" else reduce(torch.add, chosen)
            )

        for layer, read in zip(self.layers, self.sources, strict=False):
            features.append(layer(gather(read)))
        return self.relu(self.norm(gather(self.sources[-1])))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """The network of *model*, with its weights and running statistics, under the same names."""

    def __init__(self, model: SparseNet):
        super().__init__()
        layouts = model.architecture.stages
        self.stem = nn.Sequential(*(type_of(module) for module in model.stem))
        self.stages = nn.ModuleList(PlainStage(layout) for layout in layouts)
        self.transitions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a.out_width, b.in_width, 1, bias=False), nn.AvgPool2d(2))
            for a, b in pairwise(layouts)
        )
        self.classifier = nn.Linear(model.num_features, model.num_classes)
        self.to(next(model.parameters()).dtype)
        self._load(model)
        self.train(model.training)

    def _load(self, model: SparseNet) -> None:
        state = dict(model.state_dict())
        for number in range(len(model.transitions)):
            name = f"transitions.{number}"
            state[f"{name}.0.weight"] = state.pop(f"{name}.conv.weight")
        for number, stage in enumerate(model.stages):
            plan: Plan = stage.plan
            names = [n for n, m in stage.named_modules() if n.split(".")[-1] == "norm"]
            for reader, (name, read) in enumerate(zip(names, plan.reads, strict=True)):
                kept = read if plan.aggregation == "concat" else (reader,)
                for part in ("running_mean", "running_var"):
                    parts = [state[f"stages.{number}.statistics.{j}.{part}"] for j in kept]
                    state[f"stages.{number}.{name}.{part}"] = torch.cat(parts)
        missing, _ = self.load_state_dict(state, strict=False)
        assert all(name.endswith("num_batches_tracked") for name in missing)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def type_of(module: nn.Module) -> nn.Module:
    """Another module of the same kind and settings."""
    if isinstance(module, nn.Conv2d):
        settings = module.kernel_size, module.stride, module.padding
        return nn.Conv2d(module.in_channels, module.out_channels, *settings, bias=False)  # type: ignore[arg-type]
    if isinstance(module, nn.BatchNorm2d):
        return nn.BatchNorm2d(module.num_features)
    return nn.ReLU() if isinstance(module, nn.ReLU) else nn.MaxPool2d(3, 2, 1)
