"""Training learns, is a function of its settings, and goes on after a kill as if there was none."""

import csv
import dataclasses
import io
import json
import math
import random
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import newest
from PIL import Image
from safetensors.torch import load_file

from sparsenet import Architecture, SparseNet, conclusion, device
from sparsenet.composition import resumed
from sparsenet.config import replace
from sparsenet.data.dataset import Images
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.evaluation import EvaluationStep, evaluate, recompute_statistics
from sparsenet.events import Concluded, EpochDone, Message, Reading, Step, Stopped
from sparsenet.preparation import epochs_for
from sparsenet.presets import preset
from sparsenet.results import EpochMetrics
from sparsenet.run import Run
from sparsenet.state import TrainingState, check_finite
from sparsenet.step import TrainingStep
from sparsenet.train import TIME_LIMIT, DivergedError, _progress, train
from sparsenet.trained import load_trained

TIMES = ("seconds", "images_per_second", "eval_seconds", "peak_memory_mb")  # differ in equal runs
TINY = {
    "network": {"depth": 7, "growth_rate": 4, "dropout": 0.1},
    "optim": {"ema": 0.9, "grad_clip": 5.0},
    "train": {"max_epoch": 3, "batch_size": 256, "device": "cpu"},
    "data": {"val_fraction": 0.1, "mirror": True},
}


def tiny(**changes):
    config = replace(preset("digits"), TINY)
    return replace(config, changes)


def outcome(run):
    """All that a run leaves but times: tensors of the newest checkpoints by kind, and metrics."""
    tensors = {kind: newest(run.checkpoints, kind)[0].tensors for kind in ("last", "best")}
    rows = [dataclasses.replace(row, **dict.fromkeys(TIMES)) for row in run.metrics()]
    return tensors, rows


def assert_same(a, b):
    assert a[1] == b[1]
    for kind in a[0]:
        assert set(a[0][kind]) == set(b[0][kind])
        for name, tensor in a[0][kind].items():
            assert torch.equal(tensor, b[0][kind][name]), (kind, name)


def finished(folder, config):
    run = Run.create(folder)
    for _ in train(config, run):
        pass
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of the tiny configuration."""
    return finished(tmp_path_factory.mktemp("runs") / "whole", tiny())


def test_the_digits_are_learned(tmp_path):
    config = replace(
        preset("digits"), {"train": {"max_epoch": 6, "device": "cpu"}, "network": {"depth": 13}}
    )
    *_, last = train(config, Run.create(tmp_path / "run"))
    assert isinstance(last, Concluded)
    assert last.result.error < 15  # of 90 by chance


def test_the_same_settings_give_the_same_weights(whole, tmp_path):
    assert_same(outcome(finished(tmp_path / "again", tiny())), outcome(whole))


def test_another_seed_gives_others(whole, tmp_path):
    other = finished(tmp_path / "other", tiny(train={"seed": 1}))
    assert other.metrics()[0].train_loss != whole.metrics()[0].train_loss


@pytest.mark.parametrize("stops", [[1], [5, 6], [4, 9, 14], [3, 8]])
def test_stopped_and_resumed_is_as_if_never_stopped(whole, tmp_path, stops):
    run, asked = Run.create(tmp_path / "run"), 0

    def stop_at(step):
        def should_stop():
            nonlocal asked
            asked += 1
            return "a signal" if asked == step else None

        return should_stop

    events = []
    for number, step in enumerate([*stops, 0]):
        events = list(train(tiny(), run, number > 0, stop_at(step)))
        assert isinstance(events[-1], Stopped if step else Concluded)
    assert any(isinstance(e, Message) and e.text.startswith("resumed at step") for e in events)
    assert_same(outcome(run), outcome(whole))


def test_a_run_that_goes_on_has_no_result_until_its_end(tmp_path):
    run = finished(tmp_path / "run", tiny(train={"max_epoch": 1}))
    assert (run.path / "result.json").exists()
    list(train(tiny(), run, True, lambda: "a signal"))
    assert not (run.path / "result.json").exists()  # that of one epoch would be taken for the run's
    list(train(tiny(), run, True))
    assert (run.path / "result.json").exists()


def test_weights_may_lie_otherwise(tmp_path, monkeypatch):
    """As on CUDA; restored momenta lie as their weights do, which the fused update asks for."""
    traits = dataclasses.replace(device.TRAITS["cpu"], weight_layout=torch.channels_last)
    monkeypatch.setitem(device.TRAITS, "cpu", traits)
    whole, run = finished(tmp_path / "whole", tiny()), Run.create(tmp_path / "run")
    for event in train(tiny(), run, should_stop=lambda: "a signal"):
        assert not isinstance(event, Concluded)
    for _ in train(tiny(), run, resume=True):
        pass
    assert not load_trained(run.path).model.stages[0].layers[0][0].conv.weight.is_contiguous()
    assert_same(outcome(run), outcome(whole))


def test_a_run_can_be_extended(tmp_path):
    short = tiny(train={"max_epoch": 2}, optim={"schedule": "step"})
    long = replace(short, {"train": {"max_epoch": 4}})
    run = finished(tmp_path / "short", short)
    for _ in train(long, run, resume=True):
        pass
    assert_same(outcome(run), outcome(finished(tmp_path / "long", long)))


def test_killed_before_the_first_checkpoint_starts_from_the_beginning(whole, tmp_path):
    run = Run.create(tmp_path / "run")
    for event in train(tiny(), run):
        if isinstance(event, Step):
            break
    # As a kill between the first row and its checkpoint leaves it.
    run.write_metrics(whole.metrics()[:1])
    (run.checkpoints / ".last-00000005.safetensors.x").write_bytes(b"half")
    for _ in train(tiny(), run, resume=True):
        pass
    assert_same(outcome(run), outcome(whole))
    # Two of last and one of best, with their manifests.
    assert len(list(run.checkpoints.iterdir())) == 6


KILLED = """
import json, os, random, signal, sys
from pathlib import Path
import torch
import sparsenet.files as F, sparsenet.run as R, sparsenet.train as T
from sparsenet.config import from_dict, RunConfig
torch.set_num_threads(1)
config = from_dict(json.loads(sys.argv[1]), "argument", RunConfig())
whole, killed, chance = Path(sys.argv[2]), Path(sys.argv[3]), random.Random(sys.argv[4])

def attempt(folder, kill_at):
    writes = 0
    def counting(path, content, write=F.write_atomic):
        nonlocal writes
        writes += 1
        if writes == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)
    F.write_atomic = counting
    resume = (folder / "config.json").exists()
    run = R.Run(folder) if resume else R.Run.create(folder)
    for event in T.train(config, run, resume): pass

attempt(whole, 0)
status, kills = -9, 0
while status == -9:
    kill_at = chance.randint(8, 14) if kills < 4 else 0
    if not (child := os.fork()):
        attempt(killed, kill_at)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kills += status == -9
print(kills)
sys.exit(status)
"""


def kill_and_resume(config, folder, seed):
    """Makes a run, ``whole``, and another that is killed before random writes and resumed.

    The processes that are killed, again and again, are forked from the one that made the first and
    has so loaded everything. Returns their number.
    """
    folders = str(folder / "whole"), str(folder / "killed")
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(config.to_dict()), *folders, seed],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory):
    folder, chance = tmp_path_factory.mktemp("parquet"), random.Random(0)
    for split, count in (("train", 48), ("test", 12)):
        rows = []
        for i in range(count):
            file = io.BytesIO()
            colour = (40 + 150 * (i % 2), chance.randint(0, 255), chance.randint(0, 255))
            Image.new("RGB", (8, 8), colour).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": i % 2})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


EVERYTHING = {
    "trivial_augment": True,
    "cutout": 3,
    "mixup": 0.4,
    "cutmix": 1.0,
    "first_size": 4,
    "crop": 0.2,
    "stored_size": 12,
}


@pytest.mark.parametrize("kind", ["digits", "parquet"])
def test_killed_at_random_and_resumed_is_bit_identical(kind, parquet_folder, tmp_path):
    config = tiny(train={"save_every": 0.0})  # a checkpoint after every step
    if kind == "parquet":
        config = tiny(
            train={"save_every": 0.0, "batch_size": 16},
            optim={"optimizer": "muon"},
            data={"dataset": "auto", "dataset_dir": str(parquet_folder), **EVERYTHING},
        )
    assert kill_and_resume(config, tmp_path, seed=kind) >= 2
    assert_same(outcome(Run(tmp_path / "killed")), outcome(Run(tmp_path / "whole")))


def test_the_time_limit_ends_a_run_with_everything_saved(tmp_path):
    run = Run.create(tmp_path / "run")
    events = list(train(tiny(train={"time_limit": 1e-6}), run))
    stopped = [e for e in events if isinstance(e, Stopped)]
    assert [e.reason for e in stopped] == [TIME_LIMIT]
    assert isinstance(events[-1], Concluded)
    assert newest(run.checkpoints, "last")[0].manifest.step == 1
    assert {"curves.png", "confusion.png", "samples.png", "graph.svg", "result.json"} <= {
        f.name for f in run.path.iterdir()
    }


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    run = Run.create(tmp_path / "run")
    config = tiny(
        optim={"lr": 1e30, "schedule": "step", "grad_clip": 0.0}, train={"save_every": 0.0}
    )
    with pytest.raises(DivergedError, match=r"the loss of step \d+ is not finite"):
        for _ in train(config, run):
            pass
    for checkpoint in run.checkpoints.glob("last-*.safetensors"):
        assert load_file(checkpoint)["epoch.losses"].isfinite().all()
    assert not list(run.checkpoints.glob("best-*"))


@pytest.mark.parametrize("limit", [0.0, 1e-6], ids=["after an epoch", "at the end"])
def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, limit):
    """With finite weights, as where they overflow in the middle; no result is written of it."""
    score = EvaluationStep.__call__

    def overflowing(step, pixels, labels):
        losses, *others = score(step, pixels, labels)
        return losses.index_fill(0, torch.tensor([2]), math.nan), *others

    monkeypatch.setattr(EvaluationStep, "__call__", overflowing)
    run = Run.create(tmp_path / "run")
    with pytest.raises(DivergedError, match=r"the weights of step \d+ give a loss that is not"):
        for _ in train(tiny(train={"time_limit": limit}), run):
            pass
    assert not (run.path / "result.json").exists() and not run.metrics()


def test_only_finite_weights_are_saved():
    largest = torch.finfo(torch.float32).max
    for bad in (math.nan, math.inf, -math.inf, largest):
        tensors = {
            "a": torch.ones(3),
            "b": torch.tensor([[0.0, bad], [-1.0, 2.0]]),
            "c": torch.ones(2, dtype=torch.bfloat16),
            "d": torch.ones(2, dtype=torch.int64),
        }
        if bad == largest:
            check_finite(tensors, 7)
        else:
            with pytest.raises(
                DivergedError, match=r"the weights of step 7 are not finite; .*--lr"
            ):
                check_finite(tensors, 7)


def test_the_best_checkpoint_is_chosen_on_the_held_out_part(whole):
    rows = whole.metrics()
    best = min(range(len(rows)), key=lambda i: rows[i].val_error)
    assert load_trained(whole.path).about.epoch == rows[best].epoch


PATIENT = {"max_epoch": 30}
FAST = {
    "optim": {"lr": 1.0, "ema": 0.0},
    "data": {"val_fraction": 0.1, "sampler": "balanced", "first_size": 0},
}


def waited(rows):
    """The number of epochs since the lowest validation error."""
    errors = [row.val_error for row in rows]
    return len(errors) - 1 - errors.index(min(errors))


def test_a_run_without_progress_ends_and_goes_on_with_more_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(conclusion, "pictures", Mock())  # which take the longest
    run = Run.create(tmp_path / "run")
    events = list(train(tiny(**FAST, train={**PATIENT, "patience": 1}), run))
    rows = run.metrics()
    assert waited(rows) == 1 and len(rows) < 30
    assert all(waited(rows[: n + 1]) == 0 for n in range(len(rows) - 1))
    assert not any(isinstance(event, Stopped) for event in events)
    said = [event.text for event in events if isinstance(event, Message)]
    best = len(rows) - 1
    assert f"ended after epoch {len(rows)} of 30: none of the last 1 had a lower" in said[-2]
    assert f"those of epoch {best} of {len(rows)}: their validation error, " in said[-1]
    assert isinstance(events[-1], Concluded) and events[-1].result.epochs == best
    assert newest(run.checkpoints, "best")[0].manifest.epoch == best
    # The same patience, or more epochs, trains nothing; more of it goes on as if it had been so.
    more = {**PATIENT, "patience": 1, "max_epoch": 31}
    again = list(train(tiny(**FAST, train=more), run, resume=True))
    assert not any(isinstance(event, Step) for event in again) and run.metrics() == rows
    assert any("a larger --patience" in e.text for e in again if isinstance(e, Message))
    assert again[-1].result.epochs == best
    longer = tiny(**FAST, train={**PATIENT, "patience": 2})
    for _ in train(longer, run, resume=True):
        pass
    whole = finished(tmp_path / "whole", longer)
    assert len(whole.metrics()) > len(rows) and waited(whole.metrics()) == 2
    assert_same(outcome(run), outcome(whole))


def state_of(losses, mistakes):
    return TrainingState(Mock(), Mock(), None, torch.tensor(losses), torch.tensor(mistakes))


def test_nobody_waits_for_a_better_epoch_before_images_are_whole():
    state = state_of([0.0], [0])
    whole, growing = (
        tiny(data={"first_size": size}, train={"max_epoch": 12, "patience": 2}) for size in (0, 4)
    )
    for epoch in range(1, 13):
        state.rows.append(EpochMetrics(epoch, val_error=float(epoch)))
        state.step = epoch
        assert state.waited(whole) == epoch - 1 and state.waited(growing) == max(epoch - 9, 0)
        assert state.ended(whole) == (epoch >= 3) and state.ended(growing) == (epoch >= 11)


def test_the_mean_loss_is_that_of_images_not_of_steps():
    state = state_of([1.0, 2.0, 4.0, 9.0], [1, 0, 1, 9])
    assert _progress(state, [2, 4, 5]) == (2.0, 40.0)


def test_more_epochs_that_make_images_smaller_again_are_said(tmp_path):
    data = {"first_size": 4, "image_size": 8}
    run = finished(tmp_path / "run", tiny(data=data, train={"max_epoch": 2}))
    more = tiny(data=data, train={"max_epoch": 8})
    said = [event.text for event in train(more, run, resume=True) if isinstance(event, Message)]
    jump = "warning: the side of training images goes from 8 to 4 pixels, since they grow"
    assert any(jump in each for each in said)


@pytest.mark.parametrize(("drop", "warned"), [(3, True), (2, False)])
def test_a_rate_that_never_falls_is_said(drop, warned, tmp_path):
    config = tiny(optim={"schedule": "step", "drop_1": drop, "drop_2": 9})
    events = train(config, Run.create(tmp_path / "run"))
    said = [event.text for event in events if isinstance(event, Message)]
    assert any("the learning rate never falls: --drop_1 3" in each for each in said) == warned


def test_what_was_never_validated_is_not_called_the_lowest(tmp_path):
    run = Run.create(tmp_path / "run")
    config = tiny(data={"val_fraction": 0.2}, train={"time_limit": 1e-9})
    assert list(train(config, run))[-1].result.checkpoint == "step 1"
    config = tiny(data={"val_fraction": 0.2}, train={"time_limit": 0})
    assert list(train(config, run, resume=True))[-1].result.checkpoint == "lowest validation error"


def test_without_one_the_last_epoch_is_reported(tmp_path):
    run = finished(tmp_path / "run", tiny(data={"val_fraction": 0.0}))
    assert load_trained(run.path).about.epoch == 3
    assert [row.val_error for row in run.metrics()] == [None] * 3


def test_events_and_metrics_agree(tmp_path):
    run = Run.create(tmp_path / "run")
    events = list(train(tiny(), run))
    rows = [event.metrics for event in events if isinstance(event, EpochDone)]
    assert rows == run.metrics()
    steps = [event for event in events if isinstance(event, Step)]
    assert [s.step for s in steps] == [*range(1, steps[0].steps + 1)] * 3
    ends = [s for s in steps if s.step == s.steps]
    assert [s.error for s in ends] == [row.train_error for row in rows]
    with (run.path / "metrics.csv").open() as file:
        assert len(list(csv.reader(file))) == 4


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_single_images_cannot_be_mixed(mixing, tmp_path):
    config = tiny(data={mixing: 0.4}, train={"batch_size": 1})
    with pytest.raises(ValueError, match="--batch_size: expected at least 2 images a step, of"):
        list(train(config, Run.create(tmp_path / "run")))


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match="--batch_size: expected at most the"):
        list(train(tiny(train={"batch_size": 5000}), Run.create(tmp_path / "run")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"shift": 8}},
            "--shift: expected at most 7 for images of 8 pixels a side, found 8",
        ),
        (
            {"data": {"cutout": 9}},
            "--cutout: expected at most 8 for images of 8 pixels a side, found 9",
        ),
        (
            {"data": {"first_size": 12}},
            "--first_size: expected at most 8 for images of 8 pixels a side, found 12",
        ),
        (
            {"data": {"crop": 0.1, "stored_size": 20}},
            "--stored_size: expected 8 to 16 for images of 8 pixels a side, found 20",
        ),
        (
            {"data": {"first_size": 4, "image_size": 32}, "network": {"stem": "imagenet"}},
            "--first_size: expected at least 16 for this network, found 4",
        ),
    ],
)
def test_augmentation_that_does_not_fit_the_images(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}$"):
        list(train(tiny(**changes), Run.create(tmp_path / "run")))


@pytest.mark.parametrize(
    ("data", "sizes"),
    [({}, (4, 8)), ({"crop": 0.3, "stored_size": 12}, (6, 12))],
    ids=["whole", "kept larger for crops"],
)
def test_images_grow_in_training_and_are_tested_whole(data, sizes, tmp_path, monkeypatch):
    trained, tested, act = [], [], TrainingStep.__call__
    recompute = recompute_statistics

    def spied(step, pixels, *rest):
        trained.append(pixels.shape[-1])
        return act(step, pixels, *rest)

    def spying(step, images, *rest, **options):
        tested.append(images.pixels.shape[-1])
        return evaluate(step, images, *rest, **options)

    monkeypatch.setattr(TrainingStep, "__call__", spied)

    def settling(model, images, *rest):
        tested.append(images.pixels.shape[-1])
        recompute(model, images, *rest)

    monkeypatch.setattr("sparsenet.train.evaluate", spying)
    monkeypatch.setattr("sparsenet.train.recompute_statistics", settling)
    run = finished(tmp_path / "run", tiny(data={"first_size": 4, **data}, train={"max_epoch": 2}))
    steps = len(trained) // 2
    assert trained == [sizes[0]] * steps + [sizes[1]] * steps
    assert set(tested) == {8}
    assert len(run.metrics()) == 2


def test_a_device_that_is_not_here(tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match="--device: expected a device of this machine"):
        list(train(tiny(train={"device": "npu"}), Run.create(tmp_path / "run")))
    assert time.monotonic() - start < 60


# --- few images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Three classes that are easily told apart: 20 training and 30 test images of each."""
    root = tmp_path_factory.mktemp("data") / "stripes"
    for split, count in (("train", 20), ("test", 30)):
        for label, name in enumerate(("across", "down", "plain")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                random = np.random.default_rng([number, label, split == "test"])
                wave = 80 * np.sign(np.sin(np.arange(24) * np.pi / 3 + random.uniform(0, 6)))
                pattern = np.tile(wave * (label < 2), (24, 1))
                noise = random.normal(128, 20, (24, 24))
                levels = noise + (pattern if label == 0 else pattern.T)
                picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
                picture.save(root / split / name / f"{number}.png")
    return root


def short(folder, **changes):
    network = {"depth": 13, "growth_rate": 8}
    config = replace(preset("short"), {"data": {"dataset_dir": str(folder)}, "network": network})
    return replace(config, changes)


def test_few_steps_are_tested_with_statistics_of_their_own(stripes, tmp_path, monkeypatch):
    """Running statistics would still be mostly those of the start."""
    config = short(stripes, train={"max_epoch": 1, "precision": "fp32"})
    settled = finished(tmp_path / "settled", config)
    monkeypatch.setattr("sparsenet.train.FEW_STEPS", 0)
    running = finished(tmp_path / "running", config)
    errors = [run.metrics()[0].test_error for run in (settled, running)]
    assert errors[0] < errors[1] / 2
    assert settled.metrics()[0].train_error == running.metrics()[0].train_error
    (weights, _), (others, _) = (newest(run.checkpoints, "last") for run in (settled, running))
    for name, tensor in weights.part("model.").items():  # the average's are what is evaluated
        assert torch.equal(tensor, others.part("model.")[name])


@pytest.mark.parametrize("implementation", ["reference", "shared", "native"])
def test_recomputed_statistics_are_those_of_the_batches(implementation):
    torch.manual_seed(0)
    network = SparseNet(Architecture(depth=7, growth_rate=4, num_classes=3), implementation)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (11, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(11, dtype=torch.int64))
    preprocessing = Preprocessing(8, 3, (0.5,) * 3, (0.25,) * 3)
    network.eval()
    recompute_statistics(network, images, preprocessing, torch.device("cpu"), 8)
    assert not network.training
    with torch.no_grad():
        features = network.stem(preprocessing.normalise(pixels))
    means = [part.mean((0, 2, 3)) for part in features.split(8)]
    variances = [part.var((0, 2, 3)) for part in features.split(8)]
    expected = [(8 * first + 3 * second) / 11 for first, second in (means, variances)]
    statistics = network.stages[0].statistics[0]
    torch.testing.assert_close(statistics.running_mean, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.running_var, expected[1], rtol=1e-4, atol=1e-5)


def test_a_batch_size_that_nobody_asked_for_fits_and_is_said(stripes, tmp_path):
    run = Run.create(tmp_path / "run")
    events = list(train(short(stripes, train={"max_epoch": 1}), run))
    assert Message("batches of 15 images, since there are few (--batch_size)") in events
    assert run.metrics()[0].step == 4
    assert run.config().train.batch_size == 0  # so that other data have another
    assert json.loads((run.path / "environment.json").read_text())["batch_size"] == 15
    config = short(stripes, train={"max_epoch": 1, "batch_size": 20})
    assert not [e for e in train(config, Run.create(tmp_path / "two")) if "batches of" in str(e)]


@pytest.mark.parametrize(("size", "stem"), [(95, "cifar"), (96, "imagenet")])
def test_epochs_and_stem_are_those_for_the_images(stripes, tmp_path, size, stem):
    run = Run.create(tmp_path / "run")
    network = {"depth": 7, "growth_rate": 4}
    config = short(stripes, network=network, data={"image_size": size}, train={"time_limit": 0.01})
    events = [str(event) for event in train(config, run)]
    told = [event for event in events if "epochs, for" in event]
    assert told == [str(Message("400 epochs, for 60 training images (--max_epoch)"))]
    assert any("imagenet stem for images of 96 pixels" in e for e in events) == (size == 96)
    decided = run.config()
    assert (decided.train.max_epoch, decided.network.stem) == (400, stem)
    events = [str(event) for event in train(decided, run, resume=True)]
    assert any("resumed at step" in event for event in events)
    assert not [event for event in events if "epochs, for" in event or "stem for" in event]


def test_what_the_images_decided_stays_when_a_run_is_resumed(stripes, tmp_path):
    base = short(stripes, network={"depth": 7, "growth_rate": 4})
    assert (base.network.stem, base.train.max_epoch) == ("auto", 0)
    run = Run.create(tmp_path / "run")
    begun = replace(base, {"train": {"max_epoch": 2, "time_limit": 0.01}})
    assert list(train(begun, run))
    decided = resumed(run, base)  # as a launcher starts the same command again
    assert (decided.network.stem, decided.train.max_epoch) == ("cifar", 2)
    assert resumed(run, begun).train.time_limit == 0.01
    with pytest.raises(ValueError, match="stem 'cifar' -> 'imagenet'"):
        resumed(run, replace(base, {"network": {"stem": "imagenet"}}))


def test_a_quarter_of_the_images_is_seen_twice_as_often():
    assert epochs_for(50_000) == 30
    assert epochs_for(12_500) == 60
    assert epochs_for(2) == 400
    assert epochs_for(10**9) == 10


def test_a_single_last_image_is_trained_on_with_the_batch_before(stripes, tmp_path):
    """Alone it would have no variance where the last stage has one pixel."""
    network = {"stem": "imagenet", "bottleneck": True, "blocks": (2, 2, 2, 2), "growth_rate": 4}
    changes = {"network": network, "data": {"image_size": 32}}
    for batch_size, steps in ((59, 1), (8, 8)):
        config = short(stripes, train={"max_epoch": 1, "batch_size": batch_size}, **changes)
        assert finished(tmp_path / f"run{batch_size}", config).metrics()[0].step == steps
    config = short(stripes, train={"max_epoch": 1, "batch_size": 1}, **changes)
    with pytest.raises(ValueError, match="--batch_size: expected at least 2 images a step"):
        list(train(config, Run.create(tmp_path / "alone")))


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step"])
def test_a_rate_that_jumps_when_epochs_are_added_is_said(schedule, tmp_path):
    run = finished(tmp_path / "run", tiny(optim={"schedule": schedule}))
    more = tiny(optim={"schedule": schedule}, train={"max_epoch": 6})
    said = [event.text for event in train(more, run, True) if isinstance(event, Message)]
    jumps = [line for line in said if "learning rate goes from" in line]
    assert len(jumps) == (schedule != "step")
    if jumps:
        last, coming = (run.metrics()[epoch].lr for epoch in (2, 3))
        assert f"from {last:.4g} to " in jumps[0] and coming > last
    again = [event.text for event in train(more, run, True) if isinstance(event, Message)]
    assert "finished: all 6 epochs are trained; --max_epoch N adds to them" in again


def test_reading_is_told_and_can_be_stopped(stripes, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsenet.data.load.TELL_EVERY", 0.0)
    run = Run.create(tmp_path / "run")
    config = short(stripes, train={"max_epoch": 1})
    events = list(train(config, run, should_stop=lambda: "SIGINT"))
    assert events == [Reading("sizes", 1, 60), Stopped("SIGINT", saved=False)]
    assert not run.is_described
    read = [event for event in train(config, run) if isinstance(event, Reading)]
    work = {"sizes": 60, "train": 60, "test": 90}
    expected = [(name, n, total) for name, total in work.items() for n in range(1, total + 1)]
    expected.append(("statistics", 60, 60))  # of all at once, as they are few
    assert [dataclasses.astuple(event) for event in read] == expected
