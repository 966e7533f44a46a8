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

sys.path.insert(0, str(Path(__file__).parent))

from readers import LONGEST, READERS, Base, Case, Wrong, make_case

import sparsenet

SOURCES = Path(sparsenet.__file__).parent
SECONDS, WAIT = 10, 25  # of processor time for a case; of time until its process is killed
MEMORY = 3 << 29  # bytes that a case may take
HELPERS = ("validation.py", "errors.py")  # whose callers say more


class Hang(BaseException):
    """A case has used up its time."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def judge(case: Case) -> str | None:
    """Reads a case; what was wrong in a few words, ``None`` where nothing was."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        problem = _judge(case)
    if problem is None and warned:
        return f"warning: {warned[0].category.__name__}: {str(warned[0].message)[:80]}"
    return problem


def _judge(case: Case) -> str | None:
    try:
        case.read()
    except Wrong as wrong:
        return f"wrong value: {wrong}"
    except ValueError as error:
        return _problem_of_message(error, case.names)
    except (Hang, Exception) as error:  # noqa: BLE001 - all of them are findings
        kind = "hang" if isinstance(error, Hang) else f"{type(error).__name__}"
        return f"{kind} at {_own_line(error)}: {_short(error)}"
    return None


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
        return re.sub(r"\d+", "N", problem[:90])
    return re.sub(r"^[\d,]+ ", "", problem.partition(": ")[0])


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _work(name: str, seeds: Sequence[int], base: Base, folder: Path, pipe: int) -> None:
    """Runs cases in this process, which ends with them, and tells each of its pipe."""
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _hang)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for seed in seeds:
        os.write(pipe, f"begin {seed}\n".encode())
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        problem: str | None
        try:
            case = make_case(name, seed, base, folder)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            problem = judge(case)
        except Hang:
            problem = "hang at an end"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        line = json.dumps([seed, problem]).encode()
        os.write(pipe, b"end " + line[:3500] + b"\n")


def run_cases(
    name: str, seeds: Sequence[int], base: Base, folder: Path
) -> Iterator[tuple[int, str | None]]:
    """Each seed with the problem of its case, or ``None``, from child processes."""
    rest = list(seeds)
    while rest:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            try:
                _work(name, rest[:100], base, folder, write_end)
                os._exit(0)
            except BaseException:
                os.write(
                    write_end,
                    b"fault "
                    + traceback.format_exc().encode()[-3000:].replace(b"\n", b"\\n")
                    + b"\n",
                )
                os._exit(70)
        os.close(write_end)
        current, buffer = rest[0], b""
        killed = False
        while True:
            ready, _, _ = select.select([read_end], [], [], WAIT)
            if not ready:
                os.kill(child, signal.SIGKILL)
                killed = True
                break
            data = os.read(read_end, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                word, _, text = line.decode().partition(" ")
                if word == "begin":
                    current = int(text)
                elif word == "fault":
                    print(
                        "fault of the fuzzer:",
                        name,
                        current,
                        text.replace("\\n", "\n"),
                        file=sys.stderr,
                    )
                else:
                    seed, problem = json.loads(text)
                    rest.remove(seed)
                    current = -1
                    yield seed, problem
        os.close(read_end)
        _, status = os.waitpid(child, 0)
        if status and current in rest:
            rest.remove(current)
            death = "hang" if killed else f"process ended by {status & 127 or status >> 8}"
            yield current, f"{death} at an unknown line"


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
    for seed, problem in run_cases(name, range(args.seed, args.seed + args.count), base, place):
        if problem is None:
            continue
        key = distinct(problem)
        found[key] += 1
        if found[key] == 1:
            print(f"{name}:{seed}: {problem}", flush=True)
            if args.keep:
                kept = args.keep / f"{name}-{seed}"
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir(parents=True)
                make_case(name, seed, base, kept)
    seconds = time.monotonic() - began
    print(
        f"{name}: {args.count} cases, {len(found)} distinct failures, {seconds:.0f} s", flush=True
    )
    for key, count in found.most_common():
        print(f"    {count:5d} {key}")
    return len(found)


if __name__ == "__main__":
    main()
