"""What processes with statistics in common compute, against one process; run in each of them."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sparsenet import Architecture, SparseNet
from sparsenet.stage import synchronise_statistics

EXACT = {"rtol": 1e-10, "atol": 1e-10}
NETWORKS = {
    "sparse": Architecture(depth=10, growth_rate=4),
    "bottleneck": Architecture(depth=16, growth_rate=4, bottleneck=True, fetch="dense"),
    "sum": Architecture(depth=13, growth_rate=4, aggregation="sum", bottleneck=True),
    "tiny": Architecture(depth=7, growth_rate=4),
    "strided": Architecture(blocks=(2, 1), growth_rate=4, stem="imagenet"),
}
PARTS = (slice(0, 3), slice(3, 8))  # of different sizes


def network(name: str, implementation: str, memory: str) -> SparseNet:
    torch.manual_seed(0)
    model = SparseNet(NETWORKS[name], implementation, memory).double()
    for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in label or "running" in label:
            torch.nn.init.uniform_(tensor.data, 0.5, 1.5)
    return model


def reduced(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        dist.all_reduce(tensor)
    return tensors


def steps_agree(
    name: str, implementation: str, memory: str = "normal", steps: int = 3, size: int = 16
) -> None:
    """Outputs, gradients, running statistics and the weights after *steps* steps."""
    alone = network(name, implementation, memory)
    ours = copy.deepcopy(alone)
    synchronise_statistics(ours)
    part = PARTS[dist.get_rank()]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, size, size, generator=generator).double()
        for model, x in ((alone, images), (ours, images[part])):
            x.requires_grad_()
            model.zero_grad()
            output = model(x)
            output.square().sum().backward()
            if model is alone:
                expected, whole = output.detach(), x
        torch.testing.assert_close(output.detach(), expected[part], **EXACT)
        torch.testing.assert_close(x.grad, whole.grad[part], **EXACT)
        names = [n for n, p in alone.named_parameters() if p.grad is not None]
        found = reduced([ours.get_parameter(n).grad for n in names])
        torch.testing.assert_close(found, [alone.get_parameter(n).grad for n in names], **EXACT)
        for model in (alone, ours):
            with torch.no_grad():
                for label in names:
                    parameter = model.get_parameter(label)
                    parameter -= 1e-3 * parameter.grad
    torch.testing.assert_close(ours.state_dict(), alone.state_dict(), **EXACT)


def modules_agree(implementation: str) -> None:
    """Where modules are called, and where gradients are differentiated."""
    alone = network("sparse", implementation, "normal")
    ours = copy.deepcopy(alone)
    synchronise_statistics(ours)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5)).double()
    part = PARTS[dist.get_rank()]
    found = []
    for hooked in (False, True):
        results = []
        for model, x in ((alone, images), (ours, images[part])):
            handles = [
                stage.layers[0][0].conv.register_forward_hook(lambda *_: None)
                for stage in model.stages
                if hooked
            ]
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            weight = model.stages[1].layers[1][0].conv.weight
            (second,) = torch.autograd.grad(slope.square().sum(), weight)
            results.append((slope.detach(), second))
            for handle in handles:
                handle.remove()
        (slope_alone, second_alone), (slope, second) = results
        torch.testing.assert_close(slope, slope_alone[part], **EXACT)
        torch.testing.assert_close(reduced([second])[0], second_alone, **EXACT)
        found.append(slope)
    torch.testing.assert_close(*found, **EXACT)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for implementation in ("reference", "shared", "native"):
        for name in NETWORKS:
            steps_agree(name, implementation)
        if implementation != "reference":
            steps_agree("bottleneck", implementation, "lean")
        modules_agree(implementation)
    steps_agree("sparse", "native", steps=20)
    if len(sys.argv) > 1:  # where the interpreter takes its time
        steps_agree("tiny", sys.argv[1], steps=2, size=8)
    dist.destroy_process_group()
    print("rank", os.environ["RANK"], "agrees")


if __name__ == "__main__":
    main()
