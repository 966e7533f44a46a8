"""``sparsenet check``."""

from __future__ import annotations

import argparse

from sparsenet.commands.common import print_result


def run(args: argparse.Namespace) -> int:
    from sparsenet.check import check, lines

    found = check(args.dataset_dir, args.measure)
    return print_result(found, lines(found), args.json)
