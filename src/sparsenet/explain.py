"""Why a network answers as it does: which places and which layers its logits come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparsenet.model import SparseNet
from sparsenet.pictures import heat_map as drawing
from sparsenet.pictures.heat_map import Grid


@torch.no_grad()
def heat_maps(model: SparseNet, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place of an image adds to the logit of a class: float32 ``(N, h, w)``.

    *images* are normalised, ``(N, in_chans, H, W)``, and *classes* int64 ``(N,)``. Since the
    features of the last stage are averaged and then weighed, the mean of a map and the
    classifier's bias **are** the logit (Zhou et al., "Learning Deep Features for Discriminative
    Localization", arXiv:1512.04150). ``Grid`` says where in the image a place lies. In fp64 the
    maps are fp64.

    Raises ``ValueError`` for a network without the classifier that it was made with.
    """
    return maps_of(model, model.forward_features(images), classes)


def maps_of(model: SparseNet, features: Tensor, classes: Tensor) -> Tensor:
    """As ``heat_maps``, given what ``forward_features`` makes of the images."""
    exact = torch.promote_types(features.dtype, torch.float32)
    weights = classifier(model).weight[classes.to(features.device)].to(exact)  # (N, C)
    return torch.einsum("nchw,nc->nhw", features.to(exact), weights)


def classifier(model: SparseNet) -> nn.Linear:
    """The classifier of *model*, which reads averaged features."""
    if type(model.classifier) is not nn.Linear or not model.global_pool:
        found = type(model.classifier).__name__
        raise ValueError(f"classifier: expected a Linear layer on averaged features, found {found}")
    return model.classifier


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
    values = heat_map.detach().cpu().double().numpy()
    return drawing.png(drawing.overlay(picture, values, grid(model, size)))
