"""Parameter groups, an epoch's schedule as tensors, weight averaging."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsenet.device import traits
from sparsenet.schedule import OptimConfig, average_share, learning_rate


def schedule(
    config: OptimConfig, epoch: int, steps_per_epoch: int, max_epoch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Learning rate and average's share of an epoch's steps (from 0), float32 ``(steps_per_epoch,)`` each.

    They lie where a step on *device* reads them without waiting for it.
    """
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    rates = [learning_rate(config, step, steps_per_epoch, max_epoch) for step in steps]
    shares = [average_share(config.ema, step) for step in steps]
    home = device if traits(device).fused_update else torch.device("cpu")
    return torch.tensor(rates, device=home), torch.tensor(shares, device=home)


def sgd(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD whose weight decay reaches convolution and linear weights only, not scales, shifts and biases.

    To be made when the model lies on its device.
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
def update_average(average: nn.Module, model: nn.Module, share: Tensor) -> None:
    """Moves *average* the part *share*, float32 ``()``, of the way towards *model*, running statistics included."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    targets, values = ([pair[side] for pair in floating] for side in (0, 1))
    differences = torch._foreach_sub(values, targets)
    torch._foreach_mul_(
        differences, share
    )  # a tensor: in a captured step a number would be that of the capture
    torch._foreach_add_(targets, differences)
    for target, value in pairs:
        if not target.is_floating_point():
            target.copy_(value)
