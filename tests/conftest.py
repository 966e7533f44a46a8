"""What the tests share: calling the program, a run trained once, data made on the spot."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from sparsenet import capture, checkpoints, conclusion, device, pictures, stage
from sparsenet.data import load
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.files import cache_folder, write_atomic
from sparsenet.ops import dispatch, measured
from sparsenet.weights import Description

TINY = ("--depth", "7", "--growth-rate", "4")  # the smallest network: one layer a stage
CLASSES = ("ant", "bee")
IMAGES = 20  # of each CIFAR batch file
STATISTICS = Preprocessing(size=8, channels=1, mean=(0.5,), std=(0.25,))
# What a checkpoint says of a network that there is none of.
ABOUT = Description("0.1", {"in_chans": 1, "num_classes": 1}, STATISTICS, ("a",), "made up", {})

hypothesis.settings.register_profile(
    "plain", deadline=None
)  # no test depends on how fast the machine is
hypothesis.settings.load_profile("plain")
if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as environment, contextlib.suppress(ImportError):
        environment.setenv(
            "TRITON_INTERPRET", "1"
        )  # read when Triton is first imported: kernels become Python
        import_module("sparsenet.ops.triton")

MEASURE = measured.measure  # the real one
CPU = torch.device("cpu")
Seconds = dict[str, float]
SECONDS = {"native": 1.0, "shared": 2.0, "reference": 3.0}


def _assumed(
    device: torch.device, dtype: torch.dtype, implementations: Iterable[str]
) -> measured.Timings:
    """What a measurement finds in tests."""
    seconds = {
        name: SECONDS[name] * (0.5 if dtype == torch.bfloat16 else 1.0) for name in implementations
    }
    return measured.Timings(seconds, seconds)


def linked_kernels(folder: Path) -> Path:
    """*folder* as a user's cache that holds the compiled kernels and nothing else."""
    dispatch.unavailable("native", CPU)  # compiled now, if they are not yet
    mine = folder / "sparsenet" / "kernels"
    mine.mkdir(mode=0o700, parents=True)
    for kernels in cache_folder().glob("kernels/native-*"):
        (mine / kernels.name).symlink_to(kernels)
    return folder


def _assume_timings() -> None:
    """``auto`` goes by no measurement, neither here nor in processes that tests start."""
    folder = Path(tempfile.mkdtemp(prefix="sparsenet-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(linked_kernels(folder))
    measured.measure = _assumed
    for threads in {1, 2, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        for dtype in dispatch.MEASURED:
            dispatch.timings(CPU, dtype)


_assume_timings()
load.TELL_EVERY = 1e9  # seconds: no test depends on how fast images are read
torch.set_num_threads(1)  # workers share the cores; and results do not depend on how many there are
gc.freeze()  # what is loaded by now is never garbage, and there is a lot of it to look through


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with many cases the first says which lines it runs.

    To count lines takes half as much processor time as the tests themselves.
    """
    counted = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in counted and config.pluginmanager.hasplugin("_cov"):
            item.add_marker("no_cover")
        counted.add(test)


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    """What a stage tells once is told again in each test."""
    stage._told.clear()


# What a run draws at its end, and the tests that look at it.
DRAWN = {
    name: getattr(pictures, name)
    for name in ("draw_curves", "draw_confusion", "draw_reliability", "draw_samples")
}
LOOKING = {"test_pictures", "test_docs", "test_scores", "test_data_names", "test_tracking"}
_drawn: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most runs get the pictures of the first: to draw takes longer than to train."""

    def draw(name: str, *given: Any) -> None:
        (target,) = (each for each in given if isinstance(each, Path))
        if name not in _drawn or getattr(pictures, name) is not DRAWN[name]:
            getattr(pictures, name)(*given)
            _drawn.setdefault(name, target.read_bytes())
        else:
            write_atomic(target, _drawn[name])

    if request.module.__name__ not in LOOKING:
        drawing = {name: partial(draw, name) for name in DRAWN}
        monkeypatch.setattr(conclusion, "pictures", SimpleNamespace(**drawing))


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one call of the program."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def error(self) -> str:
        """The one line on stderr."""
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), (
            f"expected one line, found {self.err!r}"
        )
        assert self.err.startswith("sparsenet"), self.err
        assert "Traceback" not in self.err
        return self.err.strip()


Call = Callable[..., Outcome]


@contextlib.contextmanager
def signals_put_back() -> Iterator[None]:
    """Training in this process takes over signals, which belong to pytest."""
    taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record_on_cpu(
    monkeypatch: pytest.MonkeyPatch, recorder: Callable[[torch.device], object]
) -> None:
    """Steps on the CPU are recorded by what *recorder* makes, as those on CUDA are by graphs."""
    monkeypatch.setitem(
        device.TRAITS, "cpu", dataclasses.replace(device.TRAITS["cpu"], records=True)
    )
    monkeypatch.setattr(capture, "CudaGraphs", recorder)


class Found:
    """Sets what measurements give from now on: seconds by implementation."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def __call__(self, seconds: Seconds, bf16: Seconds | None = None, **inference: float) -> None:
        """And nothing has been measured before."""
        self.monkeypatch.setattr(measured, "_known", {})
        self.monkeypatch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=self.folder))
        self.anew(seconds, bf16, **inference)

    def anew(self, seconds: Seconds, bf16: Seconds | None = None, **inference: float) -> None:
        """What was measured before stays as it is."""

        def measure(
            device: torch.device, dtype: torch.dtype, able: Iterable[str]
        ) -> measured.Timings:
            training = bf16 if bf16 and dtype == torch.bfloat16 else seconds
            return measured.Timings(dict(training), inference or dict(training))

        self.monkeypatch.setattr(measured, "measure", measure)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Found:
    return Found(tmp_path, monkeypatch)


@pytest.fixture
def call(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Runs the program in this process, in an empty folder of its own."""
    from sparsenet import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with signals_put_back():
            try:
                code = cli.run([str(argument) for argument in arguments])
            except SystemExit as leaving:  # --help
                code = int(leaving.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


def _trained(folder: Path, *arguments: object) -> Path:
    from sparsenet import cli

    said = io.StringIO()
    with signals_put_back(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.run(["train", "--out", str(folder), *map(str, arguments)])
    assert code == 0, said.getvalue()
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits: two epochs of 23 steps. Tests that change it take ``copied``."""
    return _trained(tmp_path_factory.mktemp("trained") / "run", *TINY, "--max_epoch", 2)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The digits run in a folder that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copied"))


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders. Read only."""
    return write_classes(tmp_path_factory.mktemp("folder_data") / "insects")


@pytest.fixture(scope="session")
def trained_on_folder(folder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on ``folder_data``. Read only."""
    out = tmp_path_factory.mktemp("trained_on_folder") / "run"
    return _trained(out, *TINY, "--max_epoch", 1, "--batch_size", 4, "--dataset_dir", folder_data)


def write_image(path: Path, seed: int = 0, size: int = 8) -> Path:
    """A colour image of noise."""
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(pixels).save(path)
    return path


def write_classes(
    root: Path, classes: tuple[str, ...] = CLASSES, images: int = 6, seed: int = 0
) -> Path:
    """``root/<class>/<number>.png``; other seeds give other images."""
    for label, name in enumerate(classes):
        for i in range(images):
            write_image(root / name / f"{i}.png", seed=1000 * seed + 100 * label + i)
    return root


def write_cifar10(root: Path) -> Path:
    """A small CIFAR-10, unpacked and binary: six files of ``IMAGES`` records each."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = generator.integers(0, 256, (IMAGES, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(IMAGES) % 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    return folder


def newest(folder: Path, kind: str) -> tuple[checkpoints.Checkpoint, list[str]]:
    """The newest intact checkpoint, and warnings of damaged ones."""
    return checkpoints.restore(folder, kind, lambda checkpoint: checkpoint)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, and its folders; without the empty lock."""
    paths = (path for path in folder.rglob("*") if path.name != ".lock")
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in paths
    }
