"""Compares implementations of a network: ``python -m benchmarks.bench``.

Exit codes: 0 done, 1 out of memory or a file that cannot be written, 2 a bad call or a variant
that is wrong; one line on stderr says what was expected and found.
"""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.bench.comparison import MEASURES, BenchConfig, bench
from benchmarks.bench.plots import write_record
from benchmarks.bench.tables import report
from benchmarks.bench.variants import OPTIONS, Variant
from sparsenet.device import tune_process
from sparsenet.extras import MissingExtra
from sparsenet.flags import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    tune_process()
    try:
        flags = vars(_parser().parse_args(arguments))
        out, as_json = flags.pop("out"), flags.pop("json")
        lists = {name: tuple(value) for name, value in flags.items() if isinstance(value, list)}
        record = bench(BenchConfig(**flags | lists))
        if out:
            write_record(record, Path(out))
        as_text = "\n".join(report(record))
        print(msgspec.json.format(msgspec.json.encode(record)).decode() if as_json else as_text)
        return 0
    except (ValueError, MissingExtra) as error:
        code, message = 2, str(error)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        code, message = 1, str(error)
    print("sparsenet bench:", " ".join(message.split()) or "out of memory", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.bench", description=__doc__)

    def add(name: str, kind: Callable[[str], object], help: str) -> None:
        default = getattr(BenchConfig, name)
        how: dict[str, Any] = {"metavar": "VALUE"}
        if isinstance(default, tuple):
            how = {"metavar": "LIST", "action": "extend"}
            default = ",".join(default)
        shown = f"{help} (default {default})" if default else help
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*names, type=kind, default=argparse.SUPPRESS, help=shown, **how)

    add("model", _list_of(str), "names of 'sparsenet models', or run folders")
    add("batch_size", _at_least(1), "images a step")
    add("image_size", _at_least(0), "pixels; default: what the network is made for")
    add("steps", _at_least(1), "counted steps of each variant")
    add(
        "precision",
        _list_of(_one_of("fp32", "bf16")),
        "arithmetic of what is compared without --variants; default: fp32 on a CPU, else both",
    )
    add(
        "variants",
        _list_of(Variant.parse),
        "what to compare, as reference-fp32,shared-bf16; "
        f"options: -{', -'.join(OPTIONS)}; default: all that can run",
    )
    add(
        "measures",
        _list_of(_one_of(*MEASURES, "none")),
        f"what to measure, of {','.join(MEASURES)}; parts are those of the peak of memory; "
        "none: nothing but the depths",
    )
    add(
        "depths",
        _list_of(_at_least(7)),
        "also a sweep over depths, sparse and dense, as 40,100,250,500,1000",
    )
    add("device", str, "auto, cpu, cuda, …")
    parser.add_argument(
        "--out", default="", metavar="DIR", help="write a record and pictures there"
    )
    parser.add_argument("--json", action="store_true", help="print the record instead of tables")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
        return int(text)

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ArgumentTypeError(f"expected some of {','.join(choices)}, found {text!r}")
        return text

    return parse


def _list_of(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
    def parse(text: str) -> list[object]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise ArgumentTypeError(f"expected at least one value, found none in {text!r}")
        try:
            return [kind(part) for part in parts]
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return parse


if __name__ == "__main__":
    sys.exit(main())
