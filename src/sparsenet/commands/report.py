"""``sparsenet report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparsenet.trained import load_trained


def run(args: argparse.Namespace) -> int:
    from sparsenet.filters import draw_filters
    from sparsenet.records import markdown_table, read_rows, update
    from sparsenet.report import write_report

    runs = [Path(run) for run in args.runs]
    if bool(runs) == bool(args.update):
        raise ValueError("sparsenet report: expected either run folders or --update with a page")
    if args.markdown and (args.filters or args.out):
        raise ValueError(
            "sparsenet report: expected --markdown, which prints the table, without --filters and --out"
        )
    if args.update:
        count = update(Path(args.update))
        print(f"{args.update}: {count} table{'s' * (count != 1)} written anew")
    elif args.markdown:
        print(markdown_table(read_rows(runs)), end="")
    else:
        for run in [run for row in read_rows(runs) for run in row["runs"]] if args.filters else ():
            try:
                draw_filters(load_trained(run).model, run / "filters.png", run.name)
            except (
                ValueError
            ) as error:  # a run that sums, or without weights; the page is about the others too
                print(f"sparsenet report: {run}: no picture of filters: {error}", file=sys.stderr)
        folder = next((run for run in runs if run.is_dir()), Path())
        print(write_report(runs, Path(args.out) if args.out else folder / "report.html"))
    return 0
