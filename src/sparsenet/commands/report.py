"""``sparsenet report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparsenet.trained import load_trained


def run(args: argparse.Namespace) -> int:
    from sparsenet.pictures import draw_filters
    from sparsenet.records import read_summaries
    from sparsenet.report import write_report
    from sparsenet.summary import markdown_table

    paths = [Path(run) for run in args.runs]
    if args.markdown and (args.filters or args.out):
        raise ValueError(
            "sparsenet report: expected --markdown, which prints the table, without --filters and "
            "--out"
        )
    if args.markdown:
        print(markdown_table([row.cells() for row in read_summaries(paths)]), end="")
        return 0
    if args.filters:
        for run in [run.path for row in read_summaries(paths) for run in row.runs]:
            try:
                draw_filters(load_trained(run).model, run / "filters.png", run.name)
            except ValueError as error:
                # This run sums or has no weights; the page is about the others, too.
                print(f"sparsenet report: {run}: no picture of filters: {error}", file=sys.stderr)
    folder = next((path for path in paths if path.is_dir()), Path())
    print(write_report(paths, Path(args.out) if args.out else folder / "report.html"))
    return 0
