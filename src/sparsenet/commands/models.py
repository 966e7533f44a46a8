"""``sparsenet models``."""

from __future__ import annotations

import argparse
from typing import Any

from sparsenet import weights, zoo
from sparsenet.commands.common import print_result
from sparsenet.graph import count


def run(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for name in zoo.list_models(args.pattern):
        size = zoo.image_size(name)
        parameters, macs = count(zoo.architecture(name), size)
        row = {"name": name, "parameters": parameters, "macs": macs, "image_size": size}
        rows.append({**row, "pretrained": _pretrained(name)})
    if not rows:
        raise ValueError(
            f"sparsenet models: expected a pattern that fits a name, found {args.pattern!r}"
        )
    lines = [f"{'name':<28}{'parameters':>12}{'MACs':>16}  {'at':<6}pretrained"]
    for r in rows:
        known = r["pretrained"]
        shown = "{error:.2f} % on {dataset}".format(**known["measured"]["fp32"]) if known else ""
        side = f"{r['image_size']}²"
        lines.append(
            f"{r['name']:<28}{r['parameters']:>12,}{r['macs']:>16,}  {side:<6}{shown}".rstrip()
        )
    return print_result(rows, lines, args.json)


def _pretrained(name: str) -> dict[str, Any] | None:
    """What the weights that come with the package for a network say of themselves."""
    about = weights.load_shipped(name).about if name in weights.shipped() else None
    return about and {key: about[key] for key in ("dataset", "epoch", "measured")}
