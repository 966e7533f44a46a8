"""Trains networks for equal times: ``python -m benchmarks.defaults OUT --data DIR NETWORK...``.

Every NETWORK is first measured: the time of a training step, memory and size. From that follows how
many steps fit into each number of minutes, and so many are then trained, with a schedule of that
length, whatever else the machine does. Each trial is a file of OUT as soon as it has ended, and a
call leaves out those that are there. Tables of all that OUT holds come last.

Exit codes: 0 done, 2 a bad call, 3 trials are left to be made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

from benchmarks.bench.measure import run_alone
from benchmarks.defaults.candidates import AT_32, AT_96, Candidate
from benchmarks.defaults.record import DIVERGED, Costs, read_trials, table, trial_name
from benchmarks.defaults.training import CUTS, Data, length_of, load, measure, train
from sparsenet.device import tune_process
from sparsenet.files import read_json, write_json
from sparsenet.flags import Parser
from sparsenet.summary import format_duration

SETS = ("50000-32", "5000-96", "500-96")


@dataclass(frozen=True)
class Plan:
    """A trial that is asked for."""

    data: str
    candidate: Candidate
    minutes: float
    seed: int

    @property
    def side(self) -> int:
        return CUTS[self.data].side

    @property
    def name(self) -> str:
        return trial_name(self.data, str(self.candidate), self.minutes, self.seed)

    def file(self, out: Path) -> Path:
        return out / f"{self.name}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    tune_process()
    began = time.monotonic()
    try:
        args = _parser().parse_intermixed_args(arguments)
        args.out.mkdir(parents=True, exist_ok=True)
        plans = plans_of(args.networks, args.sets, args.minutes, args.seeds)
        missing = [plan for plan in plans if not plan.file(args.out).exists()]
        speeds = Speeds(args.speeds or args.out / "speeds.json", args.measure)
        for plan in missing:
            speeds.of(plan)
        left = work(missing, speeds, args, began)
        for name in CUTS:
            if trials := read_trials([args.out / name]):
                print(f"\n{name}\n\n{table(trials)}", end="")
    except ValueError as error:
        print("defaults:", error, file=sys.stderr)
        return 2
    if left:
        print(f"{left} trials are left: call again", file=sys.stderr)
    return 3 if left else 0


def plans_of(
    networks: Sequence[str], sets: Sequence[str], minutes: Sequence[float], seeds: Sequence[int]
) -> list[Plan]:
    """The trials of all combinations, the short ones first; *networks* may be those of the set."""
    plans = []
    for length, seed, name in product(sorted(minutes), seeds, sets):
        texts = networks or (AT_32 if CUTS[name].side == 32 else AT_96)
        plans += [Plan(name, Candidate.parse(text), length, seed) for text in texts]
    return list(dict.fromkeys(plans))


class Speeds:
    """What networks cost, in a file to which those that it lacks are added."""

    def __init__(self, file: Path, seconds: float):
        self.file, self.seconds = file, seconds
        self.known = read_json(file, dict[str, Costs]) if file.exists() else {}

    def of(self, plan: Plan) -> Costs:
        """The costs of a trial's network, which are measured where nothing is known of them."""
        text = str(plan.candidate.measured)
        key = f"{text} at {plan.side}"
        if key not in self.known:
            found = self.known[key] = run_alone(measure, text, plan.side, self.seconds)
            write_json(self.file, self.known)
            step = found.step_seconds[plan.side]
            spread = f"{step.median:.3f} s a step ({step.min:.3f} to {step.max:.3f})"
            print(f"{key}: {found.images_per_second:.0f} images/s, {spread}", flush=True)
        return self.known[key]


def work(plans: Sequence[Plan], speeds: Speeds, args: argparse.Namespace, began: float) -> int:
    """Makes the trials for which there is time, and returns how many are left."""

    @cache
    def loaded(name: str) -> Data:
        return CUTS[name].of(cifar())

    cifar = cache(lambda: load(args.data))
    left = 0
    for plan in plans:
        costs, candidate = speeds.of(plan), plan.candidate
        late = args.limit and time.monotonic() - began + 60 * plan.minutes > 60 * args.limit
        if args.plan or late:
            left += 1
            images = CUTS[plan.data].train_images
            length = length_of(candidate, 60 * plan.minutes, images, costs)
            print(f"{plan.name}: {length.epochs} epochs, {length.steps} steps", flush=True)
            continue
        trial = train(plan.data, loaded(plan.data), candidate, plan.minutes, plan.seed, costs)
        file = plan.file(args.out)
        file.parent.mkdir(exist_ok=True)
        write_json(file, trial)
        error = DIVERGED if trial.error is None else f"{trial.error:.2f} %"
        took = format_duration(trial.seconds)
        print(f"{plan.name}: {error} after {trial.epochs} epochs in {took}", flush=True)
    return left


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m benchmarks.defaults", description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of records")
    text = (
        "a name of sparsenet models or of benchmarks.defaults.plain, with settings as in "
        "sparsenet_40_12+lr=0.4; default at 32 pixels: "
        f"{', '.join(AT_32)}; at 96: {', '.join(AT_96)}"
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=text)
    text = "CIFAR-10, as for sparsenet train --dataset_dir"
    parser.add_argument("--data", required=True, metavar="DIR", help=text)
    lists: dict[str, tuple[Callable[[str], object], str, str]] = {
        "sets": (
            _known_set,
            ",".join(SETS),
            f"some of {', '.join(CUTS)}: how many images of which side",
        ),
        "minutes": (float, "2,10,40", "of training, on the machine of the speeds"),
        "seeds": (int, "0", "of weights and order"),
    }
    for name, (kind, default, text) in lists.items():
        parser.add_argument(
            f"--{name}",
            type=partial(_list_of, kind),
            default=default,
            metavar="LIST",
            help=f"{text} (default {default})",
        )
    text = "speeds of an idle machine; what it lacks is measured (default OUT/speeds.json)"
    parser.add_argument("--speeds", type=Path, metavar="FILE", help=text)
    text = "for which a network is measured"
    parser.add_argument("--measure", type=float, default=10.0, metavar="SECONDS", help=text)
    text = "begin no trial that would end so long after the call"
    parser.add_argument("--limit", type=float, default=0.0, metavar="MINUTES", help=text)
    text = "measure, and say how long trainings would be, but train nothing"
    parser.add_argument("--plan", action="store_true", help=text)
    return parser


def _list_of(kind: Callable[[str], object], text: str) -> list[object]:
    return [kind(part) for part in text.split(",")]


def _known_set(text: str) -> str:
    if text not in CUTS:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CUTS)}, found {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
