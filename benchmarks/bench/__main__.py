"""``python -m benchmarks.bench``: the command line of the side-by-side benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench import BenchConfig, bench
from benchmarks.bench.plots import write
from benchmarks.bench.tables import report
from sparsenet.device import tune_process


def main(arguments: list[str]) -> int:
    tune_process()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, allow_abbrev=False
    )
    _bench_flags(parser)
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="also write bench.json, bench.md and pictures there",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON value on stdout and nothing else"
    )
    args = parser.parse_args(arguments)
    names = [f.name for f in dataclasses.fields(BenchConfig) if f.name in args]
    given: dict[str, Any] = {name: vars(args)[name] for name in names}
    try:
        if given.get("variants") == []:
            raise ValueError(
                "--variants: expected names such as reference-fp32,native-bf16, found none"
            )
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        found = bench(BenchConfig(**given))
    except ValueError as error:
        print(f"benchmarks.bench: {error}", file=sys.stderr)
        return 2
    if args.out:
        write(found, Path(args.out))
    print(json.dumps(found, indent=2) if args.json else "\n".join(report(found)))
    return 0


def _bench_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; flags not given leave no trace in the namespace."""
    for f in dataclasses.fields(BenchConfig):
        how: dict[str, Any] = {"action": "store_true"}
        shown = f.metadata["help"]
        if isinstance(f.default, tuple):
            how = {
                "type": _whole_numbers if f.name == "depths" else _names,
                "action": "extend",
                "metavar": "LIST",
            }
            shown = f"{shown} (default {','.join(f.default)})" if f.default else shown
        elif not isinstance(f.default, bool):
            how = {
                "type": type(f.default) if isinstance(f.default, str) else _whole_number,
                "metavar": "VALUE",
            }
            shown = shown if f.default in (0, -1) else f"{shown} (default {f.default})"
        if f.name == "epoch":
            how |= {"nargs": "?", "const": 0}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=shown, **how)


def _whole_number(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def _whole_numbers(text: str) -> list[int]:
    return [_whole_number(part) for part in _names(text)]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
