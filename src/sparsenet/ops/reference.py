"""The specification: the textbook's network, one reader after the other.

A reader joins the features that it reads and applies batch norm, ReLU and a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet.ops import synchronised
from sparsenet.ops.plan import EPS, MOMENTUM, Operands, Plan, Reader, Statistics
from sparsenet.ops.synchronised import Group


def unavailable(device: torch.device) -> str | None:
    return None


def aggregate(
    plan: Plan, x: Tensor, operands: Operands, dropout_masks: Sequence[Tensor] = ()
) -> Tensor:
    """The activated stage output ``(N, C_out, H, W)`` for a stage input ``(N, C_0, H, W)``.

    Dropout draws masks unless it is given those of each reader.
    """
    readers, statistics, training, group = operands
    features = {0: x}
    for r, (read, reader) in enumerate(zip(plan.reads, readers, strict=True)):
        gathered = [features[j] for j in read]
        joined = (
            torch.cat(gathered, 1) if plan.aggregation == "concat" else reduce(torch.add, gathered)
        )
        normed = _batch_norm(plan, r, joined, reader, statistics, training, group)
        activated = F.relu(normed, inplace=True)
        if reader.weight is None:
            return activated
        output = F.conv2d(activated, reader.weight, padding=reader.weight.shape[-1] // 2)
        if training and plan.dropout:
            if dropout_masks:
                output = output * dropout_masks[r] / (1 - plan.dropout)
            else:
                # In one order whatever the layout, so that a seed drops the same everywhere.
                output = torch.native_dropout(output.contiguous(), plan.dropout, True)[0]
        features[r + 1] = output
        for j in read:
            if plan.topology.last_reader[j] == r + 1:
                del features[j]  # nobody reads it any more, and inference keeps no other
    raise ValueError("plan: expected a last reader without a convolution")


def _batch_norm(
    plan: Plan,
    r: int,
    joined: Tensor,
    reader: Reader,
    statistics: Sequence[Statistics],
    training: bool,
    group: Group | None,
) -> Tensor:
    measured = plan.reads[r] if plan.aggregation == "concat" else (r,)
    mean = torch.cat([statistics[j].mean for j in measured])
    var = torch.cat([statistics[j].var for j in measured])
    given = joined, mean, var, reader.scale, reader.shift
    if training and group:
        normed = synchronised.batch_norm(*given, MOMENTUM, EPS, group)
    else:
        normed = F.batch_norm(*given, training, MOMENTUM, EPS)
    if training:  # all readers of a feature see the same batch, the first one keeps its statistics
        widths = [len(statistics[j].mean) for j in measured]
        for j, new_mean, new_var in zip(
            measured, mean.split(widths), var.split(widths), strict=True
        ):
            if plan.aggregation == "sum" or plan.topology.first_reader[j] == r + 1:
                statistics[j].mean.copy_(new_mean)
                statistics[j].var.copy_(new_var)
    return normed
