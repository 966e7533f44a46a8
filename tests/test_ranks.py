"""Several processes train as one does, and when one of them fails all end, with nothing lost.

They are started as launchers do it, by variables of the environment, and once by torchrun.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Call, write_image
from safetensors.torch import load_file

from sparsenet import train
from sparsenet.config import RunConfig, replace
from sparsenet.data.dataset import Images
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.data.sampling import plan_epoch
from sparsenet.evaluation import recompute_statistics
from sparsenet.events import Reading, Stopped
from sparsenet.model import SparseNet
from sparsenet.ops import synchronised
from sparsenet.optim import new_optimizer
from sparsenet.ranks import ALONE, LostError, Ranks
from sparsenet.run import Run
from sparsenet.stage import synchronise_statistics
from sparsenet.step import TrainingStep

TESTS = Path(__file__).parent
LONG = ("train", *TINY, "--max_epoch", "4", "--precision", "fp32", "--sync_statistics", "on")
PATIENT = 60.0  # seconds in which everything ends


STARTED: list[Process] = []


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


class Process(subprocess.Popen[str]):
    """One of two processes."""

    def __init__(self, rank: int, arguments: Sequence[object], port: int, **environment: str):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        super().__init__(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **own, **place, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        STARTED.append(self)

    def read_until(self, text: str) -> None:
        assert self.stdout is not None
        said = ""
        while text not in said:
            line = self.stdout.readline()
            assert line, said
            said += line

    def end(self) -> tuple[int, str]:
        """The exit code, and the last line that was printed."""
        said, _ = self.communicate(timeout=PATIENT)
        assert "Traceback" not in said, said
        return self.returncode, (said.splitlines() or [""])[-1]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def two(*arguments: object, by: Sequence[object] = ("-m", "sparsenet")) -> list[Process]:
    port = free_port()
    return [Process(rank, [*by, *arguments], port) for rank in range(2)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").glob("last-*.safetensors")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing interrupted."""
    run = tmp_path_factory.mktemp("ranks") / "whole"
    assert [each.end()[0] for each in two(*LONG, "--out", run)] == [0, 0]
    return run


# --- what is computed -----------------------------------------------------------------------------


def test_statistics_in_common_are_those_of_one_process() -> None:
    port, script = free_port(), TESTS / "ranks_laws.py"
    both = [Process(rank, [script, "triton"], port, TRITON_INTERPRET="1") for rank in range(2)]
    for rank, process in enumerate(both):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert f"rank {rank} agrees" in said


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_are_the_whole_batch(size: int) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    for count in range(1, 70):
        parts = [each.part(count) for each in ranks]
        for part in parts:  # pairs stay together, in the order in which ``mix`` pairs them
            assert torch.equal(count - 1 - part, part.flip(0))
        whole = count // 2 < size
        assert len(torch.cat(parts)) == (size * count if whole else count)
        assert sorted(torch.cat(parts).unique().tolist()) == list(range(count))
        means, sums = zip(*(each.shares(count) for each in ranks), strict=True)
        assert sum(means) == pytest.approx(1)
        total = sum(share * len(part) for share, part in zip(sums, parts, strict=True))
        assert total == pytest.approx(count)
        pieces = [list(range(count))[each.piece(count)] for each in ranks]
        assert [image for piece in pieces for image in piece] == list(range(count))


def test_images_that_all_processes_have_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with fewer pairs than processes is computed whole by each; here both are this one."""

    def both(tensor: torch.Tensor, **_: object) -> None:
        tensor.mul_(2)

    network = {"depth": 7, "growth_rate": 4, "in_chans": 1, "num_classes": 3}
    config = replace(RunConfig(), {"network": network})
    torch.manual_seed(0)
    alone = SparseNet(config.network, "reference")
    ours = copy.deepcopy(alone)
    synchronise_statistics(ours)
    monkeypatch.setattr(torch.distributed, "all_reduce", both)
    monkeypatch.setattr(synchronised, "group_of", lambda module: object())
    pixels = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    moves = plan_epoch(0, 0, 3, config.data).moves
    preprocessing = Preprocessing(8, 1, (0.5,), (0.25,))
    images, rate = Images(pixels, torch.arange(3)), torch.tensor(0.1)
    for model, size in ((alone, 1), (ours, 2)):
        ranks, optimizer = Ranks(0, size), new_optimizer(model, config.optim)
        step = TrainingStep(model, optimizer, None, config, preprocessing, "fp32", ranks)
        step(pixels, images.labels, rate, rate, torch.tensor(ranks.shares(3)), *moves)
    torch.testing.assert_close(ours.state_dict(), alone.state_dict())
    for model, size in ((alone, 1), (ours, 2)):
        device = torch.device("cpu")
        recompute_statistics(model, images, preprocessing, device, 3, ranks=Ranks(0, size))
    torch.testing.assert_close(ours.state_dict(), alone.state_dict())


def test_two_processes_train_as_one(whole: Path, call: Call, tmp_path: Path) -> None:
    """Sums are rounded in another order, which grows from step to step."""
    assert call(*LONG, "--out", tmp_path / "alone").code == 0
    found, expected = Run(whole).metrics(), Run(tmp_path / "alone").metrics()
    for one, other in zip(found, expected, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=10**-5 * 10**one.epoch)
    assert found[0].test_error == expected[0].test_error
    assert "\n2 processes, cpu, fp32" in (whole / "train.log").read_text()


def test_processes_run_out_of_patience_together(tmp_path: Path) -> None:
    settings = (*LONG, "--lr", 1, "--max_epoch", 12, "--val_fraction", 0.2, "--patience", 1)
    settings += ("--class_weights", "balanced", "--mixup", 0.2, "--dataset_dir", tmp_path / "data")
    for label, count in enumerate((40, 12)):
        for number in range(count):
            write_image(tmp_path / "data" / str(label) / f"{number}.png", 100 * label + number)
    run = tmp_path / "run"
    assert [each.end()[0] for each in two(*settings, "--out", run)] == [0, 0]
    errors = [row.val_error for row in Run(run).metrics()]
    assert len(errors) < 12 and len(errors) - 1 - errors.index(min(errors)) == 1
    assert f"ended after epoch {len(errors)} of 12" in (run / "train.log").read_text()


def test_statistics_of_each_process_are_averaged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = "--sync_statistics", "off", "--max_epoch", "2", "--out", run
    assert [each.end()[0] for each in two(*LONG, *own)] == [0, 0]
    assert "all processes together" not in (run / "train.log").read_text()
    error = float(re.findall(r"test error ([\d.]+) %", (run / "train.log").read_text())[0])
    assert error < 60  # of 90 that chance has


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_step(
    told: int, whole: Path, call: Call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = two(*LONG, "--out", run)
    both[0].read_until("epoch 1/4")
    both[told].send_signal(signal.SIGTERM)
    assert [each.end()[0] for each in both] == [143, 143]
    assert "saved and stopped: SIGTERM" in (run / "train.log").read_text()
    if told == 1:  # another number of processes is said
        outcome = call("train", "--resume", run)
        assert outcome.code == 0 and "warning: 1 processes instead of 2" in outcome.out
        return
    assert [each.end()[0] for each in two("train", "--resume", run)] == [0, 0]
    found, expected = tensors(run), tensors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_or_freezes_ends_all(
    rank: int, number: signal.Signals, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = two(*LONG, "--out", run, "--save_every", 0, "--rank_timeout", 5)
    both[0].read_until("epoch 1/4")
    both[rank].send_signal(number)
    began = time.monotonic()
    code, last = both[1 - rank].end()
    assert code == 1 and time.monotonic() - began < PATIENT
    assert last.startswith(
        f"sparsenet: rank {1 - rank}: expected the 2 processes of the run, found"
    )
    if rank == 1:  # else what all could read went with the first process
        assert "rank 1 that was killed, hangs or cannot be reached" in last
    both[rank].kill()
    both[rank].communicate()
    assert list((run / "checkpoints").glob("last-*.safetensors"))


FAILING = """
import os, sys
from sparsenet import cli, files, step
failing, what = sys.argv.pop(1).split(",")
def fails(*arguments, **settings):
    raise {"save": OSError(28, "No space left on device"), "step": MemoryError("of a test")}[what]
if os.environ["RANK"] == failing and what == "save":
    files.write_atomic.__globals__["os"].replace = fails
if os.environ["RANK"] == failing and what == "step":
    step.loss_and_mistakes = fails
cli.main()
"""


@pytest.mark.parametrize("waits", [True, False])
def test_a_signal_to_one_that_reads_images_stops_all(waits: bool) -> None:
    """The others read on, or wait for it, and find it gone."""
    store = torch.distributed.HashStore()

    def work(gone: bool) -> Generator[Reading, None, Any]:
        yield Reading("train", 1, 2)
        if gone:
            raise LostError("rank 1: expected the 2 processes of the run, found another")
        yield Reading("train", 2, 2)

    told = train._prepared(work(False), lambda: "SIGTERM", Ranks(0, 2, store))
    other = train._prepared(work(waits), lambda: None, Ranks(1, 2, store))
    first = next(other)
    assert isinstance(first, Reading)
    assert list(told)[1:] == [Stopped("SIGTERM", saved=False)]
    assert list(other) == [Stopped("SIGTERM", saved=False)]


@pytest.mark.parametrize(
    ("failing", "cause"),
    [("0,save", "No space left on device"), ("1,step", "of a test"), ("0,step", "of a test")],
)
def test_the_cause_is_said_last(failing: str, cause: str, tmp_path: Path) -> None:
    both = two(*LONG, "--out", tmp_path / "run", by=("-c", FAILING, failing))
    if failing.startswith("1"):
        both[1].wait(PATIENT)
        both[0].send_signal(signal.SIGTERM)  # as torchrun does when another process has ended
    (first, last), (second, silent) = [each.end() for each in both]
    assert first == second == 1
    assert cause in last and last.startswith("sparsenet: ")
    assert ("rank 1: " in last) == failing.startswith("1")
    assert silent == ""


def test_the_cause_is_said_where_the_first_process_reads_images() -> None:
    """And torchrun has told it to stop, since the other one has ended."""
    store = torch.distributed.HashStore()
    store.set("error/1", "of a test")
    store.set("failed", "")

    def work() -> Generator[Reading, None, Any]:
        yield Reading("train", 1, 2)

    events = train._prepared(work(), lambda: "SIGTERM", Ranks(0, 2, store))
    with pytest.raises(LostError, match="rank 1: of a test"):
        list(events)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number of 1 or more"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected one below WORLD_SIZE, 2, found 2"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK: expected a number of 0 or more"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: expected a number of 1 or more"),
    ],
)
def test_variables_that_no_launcher_sets_are_refused(
    variables: dict[str, str],
    expected: str,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write_image(tmp_path / "data" / "a" / "1.png")
    write_image(tmp_path / "data" / "b" / "2.png")
    outcome = call("train", *TINY, "--dataset_dir", tmp_path / "data", "--out", tmp_path / "run")
    assert outcome.code == 2 and expected in outcome.err


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long a process would wait for others, of each one that begins."""
    found = []

    def joined(timeout: float) -> nullcontext[Ranks]:
        found.append(timeout)
        return nullcontext(ALONE)

    monkeypatch.setattr("sparsenet.ranks.joined", joined)
    return found


@pytest.mark.parametrize("value", ["nan", "1e300", "0", "long"])
def test_a_wait_that_is_none_is_refused_by_the_first_process(
    value: str, call: Call, tmp_path: Path, waits: list[float]
) -> None:
    outcome = call(*LONG, "--rank_timeout", value, "--out", tmp_path / "run")
    assert outcome.code == 2 and "rank_timeout: expected" in outcome.err
    assert waits == [RunConfig().train.rank_timeout]  # by which the others get there


def test_the_wait_is_that_of_a_file_a_run_or_the_flag(
    call: Call, tmp_path: Path, waits: list[float]
) -> None:
    file, run = tmp_path / "config.json", tmp_path / "run"
    file.write_text('{"train": {"rank_timeout": 50.0}}')
    assert call("train", *TINY, "--config", file, "--out", run).code == 0
    assert call("train", "--resume", run).code == 0
    assert call("train", "--resume", run, "--rank_timeout", 40).code == 0
    assert waits == [50, 50, 40]


def test_other_images_in_one_process_are_refused(tmp_path: Path) -> None:
    port, arguments = free_port(), ["-m", "sparsenet", *LONG, "--out", tmp_path / "run"]
    other = ["-c", OTHER_IMAGES, *arguments[2:]]
    both = [Process(0, arguments, port), Process(1, other, port)]
    (first, said), (second, silent) = [each.end() for each in both]
    assert first == second == 2 and silent == ""
    assert "expected the same images in all processes, found others in rank 1" in said


OTHER_IMAGES = """
from sparsenet import cli, preparation
record = preparation.record
preparation.record = lambda data: record(data).__class__("validation")
cli.main()
"""


def test_torchrun_goes_on_after_a_process_was_killed(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [Path(sys.executable).with_name("torchrun"), "--standalone"]
    command += ["--nproc_per_node=2", "--max_restarts=1", "--monitor_interval=0.1"]
    command += ["-m", "sparsenet"]
    command += [*LONG, "--out", run, "--save_every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        said = ""
        while "epoch 1/4" not in said:
            said += agent.stdout.readline()
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        said += agent.stdout.read()
    assert agent.returncode == 0, said
    assert "resumed at step" in (run / "train.log").read_text()
    found, expected = tensors(run), tensors(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
