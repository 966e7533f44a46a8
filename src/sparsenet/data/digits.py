"""The 1,797 handwritten digits of scikit-learn: 8x8 pixels, grey, 17 levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparsenet.data.dataset import Images, Source
from sparsenet.extras import require


def read_digits(root: Path) -> Source:
    """All digits as one split, whatever *root* is: they lie in the package and in no folder."""
    digits = require("sklearn.datasets", "train").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = Images(torch.from_numpy(pixels), torch.from_numpy(digits.target.astype(np.int64)))
    return Source("digits", tuple("0123456789"), 1, {"train": images})
