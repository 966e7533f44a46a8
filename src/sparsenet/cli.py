"""The command line: the only room that prints to users or exits.

Exit codes: 0 done, 1 a run failed, 2 a bad call (one line on stderr says what was expected and found),
130 or 143 stopped by Ctrl-C or SIGTERM after saving.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import torch

from sparsenet import config as settings
from sparsenet import flags, ops, presets, weights, zoo
from sparsenet.architecture import count
from sparsenet.config import RunConfig
from sparsenet.data import DataConfig
from sparsenet.device import choose_device, tune_process
from sparsenet.display import display
from sparsenet.extras import MissingExtra
from sparsenet.run import Run, Trained, load_trained

if TYPE_CHECKING:
    from sparsenet.data import Dataset
    from sparsenet.export import ExportReport, Runtime, WeightsReport

FAILED, BAD_CALL = 1, 2


def _train(args: argparse.Namespace) -> int:
    from sparsenet.train import train

    run, config = _resumed(args) if args.resume else _new_run(args)
    try:
        with run.locked(), _Signals() as stop:
            reason = display(train(config, run, bool(args.resume), stop), run)
    finally:
        run.discard_if_unused()
    if reason:
        print(f"go on with: sparsenet train --resume {run.path}")
    print(run.path)
    return 128 + stop.number if stop.number is not None else 0


class _Signals:
    """Ctrl-C and SIGTERM ask the run to save and end; a second one ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> _Signals:
        self.before = {n: signal.signal(n, self._received) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> str | None:
        return None if self.number is None else signal.Signals(self.number).name


def _new_run(args: argparse.Namespace) -> tuple[Run, RunConfig]:
    given = vars(args)
    file = _config_file(args)
    base = presets.preset(args.preset) if args.preset else RunConfig()
    if not args.preset and not file:
        base = presets.preset(presets.preset_for(given.get("dataset", "auto"), given.get("dataset_dir", "")))
    if file:
        base = settings.load(file, base)
    config = settings.from_flags(given, base)
    return Run.create(Path(args.out) if args.out else _default_folder(config)), config


def _config_file(args: argparse.Namespace) -> Path | None:
    file = Path(args.config)
    return None if not args.config else file / "config.json" if file.is_dir() else file


def _default_folder(config: RunConfig) -> Path:
    net, data = config.network, config.data
    name = data.dataset if data.dataset != "auto" else Path(data.dataset_dir).name or "digits"
    fetch = net.fetch.replace(":", "") if isinstance(net.fetch, str) else "custom"
    growth = "_".join(map(str, dict.fromkeys(net.growth_rates)))
    bottleneck = "bc-" if net.bottleneck else ""
    stem = f"{name}-{fetch}-{bottleneck}{net.depth}-{growth}-{datetime.now():%Y%m%d-%H%M%S}"
    taken = sum(1 for _ in Path("runs").glob(f"{stem}*"))
    return Path("runs") / (f"{stem}-{taken}" if taken else stem)


def _resumed(args: argparse.Namespace) -> tuple[Run, RunConfig]:
    if args.out and Path(args.out).resolve() != Path(args.resume).resolve():
        raise ValueError(f"--out: a resumed run stays in its folder, expected {args.resume}, found {args.out}")
    run = Run.open(Path(args.resume))
    old = run.config()
    base = presets.preset(args.preset) if args.preset else old
    file = _config_file(args)
    new = settings.from_flags(vars(args), settings.load(file, base) if file else base)
    if changed := settings.differences(old, new):
        raise ValueError(f"--resume {run.path}: settings differ from the run's: {'; '.join(changed)}")
    return run, new


def _load(args: argparse.Namespace, device: torch.device) -> Trained:
    trained = load_trained(args.run, args.checkpoint, device)
    for warning in trained.warnings:
        print(f"sparsenet: warning: {warning}", file=sys.stderr)
    return trained


def _eval(args: argparse.Namespace) -> int:
    from sparsenet.evaluate import evaluate

    runtime = _runtime(args)
    device = choose_device("cpu" if runtime else args.device)
    precision = runtime.precision if runtime else ops.choose_precision(args.precision, device, training=False)
    trained = _load(args, device)
    data = _data_now(args, trained)
    model = runtime.load(trained, data.test.pixels[: args.batch_size]) if runtime else trained.model
    stated = trained.info.get("measured", {}).get(precision)
    own = "fp32" if runtime else precision  # what PyTorch is left to do
    found = evaluate(model, data.test, trained.preprocessing, device, args.batch_size, own)
    value = {
        "run": args.run, "dataset": data.name, "checkpoint": args.checkpoint, "engine": args.engine,
        "precision": precision, "error": found.error, "top5_error": found.top5_error, "loss": found.loss,
        "images": found.images, "seconds": found.seconds, "class_errors": found.class_errors(data.classes),
        "stated_error": stated and stated["error"],
    }  # fmt: skip
    lines = [
        f"{data.name}: {found.images} images in {found.seconds:.2f} s{f' by {args.engine}' if runtime else ''}",
        f"error {found.error:.2f} %, top-5 error {found.top5_error:.2f} %, loss {found.loss:.4f}",
        *(f"  {name}: {'no image' if e is None else f'{e:.2f} %'}" for name, e in value["class_errors"].items()),
    ]
    if stated:
        of = f"{stated['images']} images of {stated['dataset']}"
        lines.append(f"stated: {stated['error']:.2f} % ({precision}), for {of}")
    return _print(value, lines, args.json)


def _runtime(args: argparse.Namespace) -> Runtime | None:
    """The engine that was asked for in PyTorch's place."""
    from sparsenet.export import Runtime

    if args.engine == "torch":
        return None
    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--device: expected auto or cpu with --engine {args.engine}, found {args.device!r}")
    return Runtime(args.engine, args.precision)


def _data_now(args: argparse.Namespace, trained: Trained) -> Dataset:
    """The run's images, or those that the flags name; ``ValueError`` where they have other classes."""
    from sparsenet.data import load_dataset

    if not (trained.path.is_dir() or args.dataset_dir or args.dataset == "digits"):
        expected = "the folder of the test images, which a weights file does not know (or --dataset digits)"
        raise ValueError(f"--dataset_dir: expected {expected}, found none")
    stored = _stored_data(trained)
    dataset = args.dataset or ("auto" if args.dataset_dir and stored.dataset == "digits" else stored.dataset)
    asked = dataclasses.replace(
        stored,
        dataset=dataset,
        dataset_dir=args.dataset_dir or ("" if dataset == "digits" else stored.dataset_dir),
        dataset_name="" if args.dataset or args.dataset_dir else stored.dataset_name,
        image_size=trained.preprocessing.size,
        in_chans=trained.preprocessing.channels,
        download=False,
    )
    data = load_dataset(asked)
    if data.classes != trained.classes:
        raise ValueError(
            f"--dataset_dir: expected the {len(trained.classes)} classes of the training {list(trained.classes)[:5]}, "
            f"found {len(data.classes)} classes {list(data.classes)[:5]}"
        )
    return data


def _stored_data(trained: Trained) -> DataConfig:
    """What a run or a weights file says of its data; a weights file only how its test images are found."""
    if trained.path.is_dir():
        return Run.open(trained.path).config().data
    told = trained.info["recipe"]["data"]
    return DataConfig(test_fraction=told["test_fraction"], skip_corrupt=told["skip_corrupt"])


def _predict(args: argparse.Namespace) -> int:
    from sparsenet.predict import find_images, predict

    device = choose_device(args.device)
    trained = _load(args, device)
    found = []
    for result in predict(trained, find_images(args.images), args.top, args.batch_size):
        found.append(result)
        if args.json:
            continue
        if result.error is not None:
            print(f"sparsenet predict: {result.error}", file=sys.stderr)
        else:
            ranked = zip(result.classes, result.probabilities, strict=True)
            print(f"{result.path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in ranked))
    if args.json:
        print(json.dumps([result.to_dict() for result in found], indent=2))
    return FAILED if all(result.error is not None for result in found) else 0


def _export(args: argparse.Namespace) -> int:
    report = EXPORTS[args.format](args)
    print(report.summary())
    return 0


def _export_onnx(args: argparse.Namespace) -> ExportReport:
    from sparsenet.export import export_onnx

    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--device: expected auto or cpu with --format onnx, found {args.device!r}")
    trained = _load(args, choose_device("cpu"))
    try:
        real = _data_now(args, trained).test.pixels[:64]
    except ValueError as error:
        if args.dataset or args.dataset_dir:
            raise
        print(f"sparsenet export: compared on random inputs only, the data is not here ({error})", file=sys.stderr)
        real = None
    return export_onnx(trained, _target(args, trained), real, args.opset)


def _export_weights(args: argparse.Namespace) -> WeightsReport:
    from sparsenet.export import export_weights

    if args.opset is not None:
        raise ValueError(f"--opset: expected none with --format safetensors, found {args.opset}")
    trained = _load(args, choose_device(args.device))
    return export_weights(trained, _target(args, trained), _data_now(args, trained))


EXPORTS: dict[str, Callable[[argparse.Namespace], ExportReport | WeightsReport]] = {
    "onnx": _export_onnx, "safetensors": _export_weights,
}  # fmt: skip


def _target(args: argparse.Namespace, trained: Trained) -> Path:
    """The file to write: as asked, or by default in the run folder; for weights in the folder where one is."""
    if args.out:
        return Path(args.out)
    if trained.path.is_dir():
        return trained.path / f"model.{args.format}"
    return Path(f"{Path(urlsplit(args.run).path).stem or 'model'}.{args.format}")


def _models(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for name in zoo.list_models(args.pattern):
        size = zoo.image_size(name)
        parameters, macs = count(zoo.architecture(name), size)
        row = {"name": name, "parameters": parameters, "macs": macs, "image_size": size}
        rows.append({**row, "pretrained": _pretrained(name)})
    if not rows:
        raise ValueError(f"sparsenet models: expected a pattern that fits a name, found {args.pattern!r}")
    lines = [f"{'name':<28}{'parameters':>12}{'MACs':>16}  {'at':<6}pretrained"]
    for r in rows:
        known = r["pretrained"]
        shown = "{error:.2f} % on {dataset}".format(**known["measured"]["fp32"]) if known else ""
        side = f"{r['image_size']}²"
        lines.append(f"{r['name']:<28}{r['parameters']:>12,}{r['macs']:>16,}  {side:<6}{shown}".rstrip())
    return _print(rows, lines, args.json)


def _pretrained(name: str) -> dict[str, Any] | None:
    """What the weights that come with the package for a network say of themselves."""
    about = weights.load_shipped(name).about if name in weights.shipped() else None
    return about and {key: about[key] for key in ("dataset", "epoch", "measured")}


def _report(args: argparse.Namespace) -> int:
    from sparsenet.filters import draw_filters
    from sparsenet.records import markdown_table, read_rows, update
    from sparsenet.report import write_report

    runs = [Path(run) for run in args.runs]
    if bool(runs) == bool(args.update):
        raise ValueError("sparsenet report: expected either run folders or --update with a page")
    if args.markdown and (args.filters or args.out):
        raise ValueError("sparsenet report: expected --markdown, which prints the table, without --filters and --out")
    if args.update:
        count = update(Path(args.update))
        print(f"{args.update}: {count} table{'s' * (count != 1)} written anew")
    elif args.markdown:
        print(markdown_table(read_rows(runs)), end="")
    else:
        for run in [run for row in read_rows(runs) for run in row["runs"]] if args.filters else ():
            try:
                draw_filters(load_trained(run).model, run / "filters.png", run.name)
            except ValueError as error:  # a run that sums, or without weights; the page is about the others too
                print(f"sparsenet report: {run}: no picture of filters: {error}", file=sys.stderr)
        folder = next((run for run in runs if run.is_dir()), Path())
        print(write_report(runs, Path(args.out) if args.out else folder / "report.html"))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from sparsenet.bench import BenchConfig, bench
    from sparsenet.bench.plots import write
    from sparsenet.bench.tables import report

    names = [f.name for f in dataclasses.fields(BenchConfig) if f.name in args]
    given: dict[str, Any] = {name: vars(args)[name] for name in names}
    if given.get("variants") == []:
        raise ValueError("--variants: expected names such as reference-fp32,native-bf16, found none")
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    found = bench(BenchConfig(**given))
    if args.out:
        write(found, Path(args.out))
    return _print(found, report(found), args.json)


def _check(args: argparse.Namespace) -> int:
    from sparsenet.check import check, lines

    found = check(args.dataset_dir, args.measure)
    return _print(found, lines(found), args.json)


def _print(value: Any, lines: Sequence[str], as_json: bool) -> int:
    print(json.dumps(value, indent=2) if as_json else "\n".join(lines))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train, "eval": _eval, "predict": _predict, "export": _export,
    "models": _models, "report": _report, "bench": _bench, "check": _check,
}  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    from sparsenet.train import DivergedError

    try:
        args = flags.parser().parse(arguments)
        return COMMANDS[args.command](args)
    except (ValueError, MissingExtra) as error:
        code = BAD_CALL
        message = error
    except (DivergedError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        code = FAILED
        message = error  # type: ignore[assignment]
    said = " ".join(str(message).split()) or "out of memory"  # only a MemoryError says nothing
    print(f"sparsenet: {said}", file=sys.stderr)
    return code


def main() -> NoReturn:
    """The program ``sparsenet``."""
    tune_process()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
