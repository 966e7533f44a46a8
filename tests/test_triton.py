"""The fused kernels compute what the reference does: in Triton's interpreter or on a GPU."""

import copy
import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ops import close
from torch import nn

from benchmarks.bench.equality import chance
from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops import dispatch
from sparsenet.ops.plan import Plan

triton = pytest.importorskip("sparsenet.ops.triton", exc_type=ImportError)
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
on_a_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN; and where there is no GPU the interpreter is asked for."""
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))


def _filled(make):
    def poison(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return poison


def network(dtype=torch.float64, seed=0, **settings):
    """A random textbook network, affines and statistics away from 1 and 0."""
    torch.manual_seed(seed)
    made = SparseNet(Architecture(**settings), "reference").to(dtype)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if "norm" in name or "running" in name:
            nn.init.uniform_(tensor.data, 0.5, 1.5)
    return made.to(DEVICE)


def stages(layers=4, memory="normal", implementations=("reference", "triton"), **settings):
    """The same random stage in several implementations, and the width of its input."""
    convolutions = 1 + settings.get("bottleneck", False) + (settings.get("aggregation") == "sum")
    whole = network(depth=4 + 3 * layers * convolutions, **settings)
    made = []
    for implementation in implementations:
        stage = copy.deepcopy(whole.stages[0])
        stage.implementation = implementation
        stage.plan = dataclasses.replace(
            stage.plan, memory=memory if implementation == "triton" else "normal"
        )
        made.append(stage)
    return made, whole.architecture.stages[0].in_width


def forward_backward(stage, x, seed=1):
    """Output, input gradient, parameter gradients, running statistics."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = stage(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out).reshape(out.shape)
    out.backward(weights)
    gradients = {name: p.grad for name, p in stage.named_parameters()}
    running = {name: b for name, b in stage.named_buffers() if b.is_floating_point()}
    return out, x.grad, gradients, running


def assert_equal_stages(pair_of_stages, x, training=True):
    reference, actual = (forward_backward(stage.train(training), x) for stage in pair_of_stages)
    close(actual[0], reference[0])
    scale = max(
        g.abs().max() for g in reference[2].values() if g is not None
    )  # some true gradients are 0
    for name, gradient in {**reference[2], "the input": reference[1]}.items():
        own = actual[1] if name == "the input" else actual[2][name]
        assert (gradient is None) == (own is None), name
        if gradient is not None:
            close(own, gradient, max(scale, gradient.abs().max()))
            assert name == "the input" or own.stride() == gradient.stride(), name
    for name, buffer in reference[3].items():
        close(actual[3][name], buffer)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("fetch", ["sparse", "dense", "harmonic", "windowed:2"])
def test_equals_reference(fetch, bottleneck, training):
    made, width = stages(3 if bottleneck else 5, fetch=fetch, growth_rate=3, bottleneck=bottleneck)
    assert_equal_stages(made, random(2, width, 5, 7), training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fetch", ["sparse", "dense", lambda i: [max(i - 2, 0)]])
def test_sums_equal_the_reference(fetch, training):
    made, width = stages(4, fetch=fetch, growth_rate=3, aggregation="sum", dropout=0.3)
    assert_equal_stages(made, random(2, width, 5, 7), training)


def test_fan_outs_from_one_to_seven():
    made, width = stages(7, fetch="dense", growth_rate=2)
    counts = {sum(j in read for read in made[0].plan.reads) for j in range(8)}
    assert counts == set(range(1, 9))
    assert_equal_stages(made, random(2, width, 4, 4))


SHAPES = [  # growth rate; batch, height, width
    (1, (1, 1, 2)),
    (1, (3, 7, 5)),
    (12, (2, 3, 3)),
    (24, (1, 9, 8)),
    (36, (2, 5, 1)),
    (50, (1, 1, 3)),
    (64, (2, 2, 2)),
]


@pytest.mark.parametrize(("growth", "shape"), SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_width_batch_and_size(growth, shape, layout):
    made, width = stages(3, growth_rate=growth)
    assert_equal_stages(made, random(shape[0], width, *shape[1:]).contiguous(memory_format=layout))


@pytest.mark.parametrize(("processors", "parts"), [(1, 1), (1, 2), (10**6, 3), (10**6, 512)])
def test_however_the_pixels_are_dealt_out(processors, parts, monkeypatch):
    monkeypatch.setattr(triton, "processors", lambda device: processors)
    monkeypatch.setattr(triton, "PARTS", parts)
    made, width = stages(2, growth_rate=4)
    assert_equal_stages(made, random(3, width, 9, 11))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lean_memory_and_dropout_change_nothing(dropout, training):
    made, width = stages(3, "lean", growth_rate=3, bottleneck=True, dropout=dropout)
    assert made[1].plan.recomputed
    assert_equal_stages(made, random(2, width, 5, 5), training)


def test_without_gradients_features_make_room_for_others():
    (reference, actual), width = stages(5, fetch="windowed:2", growth_rate=3)
    x = random(2, width, 5, 5)
    with torch.no_grad():
        for training in (True, False):
            close(actual.train(training)(x), reference.train(training)(x))
        assert actual(x[:0]).shape == reference(x[:0]).shape


def test_features_nobody_reads():
    made, width = stages(5, fetch=lambda i: [max(i - 2, 0)], growth_rate=3)
    x = random(2, width, 5, 5)
    expected, actual = (forward_backward(stage.train(), x) for stage in made)
    close(actual[0], expected[0])
    for name, gradient in expected[2].items():
        assert (gradient is None) == (actual[2][name] is None), name
        if gradient is not None:
            close(actual[2][name], gradient, torch.tensor(1.0))


def test_the_whole_network():
    reference = network(depth=13, growth_rate=3)
    actual = SparseNet(reference.architecture, "triton").to(DEVICE, torch.float64)
    actual.load_state_dict(reference.state_dict())
    assert actual.implementation == "triton"
    images = random(2, 3, 8, 8)
    for model in (reference.train(), actual.train()):
        model(images).square().sum().backward()
    largest = max(p.grad.abs().max() for p in reference.parameters())
    for (name, p), q in zip(reference.named_parameters(), actual.parameters(), strict=True):
        close(q.grad, p.grad, largest), name
    close(actual.eval()(images), reference.eval()(images))


PRECISIONS = [torch.bfloat16, *[torch.float16, torch.float32] * GPU]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_gradients_are_the_references(dropout):
    made, width = stages(2, growth_rate=3, bottleneck=True, dropout=dropout)
    images, found = random(2, width, 4, 4), []
    for stage in made:
        x = images.clone().requires_grad_()
        torch.manual_seed(0)
        (slope,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([x.grad, *(p.grad for p in stage.parameters())])
    for expected, actual in zip(*found, strict=True):
        close(actual, expected)


def test_hooks_fire():
    (_, stage), width = stages(2, growth_rate=3)
    fired = []
    stage.layers[1][0].conv.register_forward_hook(lambda *_: fired.append(1))
    with pytest.warns(UserWarning, match="has hooks"):
        stage(random(2, width, 4, 4))
    assert fired == [1]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_low_precision_errs_no_more_than_the_textbook(bottleneck, precision, monkeypatch):
    """Against an fp64 truth: at most twice the reference's own error, a rounding, and chance."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    draws, errors = 16 if GPU else 4, {"reference": [], "triton": []}
    for seed in range(draws):
        (truth, *made), width = stages(
            3,
            growth_rate=6,
            bottleneck=bottleneck,
            seed=seed,
            implementations=("reference", *errors),
        )
        x = random(4, width, 8, 8).to(torch.bfloat16).double()
        expected = forward_backward(truth.train(), x)
        for actual, stage in zip(errors.values(), made, strict=True):
            with torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32):
                results = forward_backward(stage.float().train(), x.to(precision))
            actual.append(_errors(results, expected))
    own, actual = (torch.stack(each).median(0).values for each in errors.values())
    luck = torch.full_like(
        own, (5 * math.pi / 2) ** 0.5 * chance(draws * 4 * 8 * 8 * 6)
    )  # π/2: of a median
    # In fp32 few draws have a ReLU that flips.
    luck[_exact(results) if precision != torch.float32 else slice(None)] = 0
    assert (actual <= 2 * own + torch.finfo(precision).eps + luck).all()


def test_statistics_survive_a_mean_far_from_zero():
    """In fp32 data around 1000 ``E[x²] - E[x]²`` would lose six digits of seven."""
    (truth, stage), width = stages(1, growth_rate=2)
    x = random(4, width, 9, 9) + 1000
    expected, actual = truth.train()(x), stage.float().train()(x.float())
    tolerance = 20 * 1000 * torch.finfo(torch.float32).eps
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()
    close(stage.statistics[0].running_var.double(), truth.statistics[0].running_var, tolerance=1e-5)


def test_the_same_input_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    (first, second), width = stages(
        3, dtype=torch.float32, growth_rate=5, implementations=["triton"] * 2
    )
    x = random(3, width, 9, 9, dtype=torch.float32)
    one, other = (forward_backward(stage.train(), x) for stage in (first, second))
    for a, b in zip([*one[:2], *one[2].values()], [*other[:2], *other[2].values()], strict=True):
        assert torch.equal(a, b)


def test_nan_stays_nan():
    (stage,), width = stages(1, growth_rate=2, implementations=["triton"])
    x = random(1, width, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    assert stage.eval()(x).isnan().any()


def test_a_second_backward_over_a_kept_graph_gives_the_same():
    (stage,), width = stages(2, growth_rate=2, implementations=["triton"])
    out = stage.train()(random(2, width, 3, 3))
    first, second = (
        torch.autograd.grad(out.sum(), stage.layers[0][0].conv.weight, retain_graph=True)
        for _ in "ab"
    )
    assert torch.equal(first[0], second[0])


@given(
    pixels=st.integers(1, 10**9),
    programs=st.integers(1, 500),
    width=st.sampled_from([16, 32, 64]),
    processors=st.integers(1, 1000),
    most=st.integers(1, 1000) | st.none(),
)
def test_every_pixel_is_dealt_out_once(pixels, programs, width, processors, most):
    rows, span, parts = triton.PixelSplit.of(pixels, programs, width, processors, most)
    assert span % rows == 0 and 1 <= parts <= (most or pixels)
    assert (parts - 1) * span < pixels <= parts * span


@pytest.mark.parametrize(
    "widths", [(48, 24, 24, 24), (7, 1, 1, 1), (64, 128, 32, 128), (12, 36, 100, 6)]
)
def test_pieces_cover_every_column_once(widths):
    plan = Plan(((0,), (1, 0), (2, 1), (3, 2, 0)))
    tables = triton.Tables.of(plan, widths, DEVICE)
    for read, pieces in zip(plan.reads, tables.readers, strict=True):
        rows = pieces.table.tolist()
        assert all(value % tables.unit == 0 for row in rows for value in row[:7])
        assert all(0 < row[3] <= tables.width for row in rows)
        spans = [(row[4], row[4] + row[3]) for row in rows]
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
        assert spans[-1][1] == rows[0][5] == sum(widths[j] for j in read)


def test_asking_for_it_where_it_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.choose("triton") == "triton"  # the device is not known yet
    with pytest.raises(
        ValueError, match=r"'triton' cannot run here: expected a CUDA device.*TRITON_INTERPRET=1"
    ):
        dispatch.choose("triton", torch.device("cpu"))


@pytest.mark.skipif(GPU, reason="about a machine where Triton finds no device")
def test_a_device_that_triton_cannot_use_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    device = torch.device("cuda")
    for capability, reason in (
        ((7, 5), "compute capability 8.0 or later, found 7.5"),
        ((9, 0), "which Triton needs"),
    ):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, actual=capability: actual
        )
        with pytest.raises(ValueError, match=f"'triton' cannot run here: expected .*{reason}"):
            dispatch.choose("triton", device)
        assert dispatch.choose("auto", device) == "shared"


def test_without_triton_installed_the_extra_is_named():
    code = """
import sys
sys.modules["triton"] = None
from sparsenet.ops import dispatch
dispatch.choose("triton")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in process.stderr
    assert "pip install '.[triton]'" in process.stderr


@on_a_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("growth", "size", "bottleneck"), [(24, 32, False), (24, 8, False), (32, 28, True)]
)
def test_at_full_size(growth, size, bottleneck, precision):
    """Many programs and parts, held to the error of ``reference`` at the same precision."""
    made, width = stages(
        8,
        growth_rate=growth,
        bottleneck=bottleneck,
        implementations=("reference", "reference", "triton"),
    )
    x = random(64, width, size, size).to(torch.bfloat16)
    truth = forward_backward(made[0].train(), x.double())
    results = []
    for stage in made[1:]:
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            results.append(forward_backward(stage.float().train(), x.to(precision)))
    own, actual = (_errors(each, truth) for each in results)
    luck = 5**0.5 * chance(64 * size * size * growth)
    # Of one draw a single tensor's error is a matter of luck, all of them vary less; and a wrong
    # one is off by 1.
    assert (
        actual.square().mean().sqrt()
        <= 2 * own.square().mean().sqrt() + torch.finfo(precision).eps + luck
    )
    assert actual[:2].max() <= 2 * own[:2].max() + torch.finfo(precision).eps + luck


def _errors(results, truth):
    """Relative, of each tensor."""
    pairs = zip(_flat(results), _flat(truth), strict=True)
    return torch.stack(
        [((actual.double() - exact).norm() / exact.norm()).cpu() for actual, exact in pairs]
    )


def _exact(results):
    """Which of them are no gradients: a ReLU that flips moves them little."""
    _, _, gradients, buffers = results
    return torch.tensor([True, False] + [False] * len(gradients) + [True] * len(buffers))


def _flat(results):
    out, d_x, gradients, buffers = results
    return [out, d_x, *gradients.values(), *buffers.values()]


@on_a_gpu
def test_a_captured_step_is_the_step():
    (stage, captured), width = stages(4, growth_rate=12, implementations=["triton"] * 2)
    x = random(
        8, width, 16, 16
    )  # fp64: algorithms may differ and round differently, and then a ReLU may flip
    given = torch.zeros_like(x).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.train()(given).sum().backward()  # makes tables and compiles
    torch.cuda.current_stream().wait_stream(side)
    captured.load_state_dict(stage.state_dict())
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        out = captured(given)
        out.sum().backward()
    with torch.no_grad():
        given.copy_(x)
    graph.replay()
    expected = stage.train()(x)
    expected.sum().backward()
    close(out, expected)
    largest = max(p.grad.abs().max() for p in stage.parameters())
    for p, q in zip(stage.parameters(), captured.parameters(), strict=True):
        close(q.grad, p.grad, largest)


@on_a_gpu
def test_a_block_of_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of memory on the device")
    (stage,), width = stages(2, dtype=torch.float32, growth_rate=64, implementations=["triton"])
    x = random(1, width, 64, 64, dtype=torch.float32).bfloat16()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = stage.eval()(x)
        actual = stage(x.expand(2200, -1, -1, -1))
    assert actual.shape[0] * 64 * 64 * (width + 2 * 64) > 2**31
    assert torch.equal(actual[-1], actual[0])
    assert (actual[0] - expected[0]).abs().max() <= 2**-5 * expected.abs().max()
