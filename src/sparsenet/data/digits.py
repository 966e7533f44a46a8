"""The 1,797 handwritten digits that come with the package: 8x8 pixels, grey, 17 levels.

They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, 1998 (doi:10.24432/C50P49, CC BY 4.0), as scikit-learn has it too.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Images, Source
from sparsenet.data.sampling import stratified_split

DIGITS = Path(__file__).with_name("digits.safetensors")


def read_digits(root: Path, config: DataConfig) -> Source:
    """The digits, a fifth of each class as the test split, whatever *root* and *config* are.

    They lie in the package and in no folder, and are always the same, so that the split is drawn
    with a fixed seed.
    """
    digits = load_file(DIGITS)
    pixels = (digits["images"] * (255 / 16)).round().byte()[:, None]
    images = Images(pixels, digits["labels"].long())
    train, test = stratified_split(images.labels, 0.2)
    splits = {"train": images[train], "test": images[test]}
    return Source("digits", tuple("0123456789"), 1, splits)
