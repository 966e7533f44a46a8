"""Scikit-learn's 1,797 handwritten digits: 8x8 pixels, grey, 17 levels. They come with that package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparsenet.data.dataset import Images, Source
from sparsenet.extras import require


def holds(root: Path, name: str) -> bool:
    """Always: the digits lie in no folder."""
    return True


def open_source(root: Path, name: str) -> Source:
    """All digits as one split."""
    digits = require("sklearn.datasets", "train").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = Images(torch.from_numpy(pixels), torch.from_numpy(digits.target.astype(np.int64)))
    return Source("digits", tuple("0123456789"), 1, {"train": images})
