"""Mutated inputs for everything that the library reads.

A reader returns a right value or raises a ``ValueError`` whose message is one line of at most 2,000
characters that names the input. It ends within 10 seconds of work and 1.5 GiB of memory. A case is
a function of the reader's name and a seed: ``python -m tests.fuzzing --reader all --count 200``
runs many, each in a child process with these limits, and says each distinct failure once;
``--replay NAME:SEED`` repeats one with its traceback. ``test_fuzzing.py`` draws from them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from readers import LONGEST, READERS, Base, Case, Refused, Wrong, make_case

import sparsenet

SOURCES = Path(sparsenet.__file__).parent
SECONDS, WAIT = 10, 25  # of processor time for a case; of time until its process is killed
MEMORY = 3 << 29  # bytes that a case may take
HELPERS = ("validation.py", "errors.py")  # whose callers say more


class Hang(BaseException):
    """A case has used up its time."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


class Verdict(NamedTuple):
    """What became of a case: what was wrong in a few words, and whether a value was returned."""

    problem: str | None
    accepted: bool


def judge(case: Case) -> Verdict:
    """Reads a case."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        verdict = _judge(case)
    if verdict.problem is None and warned:
        problem = f"warning: {warned[0].category.__name__}: {str(warned[0].message)[:80]}"
        return verdict._replace(problem=problem)
    return verdict


def _judge(case: Case) -> Verdict:
    try:
        case.read()
    except Refused:
        return Verdict(None, False)
    except Wrong as wrong:
        return Verdict(f"wrong value: {wrong}", True)
    except ValueError as error:
        return Verdict(_problem_of_message(error, case.names), False)
    except (Hang, Exception) as error:  # noqa: BLE001 - all of them are findings
        kind = "hang" if isinstance(error, Hang) else f"{type(error).__name__}"
        return Verdict(f"{kind} at {_own_line(error)}: {_short(error)}", False)
    return Verdict(None, True)


def _problem_of_message(error: ValueError, names: Sequence[object]) -> str | None:
    message, place = str(error), _own_line(error)
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) or "allocate memory" in str(chain):
            return f"memory at {_own_line(chain)}: {_short(error)}"
        chain = chain.__cause__ or chain.__context__
    if len(message) > LONGEST:
        return f"{len(message):,} characters at {place}: {_short(error)}"
    if len(message.splitlines()) != 1:
        return f"{len(message.splitlines())} lines at {place}: {_short(error)}"
    if names and not any(str(name) in message for name in names):
        return f"names no file at {place}: {_short(error)}"
    return None


def _short(error: BaseException) -> str:
    return repr(str(error)[:240])


def _own_line(error: BaseException) -> str:
    """The innermost line of the library in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if str(SOURCES) in frame.filename]
    own = [frame for frame in own if Path(frame.filename).name not in HELPERS] or frames[-1:]
    if not own:
        return "?"
    path = Path(own[-1].filename)
    shown = path.relative_to(SOURCES) if path.is_relative_to(SOURCES) else path.name
    return f"{shown}:{own[-1].lineno}"


def distinct(problem: str) -> str:
    """What two problems of one cause have in common."""
    if problem.startswith(("wrong", "warning")):
        return ": ".join(re.sub(r"\d+", "N", problem).split(": ")[:2])
    return re.sub(r"^[\d,]+ ", "", problem.partition(": ")[0])


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _work(name: str, seeds: Sequence[int], base: Base, folder: Path, tell: IO[str]) -> None:
    """Runs cases in this process, which ends with them, and tells of each."""
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _hang)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for seed in seeds:
        print(json.dumps([seed]), file=tell, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        try:
            case = make_case(name, seed, base, folder)
        except Exception:  # noqa: BLE001 - told by the parent
            fault = f"fault of the fuzzer: {traceback.format_exc()[-2000:]}"
            print(json.dumps([seed, fault, False]), file=tell, flush=True)
            continue
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            verdict = judge(case)
        except Hang:
            verdict = Verdict("hang at an end", False)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([seed, *verdict]), file=tell, flush=True)


def run_cases(
    name: str, seeds: Sequence[int], base: Base, folder: Path
) -> Iterator[tuple[int, Verdict]]:
    """Each seed with the verdict on its case, from child processes."""
    rest = list(seeds)
    while rest:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            with os.fdopen(write_end, "w") as tell:
                _work(name, rest[:100], base, folder, tell)
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb", buffering=0) as told:
            current, is_late = None, False
            for line in _lines(told):
                if line is None:
                    os.kill(child, signal.SIGKILL)
                    is_late = True
                    break
                current, *verdict = json.loads(line)
                if verdict:
                    rest.remove(current)
                    yield current, Verdict(*verdict)
                    current = None
        _, status = os.waitpid(child, 0)
        if current is not None:
            rest.remove(current)
            code = os.waitstatus_to_exitcode(status)
            death = f"hang of {WAIT} s" if is_late else f"end of the process ({code})"
            yield current, Verdict(f"{death} at an unknown line: ", False)


def _lines(told: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a pipe, and ``None`` where there is nothing for too long."""
    buffer = b""
    while True:
        if not select.select([told], [], [], WAIT)[0]:
            yield None
        data = told.read(1 << 16)
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        yield from lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", default="all", help=f"all, or of {', '.join(READERS)}")
    parser.add_argument("--count", type=int, default=200, help="cases of each reader")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that failed")
    parser.add_argument("--replay", metavar="READER:SEED", help="one case, with its traceback")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as name:
        base = Base(Path(name) / "base")
        base.folder.mkdir()
        if args.replay:
            _replay(args.replay, base, Path(name))
            return
        names = list(READERS) if args.reader == "all" else args.reader.split(",")
        failed = 0
        for each in names:
            failed += _fuzz(each, args, base, Path(name))
    sys.exit(1 if failed else 0)


def _replay(what: str, base: Base, folder: Path) -> None:
    name, _, seed = what.rpartition(":")
    place = folder / "case"
    place.mkdir()
    case = make_case(name, int(seed), base, place)
    print("\n".join(str(path) for path in sorted(place.rglob("*")) if path.is_file()))
    os.chdir(place)
    print(judge(case))
    case.read()


def _fuzz(name: str, args: argparse.Namespace, base: Base, folder: Path) -> int:
    began = time.monotonic()
    trial = folder / "trial"
    trial.mkdir()
    make_case(name, 0, base, trial)  # the base is made here and not in each child
    shutil.rmtree(trial)
    found: Counter[str] = Counter()
    place = folder / "case"
    accepted = 0
    for seed, verdict in run_cases(name, range(args.seed, args.seed + args.count), base, place):
        accepted += verdict.accepted
        if verdict.problem is None:
            continue
        key = distinct(verdict.problem)
        found[key] += 1
        if found[key] == 1:
            print(f"{name}:{seed}: {verdict.problem}", flush=True)
            if args.keep and not key.startswith("fault"):
                kept = args.keep / f"{name}-{seed}"
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir(parents=True)
                make_case(name, seed, base, kept)
    share = f"{args.count} cases, {accepted} accepted, {len(found)} distinct failures"
    print(f"{name}: {share}, {time.monotonic() - began:.0f} s", flush=True)
    for key, count in found.most_common():
        print(f"    {count:5d} {key}")
    return len(found)


if __name__ == "__main__":
    main()
