"""``sparsenet train``."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sparsenet import config as settings
from sparsenet import presets, ranks
from sparsenet.commands.common import Signals
from sparsenet.config import RunConfig, TrainConfig
from sparsenet.data.config import POINTERS
from sparsenet.display import display, say
from sparsenet.events import Stopped
from sparsenet.files import failure
from sparsenet.flags import from_flags
from sparsenet.memory import shortage
from sparsenet.ranks import Ranks
from sparsenet.run import Run
from sparsenet.train import train


def run(args: argparse.Namespace) -> int:
    """Trains a new run or goes on with one; returns 128 + the signal that stopped it, else 0."""
    timeout = TrainConfig.rank_timeout
    with suppress(ValueError):  # which the first process refuses
        timeout = float(vars(args).get("rank_timeout", timeout))
    with ranks.joined(timeout) as joined:
        return _run(args, joined) if joined.is_first else _follow(joined)


def _follow(joined: Ranks) -> int:
    """Trains with the first process, which has the run."""
    path, config, resumed = joined.tell(("", RunConfig(), False))
    stopped = None
    with Signals() as signals:
        for event in train(config, Run(Path(path)), resumed, signals.received, joined):
            if isinstance(event, Stopped):
                stopped = event.reason
    return _exit_code(stopped)


def _run(args: argparse.Namespace, joined: Ranks) -> int:
    # Of this command, before a launcher started it again.
    if previous := ranks.previous_out(args.out):
        args.resume = previous if (Path(previous) / "config.json").exists() else None
    run, config = _resumed_run(args) if args.resume else _new_run(args)
    ranks.remember_out(str(run.path.resolve()))
    joined.tell((str(run.path), config, bool(args.resume)))
    try:
        with run.locked(), Signals() as signals:
            events = train(config, run, bool(args.resume), signals.received, joined)
            stopped = display(events, run)
    except BrokenPipeError:
        raise
    except OSError as error:  # such as a full disk; those of the data are a ``DataError``
        advice = f"; {_go_on(run)}" if run.is_described else ""
        raise OSError(f"{run.path}: the run broke off: {failure(error)}{advice}") from error
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (said := shortage(error)):
            raise
        less = "a new run with a smaller --batch_size needs less"
        advice = f"; {_go_on(run)} --memory lean; or {less}" if run.is_described else f"; {less}"
        raise MemoryError(f"{run.path}: the run broke off: {said}{advice}") from error
    code = _exit_code(stopped)
    if stopped and not run.is_described:  # while it read the images
        return code
    if stopped:
        say(_go_on(run))
    say(str(run.path))
    return code


def _exit_code(stopped: str | None) -> int:
    # A signal that came while the result was written has stopped nothing.
    if stopped and stopped in signal.Signals.__members__:
        return 128 + signal.Signals[stopped]
    return 0


def _go_on(run: Run) -> str:
    return f"go on with: sparsenet train --resume {run.path}"


def _new_run(args: argparse.Namespace) -> tuple[Run, RunConfig]:
    base = RunConfig()
    if args.preset:
        base = presets.preset(args.preset)
    elif not args.config:
        data = getattr(args, "dataset", "auto"), getattr(args, "dataset_dir", "")
        labelled = getattr(args, "labels", "")
        base = presets.preset("short" if labelled else presets.preset_for(*data))
    config = _with_settings(args, base)
    if args.out:
        return Run.create(Path(args.out)), config
    return Run.create_one_of_its_own(Path("runs") / _name(config)), config


def _resumed_run(args: argparse.Namespace) -> tuple[Run, RunConfig]:
    if args.out and Path(args.out).resolve() != Path(args.resume).resolve():
        raise ValueError(
            f"--out: a resumed run stays in its folder, expected {args.resume}, found {args.out}"
        )
    run = Run.open(Path(args.resume))
    old = run.config()
    new = _with_settings(args, presets.preset(args.preset) if args.preset else old)
    if changed := settings.differences(old, new):
        raise ValueError(
            f"--resume {run.path}: settings differ from the run's: {'; '.join(changed)}"
        )
    return run, new


def _with_settings(args: argparse.Namespace, base: RunConfig) -> RunConfig:
    """*base* with the settings of ``--config`` and then of the flags."""
    if args.config:
        path = Path(args.config)
        base = settings.load(path / "config.json" if path.is_dir() else path, base)
        given = {name: vars(args)[name] for name in POINTERS if name in vars(args)}
        base = dataclasses.replace(base, data=base.data.pointed_at(given))
    return from_flags(vars(args), base)


def _name(config: RunConfig) -> str:
    """What is trained and when."""
    net, data = config.network, config.data
    name = data.dataset if data.dataset != "auto" else Path(data.dataset_dir).name or "digits"
    fetch = net.fetch.replace(":", "") if isinstance(net.fetch, str) else "custom"
    growth = "_".join(map(str, dict.fromkeys(net.growth_rates)))
    bottleneck = "bc-" if net.bottleneck else ""
    return f"{name}-{fetch}-{bottleneck}{net.depth}-{growth}-{datetime.now():%Y%m%d-%H%M%S}"
