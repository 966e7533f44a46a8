"""``sparsenet train``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
from contextlib import closing, suppress
from pathlib import Path

from sparsenet import config as settings
from sparsenet import presets, ranks, zoo
from sparsenet.composition import beneath, check_effect, compose, name_of, pointed, resumed
from sparsenet.config import RunConfig, SettingsFile, TrainConfig
from sparsenet.display import display, say, warn
from sparsenet.events import Stopped
from sparsenet.files import failure
from sparsenet.flags import values
from sparsenet.memory import shortage
from sparsenet.ranks import Ranks
from sparsenet.run import Run
from sparsenet.signals import Signals
from sparsenet.tracking import require_all, tracked
from sparsenet.train import TIME_LIMIT, train


def run(args: argparse.Namespace) -> int:
    """Trains a new run or goes on with one; returns 128 + the signal that stopped it, else 0."""
    with ranks.joined(_rank_timeout(args)) as joined:
        return _run(args, joined) if joined.is_first else _follow(joined)


def _rank_timeout(args: argparse.Namespace) -> float:
    """What flags or a file say; where they are wrong the default, and the first process refuses."""
    with suppress(ValueError, OSError):
        base = Run(Path(args.resume)).config() if args.resume else RunConfig()
        given = {name: text for name, text in vars(args).items() if name == "rank_timeout"}
        if args.config:
            base = settings.load(Path(args.config), base)
        return settings.changed(base, values(given)).train.rank_timeout
    return TrainConfig.rank_timeout


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
        # Signals are the run's until its folder is free: torchrun sends one while it is left.
        with Signals() as signals, run.locked():
            events = train(config, run, bool(args.resume), signals.received, joined)
            with closing(tracked(events, run, config.train.trackers)) as followed:
                stopped = display(followed, run)
    except BrokenPipeError:
        advice = f"; {_go_on(run)}" if run.is_described else ""
        warn(f"sparsenet: {run.path}: the run broke off: nobody reads what it prints{advice}")
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
    if stopped:  # with the same limit it would stop again
        say(_go_on(run) + " --time_limit 0" * (stopped == TIME_LIMIT))
    say(str(run.path))
    return code


def _exit_code(stopped: str | None) -> int:
    # A signal that came while the result was written has stopped nothing.
    if stopped and stopped in signal.Signals.__members__:
        return 128 + signal.Signals[stopped]
    return 0


def _go_on(run: Run) -> str:
    return f"go on with: sparsenet train --resume {shlex.quote(str(run.path))}"


def _new_run(args: argparse.Namespace) -> tuple[Run, RunConfig]:
    base = presets.preset(args.preset) if args.preset else None
    given = values(vars(args))
    file = _settings_file(args)
    if file:
        stated = pointed(file.on(base or RunConfig()), given)
        base = pointed(file.on(beneath(stated, given, base)), given)
    config = compose(given, base, args.model or "")
    if file:
        check_effect(config, file.asked())
    require_all(config.train.trackers)
    if args.out:
        return Run.create(Path(args.out)), config
    return Run.create_one_of_its_own(Path("runs") / name_of(config)), config


def _resumed_run(args: argparse.Namespace) -> tuple[Run, RunConfig]:
    if args.out and Path(args.out).resolve() != Path(args.resume).resolve():
        raise ValueError(
            f"--out: a resumed run stays in its folder, expected {args.resume}, found {args.out}"
        )
    run = Run.open(Path(args.resume))
    new = presets.preset(args.preset) if args.preset else run.config()
    given = values(vars(args))
    if file := _settings_file(args):
        new = pointed(file.on(new), given)
    if args.model:
        new = dataclasses.replace(new, network=zoo.architecture(args.model))
    new = resumed(run, settings.changed(new, given))
    require_all(new.train.trackers)
    return run, new


def _settings_file(args: argparse.Namespace) -> SettingsFile | None:
    if not args.config:
        return None
    file = SettingsFile.read(Path(args.config))
    if args.preset and file.is_of_a_run:
        expected = f"none with {file.source}, which says what all settings of a run were"
        raise ValueError(f"--preset: expected {expected}, found {args.preset!r}")
    return file
