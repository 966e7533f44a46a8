"""The command line's words: every command, its flags and their help. Nothing here loads PyTorch."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from sparsenet import __version__, presets
from sparsenet.config import COMPONENTS, Setting, settings
from sparsenet.data.config import POINTERS, READING
from sparsenet.data.splits import split_of
from sparsenet.export import FORMATS, RUNTIMES
from sparsenet.files import with_home
from sparsenet.serving.limits import Limits
from sparsenet.texts import nearest
from sparsenet.topology import fetch_from_file

# Flags of other programs whose names do not lead to ours, and what takes their place here.
INSTEAD = {
    "amp": "--precision bf16",
    "arch": "--model",
    "batch": "--batch_size",
    "bs": "--batch_size",
    "data": "--dataset_dir",
    "data_dir": "--dataset_dir",
    "data_path": "--dataset_dir",
    "drop": "--dropout",
    "epochs": "--max_epoch",
    "finetune": "--weights",
    "gpu": "--device cuda",
    "half": "--precision bf16",
    "img": "--image_size",
    "img_size": "--image_size",
    "imgsz": "--image_size",
    "learning_rate": "--lr",
    "lr_scheduler": "--schedule",
    "num_classes": "no flag, the data has the classes",
    "num_workers": "no flag, images are decoded once, before training",
    "opt": "--optimizer",
    "output_dir": "--out",
    "pretrained": "--weights",
    "project": "--out",
    "root": "--dataset_dir",
    "save_dir": "--out",
    "sched": "--schedule",
    "source": "the images without a flag",
    "wd": "--weight_decay",
    "workers": "no flag, images are decoded once, before training",
}
EXAMPLES: dict[str, tuple[type[int] | type[float], str]] = {  # of settings with several numbers
    "growth_rate": (int, "16,32,64"),
    "blocks": (int, "16,32,64"),
    "grey_range": (float, "0,4095"),
    "mean": (float, "0.485,0.456,0.406"),
    "std": (float, "0.229,0.224,0.225"),
}
PRECISIONS = ("auto", "fp32", "bf16")
MOST = 10**6  # images at a time, classes to show
# Of each command two examples, and of one with many flags those that are used most.
SHOWN: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "train": (
        (
            "sparsenet train --dataset_dir photos",
            "sparsenet train --dataset_dir photos --weights sparsenet_100_24 --freeze stage1",
        ),
        (
            *("dataset_dir", "labels", "weights", "model", "preset"),
            *("max_epoch", "batch_size", "lr", "out", "resume"),
        ),
    ),
    "eval": (
        ("sparsenet eval RUN", "sparsenet eval RUN --dataset_dir photos --predictions out.csv"),
        (
            *("run", "dataset_dir", "labels", "split", "predictions", "precision"),
            *("mirror", "engine", "batch_size", "checkpoint", "device", "json"),
        ),
    ),
    "predict": (("sparsenet predict RUN photo.jpg", "sparsenet predict RUN photos --explain"), ()),
    "serve": (
        ("sparsenet serve RUN", "sparsenet serve RUN --host 0.0.0.0 --port 80"),
        (
            *("run", "host", "port", "allowed_hosts", "batch_size", "queue"),
            *("max_images", "max_mb", "max_megapixels", "checkpoint", "device"),
        ),
    ),
    "export": (
        (
            "sparsenet export RUN",
            "sparsenet export RUN --format safetensors --out birds.safetensors",
        ),
        (
            *("run", "format", "out", "opset", "dataset_dir", "labels"),
            *("checkpoint", "device", "split", "cache", "skip_corrupt"),
        ),
    ),
    "models": (("sparsenet models", "sparsenet models 'densenet*'"), ()),
    "report": (
        ("sparsenet report runs", "sparsenet report runs/a runs/b --out comparison.html"),
        (),
    ),
    "check": (("sparsenet check", "sparsenet check --dataset_dir photos"), ()),
}
TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Help(argparse.Action):
    """Prints the flags that are used most, with examples, or all of them, and ends."""

    def __call__(
        self, parser: Any, namespace: object, values: Any, option: str | None = None
    ) -> None:
        text = parser.format_help() if values == "all" else parser.format_short_help()
        parser._print_message(text, sys.stdout)
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser that raises ``ValueError`` in one line and takes no abbreviated flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, add_help=False, **kwargs)
        text = "show this; all: every flag there is"
        options: dict[str, Any] = {
            "nargs": "?",
            "action": Help,
            "metavar": "all",
            "default": argparse.SUPPRESS,
        }
        self.add_argument("-h", "--help", help=text, **options)

    def format_short_help(self) -> str:
        """Of a command: its examples, and the flags that are used most."""
        command = self.prog.partition(" ")[2]
        examples, often = SHOWN.get(command, ((), ()))
        if not often:
            return self.format_help() + self._examples(examples)
        formatter = self._get_formatter()
        needed = [str(action.metavar) for action in self._actions if not action.option_strings]
        formatter.add_usage(" ".join(["%(prog)s [FLAGS]", *needed]), (), ())
        formatter.add_text(self.description)
        formatter.start_section("flags used most")
        actions = {action.dest: action for action in self._actions}
        formatter.add_arguments([actions[name] for name in often])
        formatter.end_section()
        rest = f"\nevery flag: {self.prog} --help all\n"
        return formatter.format_help() + self._examples(examples) + rest

    def _examples(self, examples: Sequence[str]) -> str:
        return "".join(["\nexamples:\n", *(f"  {each}\n" for each in examples)] if examples else [])

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = nearest(str(value), known)
            expected = f"expected one of {', '.join(known)}, found {value!r}{hint}"
            raise argparse.ArgumentError(action, expected)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses the arguments of a command; ``-`` and ``_`` are the same in the name of a flag.

        Raises ``ValueError``, for an unknown flag with the nearest one.
        """
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        flags = [_with_underscores(argument) for argument in arguments[:end]]
        parsed, unknown = self.parse_known_args([*flags, *arguments[end:]])
        if unknown:
            parser, name = self, self.prog
            if self._subparsers:
                name = parsed.command
                parser = self._subparsers._group_actions[0].choices[name]  # type: ignore[index]
            hint = _hint(unknown[0], parser._option_string_actions)
            hint = hint or f"; see {parser.prog} --help"
            raise ValueError(f"{name}: unknown argument {unknown[0]!r}{hint}")
        return parsed


def _hint(argument: str, flags: Collection[str]) -> str:
    """What somebody who wrote an unknown *argument* may have meant, given a command's *flags*."""
    name, equals, _ = argument.partition("=")
    if not name.startswith("-"):
        if not equals:
            where = "--dataset_dir"
            return f"; did you mean {where} {argument}?" if where in flags else ""
        name = f"--{name}"
    instead = INSTEAD.get(name.strip("-"), "")
    flag = instead.split()[0] if instead.startswith("--") else ""
    if instead and not flag:
        return f"; here: {instead}"
    if flag in flags:
        return f"; did you mean {instead}?"
    return nearest(name, flags, 0.6)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def parser() -> Parser:
    """Returns the program's parser."""
    program = Parser(
        prog="sparsenet", description="Train, evaluate and use sparsely aggregated networks."
    )
    program.add_argument("--version", action="version", version=f"sparsenet {__version__}")
    commands = program.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    _add_train(commands)
    _add_eval(commands)
    _add_predict(commands)
    _add_serve(commands)
    _add_export(commands)
    _add_models(commands)
    _add_report(commands)
    _add_check(commands)
    return program


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a network and write a run folder",
        description="Trains a network and writes a run folder, whose path is the last line. "
        "Settings come from a preset (digits without data of your own, paper for c10 and c100, "
        "finetune with --weights, short for your images), then --config, then flags.",
    )
    text = "the run folder; default: a new one in runs/"
    train.add_argument("--out", type=_given, help=text)
    train.add_argument("--resume", type=_given, metavar="RUN", help="go on with a run")
    names = ", ".join(presets.PRESETS)
    train.add_argument("--preset", type=_given, help=f"settings to start from: {names}")
    text = "a network of sparsenet models, which flags may change"
    train.add_argument("--model", type=_given, metavar="NAME", help=text)
    text = "settings of another run: its folder or config.json; or a JSON or YAML file of some"
    train.add_argument("--config", type=_given, metavar="RUN", help=text)
    for component in COMPONENTS:
        group = train.add_argument_group(f"{component} (defaults without a preset)")
        for each in settings():
            if each.component == component:
                _add_setting(group, each)


def _add_setting(group: Any, setting: Setting) -> None:
    """Adds the flag of a setting; where it is not given, it leaves no trace in the namespace."""
    default = str(setting.default).lower()
    if isinstance(setting.default, tuple):
        default = ",".join(map(str, setting.default))
    shown = setting.help
    if default not in ("", "0", "0.0", "false"):
        shown += f" (default {default})"
    choices = tuple(map(str, setting.choices)) or None
    if choices:
        shown += f"; one of {', '.join(choices)}"
    optional_value = {"nargs": "?", "const": "true"} if setting.kind is bool else {}
    group.add_argument(
        f"--{setting.name}",
        default=argparse.SUPPRESS,
        choices=choices,
        help=shown,
        metavar="VALUE",
        type=_given if setting.name in (*POINTERS, "weights") else None,
        **optional_value,
    )


def values(flags: Mapping[str, str]) -> dict[str, Any]:
    """The settings that *flags*, names to texts of the command line, give, by their names."""
    known = {each.name: each for each in settings()}
    return {name: _value_of(known[name], flags[name]) for name in known if name in flags}


def _value_of(setting: Setting, text: str) -> Any:
    """Returns the value that *text* stands for; ``ValueError`` if it is none of the setting's."""
    if setting.kind is bool:
        value: Any = TRUTH.get(text.lower())
        expected = "true or false"
    elif setting.kind in (int, float):
        value = _number(setting.kind, text)
        expected = "a whole number" if setting.kind is int else "a number"
    elif setting.name in EXAMPLES:
        kind, example = EXAMPLES[setting.name]
        numbers = [_number(kind, part) for part in text.split(",")]
        value = None if None in numbers else tuple(numbers)
        expected = f"{'whole numbers' if kind is int else 'numbers'} like {example}"
    elif setting.name == "fetch" and ".py:" in text:
        return fetch_from_file(with_home(text))
    else:
        return text
    if value is None:
        raise ValueError(f"--{setting.name}: expected {expected}, found {text!r}")
    return value


def _number(kind: type[int] | type[float], text: str) -> int | float | None:
    try:
        number = kind(text)
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):  # such as a whole number that no float can be
        return None


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="error of a run on its test images")
    _add_run(evaluate)
    _add_json(evaluate)
    evaluate.add_argument(
        "--batch_size", type=_at_least_1, default=256, help="images at a time (default 256)"
    )
    text = "fp32, bf16, or auto (default): the run's fp32, else what is fastest here"
    evaluate.add_argument("--precision", default="auto", choices=PRECISIONS, help=text)
    engines = ("torch", *RUNTIMES)
    text = f"what runs the network: {', '.join(engines)} (default torch)"
    evaluate.add_argument("--engine", default="torch", choices=engines, help=text)
    text = "take the mean over each image and its mirror image"
    evaluate.add_argument("--mirror", action="store_true", help=text)
    text = "write a CSV file with path, true and predicted class and all probabilities"
    evaluate.add_argument("--predictions", type=_given, metavar="FILE", help=text)
    _add_data(evaluate)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="classes of image files")
    _add_run(predict)
    _add_json(predict)
    text = "files, folders or globs"
    predict.add_argument("images", nargs="+", type=_given, metavar="IMAGE", help=text)
    predict.add_argument("--top", type=_at_least_1, default=5, help="classes to show (default 5)")
    predict.add_argument(
        "--batch_size", type=_at_least_1, default=64, help="images at a time (default 64)"
    )
    text = "fp32 (default), bf16, or auto: what is fastest here"
    predict.add_argument("--precision", default="fp32", choices=PRECISIONS, help=text)
    text = "say what the first class is due to, and draw a heat map beside each picture"
    predict.add_argument("--explain", action="store_true", help=text)
    text = "a folder for the heat maps, instead of beside the pictures; implies --explain"
    predict.add_argument("--explain_dir", type=_given, metavar="FOLDER", help=text)
    _add_limit(predict)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP, with a page for pictures",
        description="Answers requests for the classes of pictures until it is stopped. "
        "Its address is the first line.",
    )
    _add_run(serve)
    text = "address to listen at (default: this machine only)"
    serve.add_argument("--host", type=_given, default="127.0.0.1", help=text)
    serve.add_argument("--port", type=_port, default=8000, help="0: a free one (default 8000)")
    text = "names that it is called by, with commas (default: any; of this machine only its own)"
    serve.add_argument("--allowed_hosts", type=_names, default=(), metavar="NAMES", help=text)
    text = "largest picture that is decoded, a JPEG as well (default: as for the training)"
    serve.add_argument("--max_megapixels", type=_positive, default=None, help=text)
    for each in fields(Limits):
        kind = _at_least_1 if isinstance(each.default, int) else _positive
        text = f"{each.metadata['help']} (default {each.default})"
        serve.add_argument(f"--{each.name}", type=kind, default=each.default, help=text)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="write one file that runs elsewhere, or weights to give away"
    )
    _add_run(export)
    text = "; or ".join(each.help for each in FORMATS.values())
    export.add_argument("--format", default="onnx", choices=tuple(FORMATS), help=text)
    text = "the file, or with hf the folder; default: model.FORMAT or NAME-hf in the run folder"
    export.add_argument("--out", type=_given, help=text)
    export.add_argument("--opset", type=_at_least_1, default=None, help="ONNX operator set")
    _add_data(export)


def _add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="the named networks with parameters and MACs")
    models.add_argument("pattern", nargs="?", default="*", help="such as 'sparsenet*'")
    _add_json(models)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="one HTML page that compares runs")
    text = "run folders, or folders of them"
    report.add_argument("runs", nargs="*", type=_given, metavar="RUN", help=text)
    text = "the page, its picture beside it; default: in the first run folder"
    report.add_argument("--out", type=_given, help=text)
    text = "draw how layers weigh their sources into each folder"
    report.add_argument("--filters", action="store_true", help=text)
    text = "print the table as Markdown instead"
    report.add_argument("--markdown", action="store_true", help=text)


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="what this machine offers, and what is fastest on it")
    for name in POINTERS:
        text = f"data to look at, as for train: {_help_of(name)}"
        check.add_argument(f"--{name}", type=_given, help=text)
    text = "time the implementations anew, for auto; leave the machine alone meanwhile"
    check.add_argument("--measure", action="store_true", help=text)
    _add_json(check)


def _add_run(parser: argparse.ArgumentParser) -> None:
    text = (
        "a run folder; or weights: a file or what --format hf writes, an address of these "
        "(https://, hf://OWNER/NAME), or a name (sparsenet models)"
    )
    parser.add_argument("run", type=_given, metavar="RUN", help=text)
    kinds = ("best", "last")
    parser.add_argument(
        "--checkpoint", default="best", choices=kinds, help="weights: best (default) or last"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, npu, mps, …")


def _add_data(parser: argparse.ArgumentParser) -> None:
    for name in POINTERS:
        text = f"other data than the run's, as for train: {_help_of(name)}"
        parser.add_argument(f"--{name}", type=_given, help=text)
    _add_limit(parser)
    for each in settings():
        if each.name in READING:
            _add_setting(parser, each)
    text = "train, val or test; default: test, else val, else what was not trained on"
    parser.add_argument("--split", type=_split, default=None, help=text)


def _add_limit(parser: argparse.ArgumentParser) -> None:
    text = f"{_help_of('max_megapixels')} (default: as for the training)"
    parser.add_argument("--max_megapixels", type=_positive, default=None, help=text)


def _split(text: str) -> str:
    meaning = split_of(text)
    if not meaning:
        raise argparse.ArgumentTypeError(f"expected train, val or test, found {text!r}")
    return meaning[0]


def _given(text: str) -> str:
    """*text*, with ``~`` for the user's home, which no shell writes out in ``--out=~/run``.

    Refused is one without a character, such as of a variable that a script has not set.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a value, found an empty one")
    return with_home(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower() for name in text.split(","))
    if not all(re.fullmatch(r"\*|[^\s:/]+|\[[0-9a-f:.]+\]", name) for name in names):
        expected = "names as photos.example.org, without ports"
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
    return names


def _port(text: str) -> int:
    number = _number(int, text)
    if number is None or not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return int(number)


def _positive(text: str) -> float:
    number = _number(float, text)
    if number is None or number <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return number


def _help_of(name: str) -> str:
    return next(each.help for each in settings() if each.name == name)


def _add_json(parser: argparse.ArgumentParser) -> None:
    text = "one JSON value on stdout and nothing else"
    parser.add_argument("--json", action="store_true", help=text)


def _at_least_1(text: str) -> int:
    number = _number(int, text)
    if number is None or not 1 <= number <= MOST:
        expected = f"expected a whole number of at least 1 and at most {MOST:,}"
        raise argparse.ArgumentTypeError(f"{expected}, found {text!r}")
    return int(number)
