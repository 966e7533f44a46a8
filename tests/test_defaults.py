"""Trainings of equal time: they train as the program does, for as long as was asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import write_cifar10

import sparsenet
from benchmarks.bench.record import Spread
from benchmarks.defaults import __main__ as command
from benchmarks.defaults.candidates import AT_32, AT_96, Candidate
from benchmarks.defaults.plain import PLAIN
from benchmarks.defaults.record import Costs, Trial, read_trials, table
from benchmarks.defaults.training import CUTS, Cut, Training, length_of, load, measure
from benchmarks.readme_tables import update
from sparsenet.data.config import DataConfig
from sparsenet.data.load import load_dataset
from sparsenet.data.preprocessing import Preprocessing, channel_statistics
from sparsenet.data.sampling import batch_ends
from sparsenet.environment import environment
from sparsenet.files import write_json

TINY = "sparsenet_40_12+depth=10+growth_rate=4"
CPU = torch.device("cpu")


def costs(text: str = TINY, side: int = 32, **seconds: float) -> Costs:
    """Costs as they are measured, but for the seconds of a step: ``at_32=0.5``."""
    sides = {int(name.removeprefix("at_")): value for name, value in seconds.items()} or {side: 0.1}
    return Costs(
        network=text,
        side=side,
        batch_size=64,
        precision="fp32",
        implementation="shared",
        parameters=1_000,
        macs=2_000_000,
        weights_bytes=3_000_000,
        peak_memory_mb=4.0,
        step_seconds={key: Spread(value, value, value) for key, value in sides.items()},
        environment=environment(CPU),
    )


def trial(network: str, minutes: float, seed: int, error: float | None) -> Trial:
    lengths = {"epochs": 1, "steps": 2, "train_images": 9, "test_images": 9}
    seconds = {"seconds": 1.0, "eval_seconds": 1.0}
    where = {"costs": costs(network), "environment": environment(CPU)}
    return Trial("500-96", network, minutes, seed, **lengths, error=error, **seconds, **where)


@pytest.mark.parametrize("text", [*AT_32, *AT_96, f"{TINY}+batch_size=8+first_size=16+lr=0.4"])
def test_a_candidate_is_what_its_text_says(text: str) -> None:
    candidate = Candidate.parse(text)
    assert Candidate.parse(str(candidate)) == candidate
    assert candidate.config.optim.schedule == "onecycle"
    if text.startswith(TINY):
        assert candidate.config.optim.lr == 0.4
        assert candidate.measured == Candidate.parse(f"{TINY}+batch_size=8+first_size=16")
        assert candidate.config.network.depth == 10


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("resnet21", "did you mean resnet20"),
        ("resnet20+depth=40", "found 'depth'"),  # which would change nothing
        ("sparsenet_40_12+epochs=3", "found 'epochs'"),
        ("sparsenet_40_12+lr=fast", "expected a number"),
        ("sparsenet_40_12+stem=auto", "stem: expected cifar or imagenet"),
        ("sparsenet_40_12+lr=1+lr=2", "once"),
    ],
)
def test_what_is_no_candidate_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Candidate.parse(text)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_are_those_of_their_sources(name: str) -> None:
    candidate = Candidate.parse(name)
    strided = name.endswith("_strided")
    network = candidate.build(10, "").eval()
    count = sum(each.numel() for each in network.parameters())
    # 0.27 million of the paper and 41 million MACs; 6.57 million of the DAWNBench entry.
    least, most = (0.26e6, 0.28e6) if name.startswith("resnet20") else (6.56e6, 6.59e6)
    assert least < count < most
    if name == "resnet20":
        assert candidate.macs(10, 32) == pytest.approx(41e6, rel=0.02)
    side = 96 if strided else 32
    with torch.no_grad():
        logits = network(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 10)
    assert candidate.macs(10, 96) < (9 if strided else 10) * candidate.macs(10, 32)


@pytest.mark.parametrize("seconds", [0.01, 1.0, 7.3, 100.0, 1234.5])
@pytest.mark.parametrize("images", [500, 50_000])
@pytest.mark.parametrize("growing", [False, True])
def test_a_training_takes_the_time_that_it_is_given(
    seconds: float, images: int, growing: bool
) -> None:
    candidate = Candidate.parse(TINY + "+first_size=16" * growing)
    step = {f"at_{side}": side**2 / 32**2 / 10 for side in (16, 20, 24, 28, 32)}
    known = costs(**step)
    length = length_of(candidate, seconds, images, known)
    sides, per_epoch = candidate.sizes(length.epochs, 32), len(batch_ends(images, 64))
    assert (length.epochs - 1) * per_epoch < length.steps <= length.epochs * per_epoch
    each = [known.step_seconds[side].median for side in sides for _ in range(per_epoch)]
    assert sum(each[: length.steps]) == pytest.approx(seconds, abs=0.1 / 2 + 1e-6) or seconds < 0.1
    assert length.steps == 1 or seconds > 0.1


@pytest.mark.parametrize("change", ["+ema=0", "+first_size=4"])
def test_it_trains_as_the_program_does(folder_data: Path, tmp_path: Path, change: str) -> None:
    candidate = Candidate.parse(f"{TINY}+batch_size=4+precision=fp32+implementation=shared{change}")
    config = candidate.config
    settings = dataclasses.replace(config.train, max_epoch=4, seed=3)
    data_settings = DataConfig(dataset_dir=str(folder_data), first_size=config.data.first_size)
    wanted = dataclasses.replace(config, train=settings, data=data_settings)
    fit = sparsenet.fit(wanted, out=tmp_path / "run", quiet=True)

    data = load_dataset(data_settings)
    size = data.test.shape[-1]
    preprocessing = Preprocessing(size, 3, *channel_statistics(data.train))
    training = Training(candidate, data.train, preprocessing)
    training.begin(len(data.classes), seed=3)
    ends = torch.tensor([0, *batch_ends(len(data.train), 4)])
    steps = 4 * (len(ends) - 1)
    losses = [
        loss
        for epoch, side in enumerate(candidate.sizes(4, size))
        for loss in training.epoch(epoch, side, steps)
    ]
    training.settle()
    per_epoch = torch.stack(losses).view(4, -1) @ ends.diff().float() / len(data.train)
    expected = torch.tensor([row.train_loss for row in fit.metrics])
    torch.testing.assert_close(per_epoch, expected, rtol=1e-4, atol=1e-5)
    trained = fit.load("cpu").model.state_dict()
    for name, tensor in training.evaluated.state_dict().items():
        if name.endswith("num_batches_tracked"):  # the program settles them after each epoch
            continue
        torch.testing.assert_close(tensor, trained[name], rtol=1e-3, atol=1e-4)


def test_cuts_have_equally_many_of_each_class_in_their_size(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    data = Cut(20, 10, 12).of(load(str(tmp_path)))
    assert torch.bincount(data.train.labels).tolist() == [2] * 10
    assert torch.bincount(data.test.labels).tolist() == [1] * 10
    assert data.train.shape == data.test.shape == (3, 12, 12)


def test_costs_are_those_of_the_network() -> None:
    measured = measure(f"{TINY}+first_size=4", 8, seconds=0)
    candidate = Candidate.parse(TINY)
    model = sparsenet.create_model("sparsenet_40_12", depth=10, growth_rate=4)
    assert measured.parameters == sum(each.numel() for each in model.parameters())
    assert 2 * measured.parameters < measured.weights_bytes < 4 * measured.parameters
    assert measured.macs == candidate.macs(10, 8)
    assert set(measured.step_seconds) == {4, 8}


def test_trials_are_made_once_and_tabled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path)
    monkeypatch.setattr(command, "run_alone", lambda function, *of: costs(*of[:2]))
    monkeypatch.setitem(CUTS, "50000-32", Cut(20, 20, 32))
    out = tmp_path / "out"
    networks = [f"{TINY}+precision=fp32", f"{TINY}+lr=0.3+precision=fp32"]
    arguments = [str(out), "--data", str(tmp_path), "--sets", "50000-32", "--minutes", "0.002"]

    def call(*more: str) -> tuple[int, str]:
        return command.main([*arguments, *more]), capsys.readouterr().out

    code, said = call(*networks, "--plan")
    assert code == 3
    assert "1 epochs, 1 steps" in said
    assert said.count("640 images/s") == 1  # a rate costs nothing
    assert not read_trials([out])
    assert call(*networks, "--limit", "0.0001")[0] == 3
    networks.append("resnet20+precision=fp32")
    assert call(networks[0])[0] == 0
    code, said = call(*networks)
    assert code == 0
    assert f"{TINY}+precision=fp32@" not in said  # it was there
    found = read_trials([out])
    assert {each.network for each in found} == {str(Candidate.parse(text)) for text in networks}
    assert all(each.steps == 1 and each.error is not None for each in found)
    assert table(found) in said
    assert command.main([*arguments, "--sets", "c10"]) == 2
    assert "expected some of 50000-32" in capsys.readouterr().err


def test_a_training_whose_loss_is_no_number_is_told_so() -> None:
    both = [trial("resnet20", 2, seed, error) for seed, error in enumerate([None, 5.0])]
    assert "| diverged (diverged, 5.0) |" in table(both)


def test_a_page_has_the_table_of_trials(tmp_path: Path) -> None:
    trials = [
        trial("resnet20", 2, 0, 31.0),
        trial("resnet20", 2, 1, 33.0),
        trial("resnet9", 2, 0, 40.0),
        trial("resnet9", 10, 0, 20.0),
    ]
    for number, each in enumerate(trials):
        write_json(tmp_path / f"{number}@.json", each)
    page = tmp_path / "page.md"
    page.write_text("<!-- defaults *@.json -->\n<!-- /defaults -->\nafter\n")
    assert [update(page), update(page)] == [1, 1]
    lines = page.read_text().splitlines()
    assert lines[2].endswith("| images/s | 2 min | 10 min |")
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| resnet9", "| resnet20"]
    assert lines[4].endswith("| 640 | 40.0 | 20.0 |")
    assert lines[5].endswith("| 32.0 (31.0, 33.0) | – |")
    assert lines[-1] == "after"
    page.write_text("<!-- defaults nothing -->\n<!-- /defaults -->\n")
    with pytest.raises(ValueError, match="found none"):
        update(page)
    several = dataclasses.replace(trials[0], data="5000-96")
    with pytest.raises(ValueError, match="one data set"):
        table([*trials, several])
