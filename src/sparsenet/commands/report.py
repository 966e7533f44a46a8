"""``sparsenet report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparsenet.display import say, warn
from sparsenet.pictures import draw_filters
from sparsenet.records import read_summaries
from sparsenet.report import is_page, write_report, wrote
from sparsenet.summary import HEADINGS, markdown_table
from sparsenet.trained import load_trained


def run(args: argparse.Namespace) -> int:
    """Writes a page about runs, or prints their table."""
    # Among runs, as the shell's runs/* names them, may lie the page of an earlier report.
    paths = [path for path in map(Path, args.runs) if not is_page(path)]
    if not paths:
        raise ValueError("report: expected RUN, a run folder or a folder of some, found none")
    if args.markdown and (args.filters or args.out):
        expected = "--markdown, which prints the table, without --filters and --out"
        raise ValueError(f"report: expected {expected}")
    if args.markdown:
        rows = read_summaries(paths)
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            names = [", ".join(str(run.path) for run in row.runs) for row in rows]
        cells = [{"run": name, **row.cells()} for name, row in zip(names, rows, strict=True)]
        say(*markdown_table(cells, {"run": "run", **HEADINGS}).splitlines())
        if any(row.errors and not row.is_final for row in rows):
            say("", "\\* last epoch so far, no final result")
        return 0
    if args.filters:
        _draw_filters(paths)
    folder = next((path for path in paths if path.is_dir()), Path())
    target = Path(args.out) if args.out else folder / "report.html"
    if not args.out and target.exists() and not wrote(target):
        raise ValueError(
            f"report: expected no other page at {target}, found one that is no report; --out names "
            "another, or it again to replace it"
        )
    say(str(write_report(paths, target)))
    return 0


def _draw_filters(paths: Sequence[Path]) -> None:
    for run in [run.path for row in read_summaries(paths) for run in row.runs]:
        try:
            trained = load_trained(run)
            for warning in trained.warnings:
                warn(f"sparsenet report: {run}: {warning}")
            draw_filters(trained.model, run / "filters.png", run.name)
        except (OSError, ValueError) as error:
            # This run sums or has no weights, or its folder cannot be written; the page is about
            # the others, too.
            warn(f"sparsenet report: {run}: no picture of filters: {error}")
