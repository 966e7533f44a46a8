"""``sparsenet check``: what this machine offers."""

from __future__ import annotations

import argparse

from sparsenet.check import check, lines
from sparsenet.commands.common import print_result
from sparsenet.data.config import POINTERS, DataConfig


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in POINTERS if getattr(args, name)}
    report = check(DataConfig(**given) if given else None, args.measure)
    return print_result(report, lines(report), args.json)
