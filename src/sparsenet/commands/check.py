"""``sparsenet check``: what this machine offers."""

from __future__ import annotations

import argparse

from sparsenet.check import check, lines
from sparsenet.commands.common import print_result


def run(args: argparse.Namespace) -> int:
    report = check(args.dataset_dir, args.measure)
    return print_result(report, lines(report), args.json)
