"""The optimizer, its rates in each step of an epoch as tensors, and the averaging of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsenet.device import traits
from sparsenet.model import SparseNet
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


def sgd(model: SparseNet, config: OptimConfig) -> torch.optim.SGD:
    """SGD with weight decay on convolution and linear weights only, not on scales and shifts.

    The *model* has to lie on its device already, and what is frozen in it is left out. A group
    learns at a *share* of the rates of ``epoch_rates``. Raises ``ValueError`` where there is a rate
    for layers of which none learns.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = [(1.0, trained)]
    if config.backbone_lr:
        head = set(model.classifier.parameters())
        backbone = [parameter for parameter in trained if parameter not in head]
        classifier = [parameter for parameter in trained if parameter in head]
        if not backbone:
            found = f"only a classifier that learns (--freeze {config.freeze})"
            raise ValueError(f"--backbone_lr: expected layers before the classifier, found {found}")
        parts = [(config.backbone_lr / config.lr, backbone), (1.0, classifier)]
    groups = []
    for share, part in parts:
        matrices, vectors = ([p for p in part if (p.ndim > 1) == many] for many in (True, False))
        for decay, chosen in ((config.weight_decay, matrices), (0.0, vectors)):
            groups.append({"params": chosen, "weight_decay": decay, "share": share})
    fused = traits(trained[0].device).fused_update
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
