"""The optimizer, its rates in each step of an epoch as tensors, and the averaging of weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.device import traits
from sparsenet.model import SparseNet
from sparsenet.schedule import OptimConfig, ema_rate, learning_rate

MUON_SHARE = 0.3  # of the rate, for the orthogonal steps of kernels: docs/LOG.md
QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Muon, kellerjordan.github.io/posts/muon
TINY = 1e-30  # instead of a sum of squares of 0


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


def new_optimizer(model: SparseNet, config: OptimConfig) -> SGD:
    """The optimizer of *config*, with weight decay on convolution and linear weights only.

    The *model* has to lie on its device already, and what is frozen in it is left out. A group
    learns at a *share* of the rates of ``epoch_rates``. Raises ``ValueError`` where a setting is
    for layers of which none learns.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    muon = config.optimizer == "muon"
    found = f"only a classifier that learns (--freeze {config.freeze})"
    if muon and not any(parameter.ndim == 4 for parameter in trained):
        expected = "expected convolutions that learn"
        raise ValueError(f"--optimizer muon: {expected}, found {found}; --optimizer sgd trains it")
    parts = [(1.0, trained)]
    if config.backbone_lr:
        head = set(model.classifier.parameters())
        backbone = [parameter for parameter in trained if parameter not in head]
        classifier = [parameter for parameter in trained if parameter in head]
        if not backbone:
            raise ValueError(f"--backbone_lr: expected layers before the classifier, found {found}")
        parts = [(config.backbone_lr / config.lr, backbone), (1.0, classifier)]
    groups = []
    for share, part in parts:
        vectors = [p for p in part if p.ndim == 1]
        kernels = [p for p in part if muon and p.ndim == 4]
        matrices = [p for p in part if p.ndim == 2 or (p.ndim == 4 and not muon)]
        decay = config.weight_decay
        groups += [
            {"params": matrices, "weight_decay": decay, "share": share},
            {"params": vectors, "weight_decay": 0.0, "share": share},
        ]
        if muon:
            decay /= MUON_SHARE * (1 - config.momentum)
            share *= MUON_SHARE
            kernel_group = {"params": kernels, "weight_decay": decay, "share": share}
            groups.append({**kernel_group, "orthogonal": True})
    fused = traits(trained[0].device).fused_update
    kind = Muon if muon else SGD
    return kind(groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=fused)


class SGD(torch.optim.SGD):
    """PyTorch's, without what marks its methods for ``torch.compile``.

    The marks import all of that compiler, which takes longer than importing PyTorch does.
    """

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)


class Muon(SGD):
    """SGD with Nesterov momentum whose steps of *orthogonal* groups are orthogonal matrices.

    The step of a kernel ``(out, in, height, width)`` is that of SGD as a matrix
    ``(out, in * height * width)`` whose singular values are all made about 1, so that what is rare
    in the gradients is learnt as fast as what is common (K. Jordan and others,
    kellerjordan.github.io/posts/muon). Weight decay is no part of that step: it shrinks the kernel
    as fast as SGD's would if there were no gradients. The state is that of SGD.
    """

    def __init__(self, *groups: Any, **settings: Any) -> None:
        super().__init__(*groups, **settings)
        # A ``GradScaler`` is to unscale gradients and to skip steps itself, as of any optimizer.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = inspect.unwrap(SGD.step)(self, closure)  # hooks are called around this method
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._step_kernels(group)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Lists what SGD is to update: nothing of the kernels."""
        if group.get("orthogonal"):
            return False
        return super()._init_group(group, *lists)  # type: ignore[no-any-return, no-untyped-call]

    def _step_kernels(self, group: dict[str, Any]) -> None:
        kernels = [kernel for kernel in group["params"] if kernel.grad is not None]
        if not kernels:
            return
        rate, momentum = group["lr"], group["momentum"]
        gradients = [kernel.grad for kernel in kernels]
        for kernel in kernels:
            if "momentum_buffer" not in self.state[kernel]:
                self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)
        velocities = [self.state[kernel]["momentum_buffer"] for kernel in kernels]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        steps: Sequence[Tensor] = torch._foreach_add(gradients, velocities, alpha=momentum)
        matrices = orthogonal([step.flatten(1) for step in steps])
        steps = [found.view_as(step) for found, step in zip(matrices, steps, strict=True)]
        torch._foreach_mul_(kernels, 1 - rate * group["weight_decay"])
        torch._foreach_mul_(steps, rate)
        torch._foreach_sub_(kernels, steps)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices ``(m, n)`` with the same singular vectors and singular values of about 1.

    Values of at least a hundredth of the matrix's norm come to 0.7 to 1.2, by Muon's five steps of
    a quintic. Of more rows than columns, all are larger by the root of m / n.
    """
    wide = [matrix.mT if len(matrix) > len(matrix.mT) else matrix for matrix in matrices]
    # Each step multiplies by a polynomial of the square, so that small matrices are enough, and
    # those of the same size are multiplied together.
    squares = [matrix @ matrix.mT for matrix in wide]
    by_size: dict[int, list[int]] = {}
    for index, square in enumerate(squares):
        by_size.setdefault(len(square), []).append(index)
    found = list(matrices)
    for indices in by_size.values():
        factors = _quintic_factors(torch.stack([squares[index] for index in indices]))
        for index, factor in zip(indices, factors, strict=True):
            rows, columns = matrices[index].shape
            product = factor @ wide[index]
            found[index] = product.mT * (rows / columns) ** 0.5 if rows > columns else product
    return found


def _quintic_factors(squares: Tensor) -> Tensor:
    """The factors ``(k, m, m)`` that make *k* matrices orthogonal, whose squares are given."""
    dtype = squares.dtype
    if traits(squares.device).double:  # errors grow 20,000 times: too much for TF32
        squares = squares.double()
    total = squares.diagonal(dim1=1, dim2=2).sum(1).clamp_min(TINY)[:, None, None]
    squares = squares / total
    one = torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device)
    first, third, fifth = QUINTIC
    product = one / total.sqrt()
    for _ in range(5):
        factor = first * one + (third * one + fifth * squares) @ squares
        product = factor @ product
        squares = factor @ squares @ factor
    return product.to(dtype)


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
