"""``sparsenet train``."""

from __future__ import annotations

import argparse
import signal
from datetime import datetime
from pathlib import Path
from types import FrameType

from sparsenet import config as settings
from sparsenet import presets
from sparsenet.config import RunConfig
from sparsenet.display import display
from sparsenet.flags import from_flags
from sparsenet.run import Run
from sparsenet.train import train


def run(args: argparse.Namespace) -> int:
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
        base = presets.preset(
            presets.preset_for(given.get("dataset", "auto"), given.get("dataset_dir", ""))
        )
    if file:
        base = settings.load(file, base)
    config = from_flags(given, base)
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
        raise ValueError(
            f"--out: a resumed run stays in its folder, expected {args.resume}, found {args.out}"
        )
    run = Run.open(Path(args.resume))
    old = run.config()
    base = presets.preset(args.preset) if args.preset else old
    file = _config_file(args)
    new = from_flags(vars(args), settings.load(file, base) if file else base)
    if changed := settings.differences(old, new):
        raise ValueError(
            f"--resume {run.path}: settings differ from the run's: {'; '.join(changed)}"
        )
    return run, new
