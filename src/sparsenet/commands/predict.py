"""``sparsenet predict``."""

from __future__ import annotations

import argparse

from sparsenet.commands.common import json_text, load_network
from sparsenet.data.tree import describe_others
from sparsenet.device import choose_device
from sparsenet.display import say, warn
from sparsenet.predict import find_images, predict


def run(args: argparse.Namespace) -> int:
    trained = load_network(args, choose_device(args.device))
    predictions = []
    found = find_images(args.images)
    if found.others:
        warn(f"sparsenet predict: {describe_others(found.others)}")
    limit = args.max_megapixels
    for prediction in predict(trained, found.images, args.top, args.batch_size, limit):
        predictions.append(prediction)
        if args.json:
            continue
        if prediction.error is not None:
            warn(f"sparsenet predict: {prediction.error}")
        else:
            say(prediction.summary())
    if args.json:
        print(json_text([prediction.to_dict() for prediction in predictions]))
    return 1 if all(prediction.error is not None for prediction in predictions) else 0
