"""Replaying what was recorded equals calling it: functions, training, evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import record_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from test_train import assert_same, outcome, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsenet import capture, optim
from sparsenet.capture import WARM_UP, Captured
from sparsenet.config import RunConfig, replace
from sparsenet.data.augment import augment, mix
from sparsenet.data.dataset import Images
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.data.sampling import plan_epoch, training_size
from sparsenet.evaluation import EvaluationStep, evaluate
from sparsenet.events import Message
from sparsenet.model import SparseNet
from sparsenet.ops import dispatch, engine
from sparsenet.ranks import Ranks
from sparsenet.run import Run
from sparsenet.step import TrainingStep, balancing_weights, loss_and_mistakes
from sparsenet.train import train


@pytest.fixture(autouse=True)
def a_recorder_sees_engines(monkeypatch):
    """As a CUDA graph does, though this one is a mode, which would be shown the reference."""
    for module in (dispatch, engine):
        monkeypatch.setattr(module, "is_watched", lambda tensor: False)


HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
REFUSED = "operation not permitted when stream is capturing"


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: it repeats operators with their numbers on the same memory.

    As a capture does, recording computes nothing that stays, freezes every number that came from
    Python, leaves random numbers to the generator's state at replay, and refuses to read a value
    on the host. It sees PyTorch's operators, so it holds engines that are made of them.
    """

    def __init__(self, device=None, refuses=HOST_READS):
        super().__init__()
        self.refuses = refuses

    def warm_up(self, work):
        return work()

    def capture(self, work):
        self.calls, self.outside, self.own = [], {}, set()
        try:
            with torch.random.fork_rng(devices=[]), self:
                outputs = work()
        finally:
            for storage, before in self.outside.values():
                storage.copy_(before)
        calls = self.calls

        @torch.no_grad()
        def replay():
            for function, args, kwargs, made in calls:
                again = [
                    x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)
                ]
                for place, tensor in made:
                    tensor.copy_(again[place])

        return replay, outputs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.refuses:
            raise RuntimeError(f"{REFUSED}\nmore lines")
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        given = {
            x.untyped_storage()._cdata: x
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for key in given.keys() - self.own - self.outside.keys():
            storage = given[key].untyped_storage()
            self.outside[key] = storage, storage.clone()
        outputs = function(*args, **kwargs)
        found = [x.detach() for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        made = [
            (place, x) for place, x in enumerate(found) if x.untyped_storage()._cdata not in given
        ]
        self.own |= {x.untyped_storage()._cdata for _, x in made}
        self.calls.append((function, args, kwargs, made))
        return outputs


class Gain:
    """A function with a state: adds to it and counts how often Python runs it."""

    def __init__(self):
        self.total, self.runs = torch.zeros(()), 0

    def __call__(self, x, factor):
        self.runs += 1
        self.total += (x * factor).sum()
        return x * factor + self.total, self.total


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(-9, 9)), max_size=24))
def test_captured_equals_the_function_call_by_call(calls):
    plain, recorded, news = Gain(), Gain(), []
    captured = Captured(recorded, "the sum", Tape(), news.append)
    results = [
        (captured(*given), plain(*given))
        for given in ((torch.arange(n), torch.tensor(f)) for n, f in calls)
    ]
    for replayed, called in results:  # a later replay leaves earlier results alone
        assert torch.equal(replayed[0], called[0])
    assert torch.equal(recorded.total, plain.total)
    counts = [sum(n == m for m, _ in calls) for n in (1, 2, 3)]
    assert recorded.runs == sum(min(count, WARM_UP + 1) for count in counts)
    assert news == (["captured the sum"] if max(counts) > WARM_UP else [])


def test_the_tape_freezes_python_as_a_capture_does():
    numbers = iter(range(99))
    captured = Captured(lambda x: x + next(numbers), recorder=Tape())
    assert [captured(torch.zeros(())).item() for _ in range(WARM_UP + 3)] == [
        *range(WARM_UP),
        *[WARM_UP] * 3,
    ]


def test_a_device_that_records_nothing_runs_the_function():
    news, function = [], Gain()
    captured = Captured(function, tell=news.append)
    for _ in range(WARM_UP + 5):
        captured(torch.ones(2), torch.ones(()))
    assert function.runs == WARM_UP + 5 and news == []
    Captured(lambda x: x, "the step", tell=news.append)(torch.ones(2, device="meta"))
    assert news == ["the step is not captured: expected a device of type cuda, found meta"]


def test_what_cannot_be_recorded_is_called_and_says_why_once():
    plain, recorded, news = Gain(), Gain(), []

    def reading(x, factor):
        total = recorded(x, factor)[1]
        return x * total.item()

    captured = Captured(reading, "the step", Tape(), news.append)
    for number in range(3 * WARM_UP):
        x, factor = torch.ones(1 + number % 2), torch.tensor(number)
        assert torch.equal(captured(x, factor), x * plain(x, factor)[1])
    assert news == [f"the step is not captured: {REFUSED}"]


def test_an_error_of_the_function_is_not_hidden():
    captured = Captured(lambda x, y: x + y, recorder=Tape())
    with pytest.raises(RuntimeError, match="size of tensor"):
        captured(torch.ones(2), torch.ones(3))


CONFIG = replace(RunConfig(), {"network": {"depth": 7, "growth_rate": 4}, "data": {"shift": 2}})
PREPROCESSING = Preprocessing(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
RECIPES = {
    "plain": {},
    "everything": {
        "network": {"dropout": 0.2},
        "optim": {
            "ema": 0.9,
            "grad_clip": 0.5,
            "label_smoothing": 0.1,
            "schedule": "onecycle",
            "class_weights": "balanced",
        },
        "data": {
            "trivial_augment": True,
            "cutout": 3,
            "mixup": 0.4,
            "cutmix": 1.0,
            "first_size": 4,
            "crop": 0.2,
        },
    },
    "sum": {
        "network": {"aggregation": "sum", "growth_rate": 8, "depth": 10},
        "optim": {"ema": 0.5, "optimizer": "muon"},
    },
}


def trained(config, precision, wrap, implementation="shared"):
    """Figures of twelve steps, every fourth one smaller, and all state afterwards."""
    torch.manual_seed(0)
    model = SparseNet(config.network, implementation).train()
    average = copy.deepcopy(model) if config.optim.ema else None
    optimizer = optim.new_optimizer(model, config.optim)
    weights = torch.rand(10) if config.optim.class_weights == "balanced" else None
    act = wrap(
        TrainingStep(
            model, optimizer, average, config, PREPROCESSING, precision, class_weights=weights
        )
    )
    rates, ema_rates = optim.epoch_rates(config.optim, 0, 12, 1, torch.device("cpu"))
    found = []
    for number in range(12):
        torch.manual_seed(number)  # a step's dropout continues from here
        count = 3 if number % 4 == 3 else 8
        side = training_size(number, 12, config.data.first_size, 8)
        pixels, labels = (
            torch.randint(256, (count, 3, side, side), dtype=torch.uint8),
            torch.randint(10, (count,)),
        )
        plan = plan_epoch(number, 0, count, config.data.scaled(side, 8))
        numbers = rates[number], ema_rates[number], torch.ones(2)
        found += act(pixels, labels, *numbers, *plan.moves)
    networks = [model] if average is None else [model, average]
    found += [value for network in networks for value in network.state_dict().values()]
    return found + [entry["momentum_buffer"] for entry in optimizer.state.values()]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("implementation", ["reference", "shared"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_equal_called_ones_to_the_last_bit(
    recipe, implementation, precision, monkeypatch
):
    monkeypatch.setattr(capture, "WARM_UP", 1)
    config, news = replace(CONFIG, RECIPES[recipe]), []
    expected = trained(config, precision, lambda function: function, implementation)
    found = trained(
        config, precision, lambda f: Captured(f, "the step", Tape(), news.append), implementation
    )
    assert_equal(found, expected)
    assert news == ["captured the step"]


@given(st.integers(1, 9), st.floats(0, 0.9), st.integers(0, 999))
def test_a_mixed_label_counts_by_its_share(count, smoothing, seed):
    random = torch.Generator().manual_seed(seed)
    logits, shares = torch.randn(count, 5, generator=random), torch.rand(count, generator=random)
    labels = torch.randint(5, (count,), generator=random)
    own, other = (nn.functional.one_hot(each, 5) for each in (labels, labels.flip(0)))
    mixture = shares[:, None] * own + (1 - shares[:, None]) * other
    loss, wrong = loss_and_mistakes(logits, labels, shares, smoothing)
    torch.testing.assert_close(
        loss, nn.functional.cross_entropy(logits, mixture, label_smoothing=smoothing)
    )
    assert wrong == (logits.argmax(1) != mixture.argmax(1)).sum()
    loss, wrong = loss_and_mistakes(logits, labels, None, smoothing)
    assert torch.equal(loss, nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert wrong == (logits.argmax(1) != labels).sum()
    same = loss_and_mistakes(logits, labels, torch.ones(count), smoothing)
    torch.testing.assert_close(same, (loss, wrong))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 999))
def test_balancing_weights_the_loss_as_pytorch_does(classes, seed):
    random, labels = torch.Generator().manual_seed(seed), torch.tensor(classes)
    logits = torch.randn(len(labels), 7, generator=random)  # of two classes there is no image
    weights = balancing_weights(labels, 7)
    sums = torch.zeros(7).scatter_add_(0, labels, weights[labels])
    present = labels.unique()
    equal = torch.full_like(sums[present], len(labels) / len(present))
    torch.testing.assert_close(sums[present], equal)
    assert weights[labels].mean() == pytest.approx(1, rel=1e-5)
    assert weights.isfinite().all()
    expected = nn.functional.cross_entropy(logits, labels, weight=weights)  # over all images
    loss, wrong = loss_and_mistakes(logits, labels, None, 0.0, weights)
    torch.testing.assert_close(loss, expected)
    assert wrong == (logits.argmax(1) != labels).sum()
    shares = torch.rand(len(labels), generator=random)
    own, other = (nn.functional.one_hot(each, 7) for each in (labels, labels.flip(0)))
    mixture = shares[:, None] * own + (1 - shares[:, None]) * other
    sums = nn.functional.cross_entropy(logits, mixture, weight=weights, reduction="none")
    torch.testing.assert_close(
        loss_and_mistakes(logits, labels, shares, 0.0, weights)[0], sums.mean()
    )
    alike = torch.ones(7)  # changes nothing, whatever else there is
    for each in (None, shares):
        torch.testing.assert_close(
            loss_and_mistakes(logits, labels, each, 0.2, alike),
            loss_and_mistakes(logits, labels, each, 0.2),
        )


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("count", [3, 4, 23])
def test_the_weighted_loss_of_processes_is_that_of_the_whole_batch(count, mixed):
    random = torch.Generator().manual_seed(count)
    labels = torch.randint(3, (count,), generator=random)
    logits, shares = torch.randn(count, 3, generator=random), torch.rand(count, generator=random)
    weights = torch.tensor([0.2, 1.0, 5.0])
    whole, _ = loss_and_mistakes(logits, labels, shares if mixed else None, 0.1, weights)
    total = 0.0
    for rank in range(2):
        ranks = Ranks(rank, 2)
        part = ranks.part(count)
        own = shares[part] if mixed else None
        loss, _ = loss_and_mistakes(logits[part], labels[part], own, 0.1, weights)
        total += loss * ranks.shares(count)[0]
    torch.testing.assert_close(total, whole)


AUGMENTED = {"trivial_augment": True, "cutout": 3, "mixup": 0.4, "cutmix": 1.0, "crop": 0.2}


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize(
    "changes", [{}, AUGMENTED, *({name: AUGMENTED[name]} for name in AUGMENTED)], ids=str
)
def test_a_step_learns_from_the_images_as_they_are_augmented_and_mixed(changes, side):
    config = replace(CONFIG, {"data": changes, "optim": {"label_smoothing": 0.1}})
    model, seen = SparseNet(config.network, "shared").train(), []
    model.register_forward_hook(
        lambda module, inputs, logits: seen.extend((*inputs, logits.detach()))
    )
    act = TrainingStep(
        model, optim.new_optimizer(model, config.optim), None, config, PREPROCESSING, "fp32"
    )
    pixels, labels = (
        torch.randint(256, (8, 3, side, side), dtype=torch.uint8),
        torch.randint(10, (8,)),
    )
    data = config.data.scaled(side, 8)
    moves = plan_epoch(0, 0, 8, data).moves
    loss, wrong = act(pixels, labels, torch.tensor(0.1), torch.tensor(0.0), torch.ones(2), *moves)
    images, shares = PREPROCESSING.normalise(augment(pixels, moves, data, act.fill)), None
    if data.mixup or data.cutmix:
        images, shares = mix(images, moves)
    assert_equal([seen[0], loss, wrong], [images, *loss_and_mistakes(seen[1], labels, shares, 0.1)])


FUSED_SGD, CONVOLUTION = (
    torch.ops.aten._fused_sgd_.tensor_lr,
    torch.ops.aten.convolution_backward.default,
)


@pytest.mark.parametrize("refused", [FUSED_SGD, CONVOLUTION], ids=["at the update", "in backward"])
def test_a_capture_that_fails_halfway_leaves_training_as_it_was(refused):
    config, news = replace(CONFIG, RECIPES["everything"]), []
    found = trained(
        config, "fp32", lambda f: Captured(f, "the step", Tape(refuses=[refused]), news.append)
    )
    assert_equal(found, trained(config, "fp32", lambda function: function))
    assert news == [f"the step is not captured: {REFUSED}"]


def test_evaluation_is_recorded_once_and_follows_the_weights():
    torch.manual_seed(0)
    model, news = SparseNet(CONFIG.network, "shared"), []
    images = Images(torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10) % 3)
    step = EvaluationStep(model, PREPROCESSING, "fp32")
    score = Captured(step, "it", Tape(), news.append)
    given = step, images, torch.device("cpu"), 4
    for _ in range(WARM_UP + 3):
        found, expected = evaluate(*given, score), evaluate(*given)
        assert found.loss == expected.loss and model.training
        for name in ("labels", "predicted", "confidence", "in_top5"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.01 * torch.rand_like(tensor))
    assert news == ["captured it"]


@pytest.fixture
def taped(monkeypatch):
    """Training on the CPU that records as on CUDA."""
    monkeypatch.setattr(capture, "WARM_UP", 1)
    record_on_cpu(monkeypatch, Tape)


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """A run whose steps are called."""
    run = Run.create(tmp_path_factory.mktemp("runs") / "called")
    assert not captures(train(whole(), run))
    return run


def whole(**changes):
    return tiny(train={"implementation": "shared", **changes})


def captures(events):
    return [
        event.text for event in events if isinstance(event, Message) and "captured" in event.text
    ]


def test_a_captured_run_is_the_run(taped, called, tmp_path):
    run = Run.create(tmp_path / "run")
    assert captures(train(whole(), run)) == [
        "captured the training step",
        "captured the evaluation",
    ]
    assert_same(outcome(run), outcome(called))


@pytest.mark.parametrize("stops", [[3, 8, 9], [11]])
def test_a_captured_run_stopped_and_resumed_is_the_run(taped, called, tmp_path, stops):
    run, asked, told = Run.create(tmp_path / "run"), 0, []

    def should_stop():
        nonlocal asked
        asked += 1
        return "a signal" if asked in stops else None

    for number in range(len(stops) + 1):
        told += captures(train(whole(), run, number > 0, should_stop))
    assert told.count("captured the training step") > 1
    assert_same(outcome(run), outcome(called))


def test_a_run_that_wants_no_capture_has_none(taped, called, tmp_path):
    run = Run.create(tmp_path / "run")
    assert not captures(train(whole(capture=False), run))
    assert_same(outcome(run), outcome(called))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
def test_cuda_replays_random_numbers_by_the_seed():
    news, x = [], torch.ones(5, 7, device="cuda")

    def noisy(x, factor):
        return nn.functional.dropout(x, 0.5) * factor

    captured = Captured(noisy, "it", tell=news.append)
    for number in range(3 * WARM_UP):
        factor = torch.tensor(float(number), device="cuda")
        torch.manual_seed(number)
        expected = noisy(x, factor)
        torch.manual_seed(number)
        assert torch.equal(captured(x, factor), expected)
    assert news == ["captured it"]


@cuda
def test_cuda_is_usable_after_a_capture_that_failed():
    news, x = [], torch.ones(5, 7, device="cuda")
    recorder = capture.CudaGraphs(x.device)
    before = Captured(lambda x: x + 1, "the first", recorder, news.append)
    reading = Captured(
        lambda x: nn.functional.dropout(x, 0.5) * x.sum().item(),
        "the second",
        recorder,
        news.append,
    )
    after = Captured(
        lambda x: nn.functional.dropout(x, 0.5) * 2, "the third", recorder, news.append
    )
    stream = torch.cuda.current_stream()
    for captured in (before, reading, after, before):
        for _ in range(2 * WARM_UP):
            captured(x)
            assert torch.cuda.current_stream() == stream
    assert news[0] == "captured the first" and news[2] == "captured the third"
    assert news[1].startswith("the second is not captured: ") and len(news) == 3
    assert torch.equal(before(x), x + 1)


@cuda
@pytest.mark.parametrize("on_device", [True, False])
def test_cuda_training_is_captured_and_learns_the_same(on_device, tmp_path, monkeypatch):
    if not on_device:
        monkeypatch.setattr("sparsenet.preparation._on_device", lambda data, device: data)
    changes = {"device": "cuda", "max_epoch": 5, "precision": "fp32"}
    runs = [Run.create(tmp_path / name) for name in ("captured", "called")]
    told = captures(train(whole(**changes), runs[0]))
    assert told == ["captured the training step", "captured the evaluation"]
    assert not captures(train(whole(**changes, capture=False), runs[1]))
    first, second = (run.metrics() for run in runs)
    for row, other in zip(
        first, second, strict=True
    ):  # as far as the device's sums repeat themselves
        assert row.train_loss == pytest.approx(other.train_loss, rel=1e-2)
