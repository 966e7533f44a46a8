"""The 1,797 handwritten digits of scikit-learn: 8x8 pixels, grey, 17 levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images, Source
from sparsenet.data.sampling import stratified_split
from sparsenet.extras import require


def read_digits(root: Path, config: DataConfig) -> Source:
    """The digits, a fifth of each class as the test split, whatever *root* and *config* are.

    They lie in the package and in no folder, and are always the same, so that the split is drawn
    with a fixed seed.
    """
    digits = require("sklearn.datasets", "train").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = Images(torch.from_numpy(pixels), torch.from_numpy(digits.target.astype(np.int64)))
    train, test = stratified_split(images.labels, 0.2)
    splits = {"train": images[train], "test": images[test]}
    return Source("digits", tuple("0123456789"), 1, splits)
