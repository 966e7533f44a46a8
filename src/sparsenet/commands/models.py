"""``sparsenet models``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sparsenet import weights, zoo
from sparsenet.commands.common import print_result
from sparsenet.graph import count


def run(args: argparse.Namespace) -> int:
    names = zoo.list_models(args.pattern)
    if not names:
        expected = "a pattern that fits a name"
        raise ValueError(f"models: expected {expected}, found {args.pattern!r}")
    rows: list[dict[str, Any]] = []
    lines = [f"{'name':<28}{'parameters':>12}{'MACs':>16}  {'at':<6}pretrained"]
    for name in names:
        size = zoo.image_size(name)
        parameters, macs = count(zoo.architecture(name), size)
        row = {"name": name, "parameters": parameters, "macs": macs, "image_size": size}
        line = f"{name:<28}{parameters:>12,}{macs:>16,}  {f'{size}²':<6}"
        if name in weights.shipped():
            about = weights.load_shipped(name).about
            measured = {precision: asdict(each) for precision, each in about.measured.items()}
            pretrained = {"dataset": about.dataset, "epoch": about.epoch, "measured": measured}
            rows.append({**row, "pretrained": pretrained})
            line += f"{about.measured['fp32'].error:.2f} % on {about.measured['fp32'].dataset}"
        else:
            rows.append({**row, "pretrained": None})
        lines.append(line.rstrip())
    return print_result(rows, lines, args.json)
