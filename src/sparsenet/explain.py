"""Why a network answers as it does: which places and which layers its logits come from.

What is said is either an identity or a measurement, never an estimate. A heat map and the shares of
the features that the classifier reads add up to the logit. What a layer further back does has no
such share, since other layers compute with it; it is told by how much the logit falls without it.
(Gradients, which one pass would give, were compared with that: docs/how-to/explain.md.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsenet.model import SparseNet
from sparsenet.pictures import heat_map as drawing
from sparsenet.pictures.heat_map import Grid

ROWS = 32  # copies of an image that are computed at a time, each without another layer
LISTED = 5  # layers in a line of text


@dataclass(frozen=True)
class StageEffects:
    """By how much a logit falls without parts of a stage, measured.

    *layers* has an entry for each feature, first the stage's input. *together* is without all
    layers of the stage at once, which is not their sum.
    """

    layers: tuple[float, ...]
    together: float


@dataclass(frozen=True)
class Explanation:
    """What a logit is made of: ``logit = bias + shift + sum(shares.values())``.

    *shares* are those of the features of the last stage that the classifier reads, by number, of
    which 0 is the stage's input. Where features are summed, *shift* is what the norm after the sum
    adds. *heat_map*, ``(h, w)``, has the mean ``logit - bias``.
    """

    logit: float
    bias: float
    shift: float
    shares: dict[int, float]
    stages: tuple[StageEffects, ...]
    heat_map: Tensor

    def to_dict(self) -> dict[str, Any]:
        """A JSON object, without the heat map."""
        return {
            "logit": self.logit,
            "bias": self.bias,
            "shift": self.shift,
            "shares": {_name(number): share for number, share in self.shares.items()},
            "without": [
                {"input": each.layers[0], "layers": each.layers[1:], "together": each.together}
                for each in self.stages
            ],
        }

    def lines(self) -> list[str]:
        """What to print."""
        shares = _ranked({_name(number): share for number, share in self.shares.items()})
        terms = [f"{share:+.2f} {name}" for name, share in shares[:LISTED]]
        if rest := shares[LISTED:]:
            terms.append(f"{sum(share for _, share in rest):+.2f} {len(rest)} more")
        terms += [f"{self.shift:+.2f} shift"] * bool(self.shift) + [f"{self.bias:+.2f} bias"]
        together = [f"{-e.together:+.2f} stage {s}" for s, e in enumerate(self.stages, 1)]
        single = {
            f"layer {layer} of stage {number}": -effect
            for number, effects in enumerate(self.stages, 1)
            for layer, effect in enumerate(effects.layers)
            if layer
        }
        ranked = [f"{effect:+.2f} {name}" for name, effect in _ranked(single)[:LISTED]]
        return [
            f"logit {self.logit:.2f} = {' '.join(terms)} (of stage {len(self.stages)})",
            f"without all layers of a stage: {', '.join(together)}",
            f"without one layer, the most: {', '.join(ranked)}",
        ]


def _name(feature: int) -> str:
    return f"layer {feature}" if feature else "input"


def _ranked(values: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda pair: -abs(pair[1]))


@torch.no_grad()
def heat_maps(model: SparseNet, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place of an image adds to the logit of a class: float32 ``(N, h, w)``.

    *images* are normalised, ``(N, in_chans, H, W)``, and *classes* int64 ``(N,)``. Since the
    features of the last stage are averaged and then weighed, the mean of a map and the
    classifier's bias **are** the logit (Zhou et al., "Learning Deep Features for Discriminative
    Localization", arXiv:1512.04150). ``grid`` says where in the image a place lies. In fp64 the
    maps are fp64.

    Raises ``ValueError`` for a network without the classifier that it was made with.
    """
    return maps_of(model, model.forward_features(images), classes)


def maps_of(model: SparseNet, features: Tensor, classes: Tensor) -> Tensor:
    """As ``heat_maps``, given what ``forward_features`` makes of the images."""
    exact = torch.promote_types(features.dtype, torch.float32)
    weights = _classifier(model).weight[classes.to(features.device)].to(exact)  # (N, C)
    return (features.to(exact) * weights[:, :, None, None]).sum(1)  # autocast rounds products


def _classifier(model: SparseNet) -> nn.Linear:
    if type(model.classifier) is not nn.Linear or not model.global_pool:
        found = type(model.classifier).__name__
        raise ValueError(f"classifier: expected a Linear layer on averaged features, found {found}")
    return model.classifier


def check_evaluates(model: nn.Module) -> None:
    """Raises ``ValueError`` where a part of *model* is in training, as norms and dropout may be."""
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected one in evaluation mode, found training; model.eval()")


@torch.no_grad()
def explain(model: SparseNet, images: Tensor, classes: Tensor) -> list[Explanation]:
    """What the logit of a class is made of, for each image; *model* is in evaluation mode.

    *images* are normalised, ``(N, in_chans, H, W)``, and *classes* int64 ``(N,)``. It takes about
    as long as classifying half as many images as the network has layers, for each image.

    "Without" a feature means that it is everywhere its mean over the training images, as the
    network's statistics have it; where features are summed, which have no statistics of their own,
    that it is left out of the sums. Raises ``ValueError`` as ``heat_maps`` does, and for a model in
    training.
    """
    check_evaluates(model)
    bias = _exact(_classifier(model).bias)[classes.cpu()].tolist()
    inputs, features = _stages(model, images)
    maps = maps_of(model, features, classes)
    shares, shifts = _shares(model, inputs[-1], features, classes)
    explanations = []
    for image, label in enumerate(classes.tolist()):
        effects = [
            _effects(model, number, x[image : image + 1], label) for number, x in enumerate(inputs)
        ]
        logit = bias[image] + shifts[image] + sum(shares[image].values())
        given = bias[image], shifts[image], shares[image], tuple(effects), maps[image].cpu()
        explanations.append(Explanation(logit, *given))
    return explanations


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # which not every device has


def _stages(model: SparseNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each stage reads, and the output of the last."""
    x, inputs = model.stem(model.laid_out(images)), []
    for number, stage in enumerate(model.stages):
        inputs.append(x if not number else model.transitions[number - 1](x))
        x = stage(inputs[-1])
    return inputs, x


def _shares(
    model: SparseNet, x: Tensor, features: Tensor, classes: Tensor
) -> tuple[list[dict[int, float]], list[float]]:
    """For each image what each feature that the classifier reads adds, and what no feature does.

    *x* is what the last stage reads, *features* is its output. With concatenation a channel of the
    output comes from one feature. A sum is normalised, and what its ReLU lets through is linear in
    the features; the rest is the shift of the norm.
    """
    layout = model.architecture.stages[-1]
    read = layout.topology.sources[-1]
    weights = _exact(_classifier(model).weight)[classes.cpu()]  # (N, C)
    if layout.aggregation == "concat":
        parts = (_exact(features).mean((2, 3)) * weights).split([layout.widths[j] for j in read], 1)
        return _by_image(read, [part.sum(1) for part in parts]), [0.0] * len(classes)
    stage: Any = model.stages[-1]
    norm, affine, unit = stage.statistics[-1], stage.norm, len(layout.branch)
    scale = _exact(affine.weight) / (_exact(norm.running_var) + norm.eps).sqrt()  # (C,)
    shift = _exact(affine.bias) - scale * _exact(norm.running_mean)
    passed = _exact(features > 0)
    found: dict[int, Tensor] = {}

    def seen(number: int, feature: Tensor) -> Tensor:
        if number % unit == 0 and number // unit in read:
            mean = (_exact(feature) * passed).mean((2, 3))  # (N, C)
            found[number // unit] = (mean * scale * weights).sum(1)
        return feature

    stage.call_modules(x, seen)
    constant = (passed.mean((2, 3)) * shift * weights).sum(1)
    return _by_image(read, [found[j] for j in read]), constant.tolist()


def _by_image(read: Sequence[int], shares: Sequence[Tensor]) -> list[dict[int, float]]:
    rows = torch.stack(list(shares), 1).tolist()  # (N, features)
    return [dict(zip(read, row, strict=True)) for row in rows]


def _effects(model: SparseNet, number: int, x: Tensor, label: int) -> StageEffects:
    """By how much the logit falls without parts of stage *number*, which reads *x*."""
    depth = model.architecture.stages[number].topology.depth
    removed = [set[int](), *({j} for j in range(depth + 1)), set(range(1, depth + 1))]
    logits = []
    for first in range(0, len(removed), ROWS):
        logits += _logits_without(model, number, x, removed[first : first + ROWS])[
            :, label
        ].tolist()
    effects = [logits[0] - logit for logit in logits[1:]]
    return StageEffects(tuple(effects[:-1]), effects[-1])


def _logits_without(
    model: SparseNet, number: int, x: Tensor, removed: Sequence[set[int]]
) -> Tensor:
    """The logits ``(rows, classes)`` of one image, in each row without some features of a stage."""
    stages: Any = model.stages
    stage, unit = stages[number], len(model.architecture.stages[number].branch)

    def replaced(j: int, feature: Tensor) -> Tensor:
        if j % unit:
            return feature
        mean: Any = 0.0
        if stage.plan.aggregation == "concat":
            mean = stage.statistics[j].running_mean.view(-1, 1, 1).to(feature.dtype)
        feature = feature if j else feature.clone()  # whose rows are one
        for row, each in enumerate(removed):
            if j // unit in each:
                feature[row] = mean
        return feature

    x = stage.call_modules(x.expand(len(removed), -1, -1, -1), replaced)
    for transition, stage in zip(model.transitions[number:], stages[number + 1 :], strict=True):
        x = stage(transition(x))
    return model.forward_head(x)


def grid(model: SparseNet, size: int) -> Grid:
    """Where the cells of ``heat_maps`` lie in images of *size* pixels a side.

    A cell's centre is that of what its convolutions and poolings read. A strided stem looks at
    every fourth pixel, beginning with the first, which moves the grid.
    """
    step = model.feature_info[-1]["reduction"]
    return Grid((1 - model.stem.reduction) / 2, step, size)


def heat_map_png(picture: np.ndarray, heat_map: Tensor, model: SparseNet, size: int) -> bytes:
    """A PNG of a heat map, ``(h, w)``, over the picture that it is of.

    *picture* is the whole one, uint8 ``(C, H, W)`` with 1 or 3 channels, turned as its EXIF
    orientation says: what ``sparsenet.data.images.read_image`` gives with *size* 0. Its central
    square was resized to *size* for the network. What speaks for the class is orange, what speaks
    against it blue, and what was cropped away is faded.
    """
    return drawing.png(drawing.overlay(picture, _array(heat_map), grid(model, size)))


def draw_explanation(
    picture: np.ndarray,
    explanation: Explanation,
    model: SparseNet,
    size: int,
    title: str,
    mark: str,
) -> bytes:
    """A PNG of the picture, its heat map, and by how much the logit falls without each layer.

    *picture* and *size* are those of ``heat_map_png``. *mark* is written into the file.
    """
    effects = [stage.layers[1:] for stage in explanation.stages]
    values = _array(explanation.heat_map)
    return drawing.draw_explanation(picture, values, grid(model, size), title, effects, mark)


def _array(heat_map: Tensor) -> np.ndarray:
    array: np.ndarray = _exact(heat_map).numpy()
    return array
