"""``sparsenet predict``."""

from __future__ import annotations

import argparse
import json
import sys

from sparsenet.commands.common import load_run
from sparsenet.device import choose_device


def run(args: argparse.Namespace) -> int:
    from sparsenet.predict import find_images, predict

    device = choose_device(args.device)
    trained = load_run(args, device)
    found = []
    for result in predict(trained, find_images(args.images), args.top, args.batch_size):
        found.append(result)
        if args.json:
            continue
        if result.error is not None:
            print(f"sparsenet predict: {result.error}", file=sys.stderr)
        else:
            ranked = zip(result.classes, result.probabilities, strict=True)
            print(f"{result.path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in ranked))
    if args.json:
        print(json.dumps([result.to_dict() for result in found], indent=2))
    return 1 if all(result.error is not None for result in found) else 0
