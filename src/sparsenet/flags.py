"""The command line's words: every command, its flags and their help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from sparsenet import __version__, presets
from sparsenet import config as settings
from sparsenet.export import FORMATS, RUNTIMES


class Parser(argparse.ArgumentParser):
    """Errors are exceptions, so that they can be told in one line; flags are never abbreviated."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            expected = f"expected one of {', '.join(known)}, found {value!r}{settings.nearest(str(value), known)}"
            raise argparse.ArgumentError(action, expected)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The flags, ``-`` and ``_`` being the same in their names; ``ValueError`` with the nearest valid one."""
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        flags = [_underscored(argument) for argument in arguments[:end]]
        found, unknown = self.parse_known_args([*flags, *arguments[end:]])
        if unknown:
            command = self._subparsers._group_actions[0].choices[found.command]  # type: ignore[union-attr,index]
            near = settings.nearest(unknown[0].split("=")[0], command._option_string_actions, 0.6)
            hint = near or f"; see sparsenet {found.command} --help"
            raise ValueError(f"{found.command}: unknown argument {unknown[0]!r}{hint}")
        return found


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def parser() -> Parser:
    """The program's parser."""
    parser = Parser(
        prog="sparsenet", description="Train, evaluate and use sparsely aggregated networks."
    )
    parser.add_argument("--version", action="version", version=f"sparsenet {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    train = commands.add_parser(
        "train",
        help="train a network and write a run folder",
        description="Trains a network and writes a run folder, whose path is the last line. Settings come from a "
        "preset (digits without data of your own, paper for c10 and c100, short for your images), then --config, "
        "then flags.",
    )
    train.add_argument("--out", default="", help="the run folder; default: a new one in runs/")
    train.add_argument("--resume", default="", metavar="RUN", help="go on with a run")
    train.add_argument(
        "--preset", default="", help=f"settings to start from: {', '.join(presets.PRESETS)}"
    )
    train.add_argument(
        "--config",
        default="",
        metavar="RUN",
        help="settings of another run: its folder or config.json",
    )
    settings.add_flags(train)

    evaluate = commands.add_parser("eval", help="error of a run on its test images")
    _run_flags(evaluate)
    evaluate.add_argument("--batch_size", type=_at_least_1, default=256, help="images at a time")
    evaluate.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16"), help="arithmetic"
    )
    evaluate.add_argument(
        "--engine", default="torch", choices=("torch", *RUNTIMES), help="what runs the network"
    )
    _data_flags(evaluate)

    predict = commands.add_parser("predict", help="classes of image files")
    _run_flags(predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or globs")
    predict.add_argument("--top", type=_at_least_1, default=5, help="classes to show")
    predict.add_argument("--batch_size", type=_at_least_1, default=64, help="images at a time")
    _add_export(commands)

    report = commands.add_parser("report", help="one HTML page that compares runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of them")
    report.add_argument(
        "--out",
        default="",
        help="the page, its picture beside it; default: in the first run folder",
    )
    report.add_argument(
        "--filters",
        action="store_true",
        help="draw how layers weigh their sources into each folder",
    )
    report.add_argument(
        "--markdown", action="store_true", help="print the table as Markdown instead"
    )
    _add_tools(commands)
    return parser


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="write one file that runs elsewhere, or weights to give away"
    )
    _run_flags(export, as_json=False)
    export.add_argument(
        "--format",
        default="onnx",
        choices=tuple(FORMATS),
        help="; or ".join(kind.help for kind in FORMATS.values()),
    )
    export.add_argument(
        "--out", default="", help="the file; default: model.FORMAT in the run folder"
    )
    export.add_argument("--opset", type=_at_least_1, default=None, help="ONNX operator set")
    _data_flags(export)


def _add_tools(commands: Any) -> None:
    """The commands that need no run."""
    models = commands.add_parser("models", help="the named networks with parameters and MACs")
    models.add_argument("pattern", nargs="?", default="*", help="such as 'sparsenet*'")
    _json_flag(models)

    check = commands.add_parser("check", help="what this machine offers")
    check.add_argument("--dataset_dir", default="", help="data to look at")
    check.add_argument(
        "--measure",
        action="store_true",
        help="time the implementations anew, for auto; leave it alone",
    )
    _json_flag(check)


def _run_flags(parser: argparse.ArgumentParser, as_json: bool = True) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder; or a weights file, its https address, or its name (sparsenet models)",
    )
    parser.add_argument(
        "--checkpoint", default="best", choices=("best", "last"), help="which weights"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, npu, mps, xpu, …")
    if as_json:
        _json_flag(parser)


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="", help="other data than the run's: as for train")
    parser.add_argument("--dataset_dir", default="", help="where the data lies now")


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON value on stdout and nothing else"
    )


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
