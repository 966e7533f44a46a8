"""Ten images a class: from trained weights, and from nothing.

    python -m benchmarks.finetune OUT --data CIFAR10 [--seeds 0,1,2]

makes two small data sets in OUT, trains on them with each recipe and seed that OUT has not yet,
and prints a table. CIFAR10 is a folder with the parquet files of CIFAR-10. The images are some that
the shipped network was not trained on: the first of each class of CIFAR-10's test images, under
other names of classes, so that the classifier is a new one; and the package's digits, which look
like nothing that it has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsenet import fit
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example
from sparsenet.data.digits import read_digits
from sparsenet.data.load import find
from sparsenet.files import read_json
from sparsenet.results import TrainingResult

WEIGHTS = "sparsenet_100_24"
TRAIN, TEST = 10, 50  # images of each class
NOTHING = {"depth": 100, "growth_rate": 24, "image_size": 32, "in_chans": 3, "max_epoch": 40}
RECIPES: dict[str, dict[str, Any]] = {
    "weights": {"weights": WEIGHTS},
    "weights-classifier": {"weights": WEIGHTS, "freeze": "all"},
    "nothing": {"preset": "short", **NOTHING},
}
SETS: dict[str, dict[str, Any]] = {"cifar10": {}, "digits": {"mirror": False}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", type=Path, required=True, metavar="CIFAR10")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    seeds = [int(text) for text in arguments.seeds.split(",")]
    examples = {
        "cifar10": find(DataConfig(dataset_dir=str(arguments.data))).splits["test"],
        "digits": read_digits(Path(), DataConfig()).splits["train"],
    }
    print("| images | recipe | error % of each seed |\n| --- | --- | --- |")
    for name, settings in SETS.items():
        folder = write_images(arguments.out / "data" / name, examples[name])
        for recipe, changes in RECIPES.items():
            errors = []
            for seed in seeds:
                run = arguments.out / f"{name}-{recipe}-seed{seed}"
                if not (run / "result.json").exists():
                    given = {**settings, **changes, "dataset_name": f"{name}, {TRAIN} a class"}
                    fit(dataset_dir=folder, out=run, quiet=True, seed=seed, **given)
                errors.append(read_json(run / "result.json", TrainingResult).error)
            shown = ", ".join(f"{error:.1f}" for error in errors)
            print(f"| {name} | {recipe} | {shown} |", flush=True)


def write_images(folder: Path, examples: Iterable[Example]) -> Path:
    """Writes the first images of each class into ``train`` and the next into ``test``."""
    if not folder.exists():
        for path, content in _chosen(folder, examples):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                Image.fromarray(content).save(path)
    return folder


def _chosen(folder: Path, examples: Iterable[Example]) -> Iterator[tuple[Path, bytes | np.ndarray]]:
    seen: dict[int, int] = {}
    for example in examples:
        number = seen[example.label] = seen.get(example.label, 0) + 1
        if number > TRAIN + TEST:
            continue
        split = "train" if number <= TRAIN else "test"
        place = folder / split / f"class {example.label}" / str(number)
        if isinstance(example.source, np.ndarray):
            yield place.with_suffix(".png"), example.source[0]
        elif isinstance(example.source, bytes):
            yield place.with_suffix(".jpg"), example.source


if __name__ == "__main__":
    main()
