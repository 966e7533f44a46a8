"""The optimizer, its rates in each step of an epoch as tensors, and the averaging of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsenet.device import traits
from sparsenet.schedule import OptimConfig, ema_rate, learning_rate


def epoch_rates(
    config: OptimConfig, epoch: int, steps_per_epoch: int, max_epoch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Learning rates and rates of averaging in an epoch (from 0), float32 ``(steps_per_epoch,)``.

    They lie where a step on *device* reads them without waiting for it.
    """
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    rates = [learning_rate(config, step, steps_per_epoch, max_epoch) for step in steps]
    ema_rates = [ema_rate(config.ema, step) for step in steps]
    reader = device if traits(device).fused_update else torch.device("cpu")
    return torch.tensor(rates, device=reader), torch.tensor(ema_rates, device=reader)


def sgd(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD with weight decay on convolution and linear weights only, not on scales and shifts.

    The *model* has to lie on its device already.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = traits(parameters[0].device).fused_update
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=fused
    )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, rate: Tensor) -> None:
    """Moves *average*, with its running statistics, towards *model* by *rate*, float32 ``()``."""
    targets, values = [], []
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for target, value in pairs:
        if target.is_floating_point():
            targets.append(target)
            values.append(value)
        else:
            target.copy_(value)
    differences = torch._foreach_sub(values, targets)
    torch._foreach_mul_(differences, rate)  # a number would be frozen in a captured step
    torch._foreach_add_(targets, differences)
