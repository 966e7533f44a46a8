"""The optimizer's settings and rates as pure functions of the step. Nothing here needs PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsenet.validation import check_settings, setting

OPTIMIZERS = ("sgd", "muon")
SCHEDULES = ("step", "cosine", "onecycle")
DROP = 0.1  # factor of the step schedule at each drop


@dataclass(frozen=True)
class OptimConfig:
    """SGD with Nesterov momentum, or Muon; the defaults are the paper's.

    Raises ``ValueError`` naming the field.
    """

    optimizer: str = setting(
        "sgd", "muon: the steps of convolutions are made orthogonal", OPTIMIZERS
    )
    lr: float = setting(0.1, "peak learning rate")
    schedule: str = setting("step", "how the rate changes over the run", SCHEDULES)
    drop_1: int = setting(150, "epochs before the first division of the rate by 10")
    drop_2: int = setting(225, "epochs before the second one")
    warmup: float = setting(0.0, "epochs of linear warm-up; 0 with onecycle: 30 %% of the run")
    momentum: float = setting(0.9, "Nesterov momentum")
    weight_decay: float = setting(1e-4, "on convolution and linear weights only")
    label_smoothing: float = setting(0.0, "share of the target spread over all classes")
    class_weights: str = setting(
        "none",
        "balanced: an image counts in the loss as if all classes had equally many",
        ("none", "balanced"),
    )
    ema: float = setting(0.0, "decay of averaged weights, used to evaluate; 0: none")
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping")
    backbone_lr: float = setting(
        0.0, "peak learning rate of all but the classifier; 0: that of --lr"
    )
    freeze: str = setting(
        "", "what stays as in --weights, with all before it: stem, stage1, stage2, … or all"
    )

    def __post_init__(self) -> None:
        check_settings(
            self,
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("drop_1", 0 <= self.drop_1 <= 10**6, "a number of epochs"),
            ("drop_2", self.drop_1 <= self.drop_2 <= 10**6, f"at least drop_1 ({self.drop_1})"),
            ("warmup", 0 <= self.warmup < math.inf, "a number of epochs"),
            ("momentum", 0 < self.momentum < 1, "a number between 0 and 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share below 1"),
            ("ema", 0 <= self.ema < 1, "a decay below 1"),
            ("backbone_lr", 0 <= self.backbone_lr < math.inf, "a positive number, or 0"),
            ("grad_clip", 0 <= self.grad_clip < math.inf, "a norm of at least 0"),
        )
        if self.optimizer == "muon":  # a step takes that much away at once: ``optim.Muon``
            rate = "backbone_lr" if self.backbone_lr > self.lr else "lr"
            bound = (1 - self.momentum) / getattr(self, rate)
            expected = f"with muon less than (1 - momentum) / {rate} ({bound:g})"
            check_settings(self, ("weight_decay", self.weight_decay < bound, expected))


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, max_epoch: int) -> float:
    """The rate of step *step* (from 0) of a run of ``max_epoch * steps_per_epoch`` steps."""
    begun = step / steps_per_epoch  # epochs before this step
    done = begun + 1 / steps_per_epoch  # epochs after it
    if config.schedule == "step":
        drops = (begun >= config.drop_1) + (begun >= config.drop_2)
        return config.lr * DROP**drops * min(1.0, done / max(config.warmup, 1e-9))
    onecycle = config.schedule == "onecycle"
    rise = config.warmup or (0.3 * max_epoch if onecycle else 0.0)
    if begun < rise:
        start = 0.04 if onecycle else 0.0
        return config.lr * (start + (1 - start) * min(1.0, done / rise))
    fallen = min((begun - rise) / max(max_epoch - rise, 1e-9), 1.0)
    return config.lr * 0.5 * (1 + math.cos(math.pi * fallen))


def ema_rate(decay: float, step: int) -> float:
    """How far averaged weights move towards the current ones after *step* (from 0), from 0 to 1.

    The decay rises to *decay* as steps accumulate, so that the initial weights are soon forgotten.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
