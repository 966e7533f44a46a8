"""The implementations compute one function: outputs, gradients, statistics, training steps."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from benchmarks.bench.equality import chance, fewest_relus
from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops import dispatch
from sparsenet.ops.dispatch import aggregate, choose, unavailable
from sparsenet.ops.engine import Engine
from sparsenet.ops.plan import Operands, Plan, Reader, Statistics

EXACT = 1e-10  # relative, in fp64
FETCHES = ["sparse", "sparse:3", "dense", "harmonic", "windowed:2"]


@pytest.fixture(params=["shared", "native"])
def engine(request):
    """The implementations that are held to the reference here; ``triton`` has a file of its own."""
    if reason := unavailable(request.param, torch.device("cpu")):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def pair(engine, dtype=torch.float64, seed=0, **settings):
    """The same random network as ``reference`` and as *engine*, with no affine at 1 or 0."""
    torch.manual_seed(seed)
    reference = SparseNet(Architecture(**settings), "reference").to(dtype)
    for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
        if "norm" in name or "running" in name:
            nn.init.uniform_(tensor.data, 0.5, 1.5)
    shared = SparseNet(reference.architecture, engine).to(dtype)
    shared.load_state_dict(reference.state_dict())
    return reference, shared


def close(actual, expected, scale=None, tolerance=EXACT):
    largest = expected.abs().max() if scale is None else scale
    assert (actual - expected).abs().max() <= tolerance * largest.clamp(min=1e-6)


def forward_backward(model, images, d_logits):
    images = images.clone().requires_grad_()
    logits = model(images)
    logits.backward(d_logits)
    return logits, images.grad, {name: p.grad for name, p in model.named_parameters()}


def assert_equal_networks(reference, shared, images):
    d_logits = torch.randn(len(images), reference.num_classes, dtype=images.dtype)
    torch.manual_seed(1)
    logits, d_images, gradients = forward_backward(reference, images, d_logits)
    torch.manual_seed(1)
    actual, d_actual, actual_gradients = forward_backward(shared, images, d_logits)
    close(actual, logits)
    close(d_actual, d_images, max(g.abs().max() for g in gradients.values()))
    scale = max(
        g.abs().max() for g in gradients.values()
    )  # some true gradients are 0 and have no scale of their own
    for name, gradient in gradients.items():
        close(actual_gradients[name], gradient, scale)
    for (name, buffer), other in zip(reference.named_buffers(), shared.buffers(), strict=True):
        close(other, buffer), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("aggregation", ["concat", "sum"])
def test_engines_equal_the_reference(engine, aggregation, fetch, bottleneck, training):
    depth, width = (28, 3) if aggregation == "concat" else (31, 4) if bottleneck else (34, 3)
    settings = {
        "fetch": fetch,
        "aggregation": aggregation,
        "bottleneck": bottleneck,
        "depth": depth,
    }
    reference, shared = pair(engine, **settings, growth_rate=width, num_classes=4)
    images = torch.randn(3, 3, 9, 11, dtype=torch.float64)
    assert_equal_networks(reference.train(training), shared.train(training), images)


@pytest.mark.parametrize(
    ("growth", "batch", "size"), [(1, 1, 8), (2, 8, 9), (7, 2, 13), (48, 1, 8), (24, 5, 11)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shapes_and_layouts(engine, growth, batch, size, layout):
    reference, shared = pair(engine, depth=16, growth_rate=growth)
    images = torch.randn(batch, 3, size, size, dtype=torch.float64).contiguous(memory_format=layout)
    assert_equal_networks(reference.train(), shared.train(), images)


@pytest.mark.parametrize("aggregation", ["concat", "sum"])
def test_dropout_drops_the_same(engine, aggregation):
    settings = {"aggregation": aggregation, "bottleneck": aggregation == "concat"}
    reference, shared = pair(engine, depth=22, growth_rate=4, dropout=0.3, **settings)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_equal_networks(reference.train(), shared.train(), images)
    close(shared.eval()(images), reference.eval()(images))


def remembering(model, memory):
    """The network with another choice of what is kept for backward."""
    for stage in model.stages:
        stage.plan = dataclasses.replace(stage.plan, memory=memory)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "settings",
    [
        {"fetch": "sparse", "bottleneck": True, "growth_rate": 3},
        {"fetch": "dense", "bottleneck": True, "growth_rate": 3},
        {"fetch": "windowed:1", "growth_rate": 3},
        {"fetch": "sparse", "aggregation": "sum", "growth_rate": 3},
        {"fetch": "dense", "aggregation": "sum", "bottleneck": True, "growth_rate": 4},
    ],
)
def test_lean_memory_changes_nothing(engine, settings, dropout):
    reference, shared = pair(engine, depth=22, dropout=dropout, **settings)
    lean = remembering(shared, "lean")
    assert all(stage.plan.for_engine.recomputed for stage in lean.stages)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_equal_networks(reference.train(), lean.train(), images)
    assert_equal_networks(reference.eval(), lean.eval(), images)


READS = st.integers(1, 9).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, i), min_size=1).map(tuple) for i in range(n)))
)


@given(reads=READS)
def test_the_gradient_of_a_feature_begins_with_its_last_reader_that_has_one(reads):
    plan = Plan(reads)
    needed = {len(reads) - 1}  # readers that the output depends on
    for r in reversed(range(len(reads) - 1)):
        if any(r + 1 in reads[later] for later in needed):
            needed.add(r)
    for j, first in enumerate(plan.first_gradient_from):
        assert first == max((r for r in needed if j in reads[r]), default=None)


@given(
    reads=READS, memory=st.sampled_from(["normal", "lean"]), gradient=st.booleans(), data=st.data()
)
def test_no_feature_lies_where_another_is_still_needed(reads, memory, gradient, data):
    """What a reader reads, makes, or others read later has columns of its own in the block."""
    plan = Plan(reads, memory=memory, gradient=gradient)
    widths = data.draw(st.tuples(*(st.integers(1, 3) for _ in reads)))
    columns = plan.columns(widths)
    spans = [
        set(range(first, first + width)) for first, width in zip(columns.first, widths, strict=True)
    ]
    assert max(max(span) for span in spans) < columns.total <= sum(widths)
    last = plan.topology.last_reader
    kept = gradient and memory == "normal"
    for r, read in enumerate(reads):
        later = {j for j in range(r + 1) if last[j] > r + 1 or kept}
        later -= plan.recomputed
        alive = sorted(later | set(read) | ({r + 1} if r + 1 < len(reads) else set()))
        for a, b in itertools.combinations(alive, 2):
            assert not spans[a] & spans[b], (r, a, b)


@given(reads=READS, memory=st.sampled_from(["normal", "lean"]), gradient=st.booleans())
def test_the_block_is_as_small_as_what_is_needed_at_a_time(reads, memory, gradient):
    """Features of one width take the places of those that no later reader and no backward reads."""
    plan = Plan(reads, memory=memory, gradient=gradient)
    last = plan.topology.last_reader
    needed = []
    for made in range(len(reads)):
        kept = [j for j in range(made) if gradient and j not in plan.recomputed]
        read_later = [j for j in range(made) if max(last[j], j) >= made]
        needed.append(len({*kept, *read_later, made}))
    assert plan.columns([1] * len(reads)).total == max(needed)


def test_lean_memory_and_inference_take_fewer_columns():
    (stage, *_) = Architecture(depth=40, growth_rate=12, bottleneck=True).stages
    everything = sum(stage.unit_widths)
    for plan in (Plan(stage.reads, memory="lean"), Plan(stage.reads).without_gradient):
        assert plan.columns(stage.unit_widths).total < everything / 2
    assert Plan(stage.reads).columns(stage.unit_widths).total == everything


@pytest.mark.parametrize("aggregation", ["concat", "sum"])
def test_features_nobody_reads(engine, aggregation):
    skipping = lambda i: [max(i - 2, 0)]  # noqa: E731
    depth = 19 if aggregation == "concat" else 34
    reference, shared = pair(
        engine, fetch=skipping, aggregation=aggregation, depth=depth, growth_rate=3
    )
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = [
        forward_backward(m.train(), images, torch.ones(2, 10).double()) for m in (reference, shared)
    ]
    close(results[1][0], results[0][0])
    for name, gradient in results[0][2].items():
        actual = results[1][2][name]
        assert (gradient is None) == (actual is None), name
        if gradient is not None:
            close(actual, gradient, torch.tensor(1.0))


@pytest.mark.parametrize("settings", [{"depth": 19}, {"aggregation": "sum", "depth": 28}])
def test_memory_that_is_read_was_written(engine, monkeypatch, settings):
    """Uninitialised memory full of NaN changes nothing."""
    reference, poisoned = pair(engine, fetch="sparse", growth_rate=5, **settings)
    empty = Engine.empty
    monkeypatch.setattr(Engine, "empty", lambda self, width: empty(self, width).fill_(float("nan")))
    assert_equal_networks(
        reference.train(), poisoned.train(), torch.randn(2, 3, 7, 8, dtype=torch.float64)
    )


@pytest.mark.parametrize("bottleneck", [False, True])
def test_twenty_training_steps(engine, bottleneck):
    models = pair(engine, fetch="sparse", depth=16, growth_rate=4, bottleneck=bottleneck)
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(10, (4,))) for _ in range(20)]
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    reference, shared = (m.state_dict() for m in models)
    for name, tensor in reference.items():
        close(shared[name], tensor)


def stage(reads=((0,), (1, 0), (2, 0, 1)), growth=2, width=3, kernel=3, aggregation="concat"):
    plan = Plan(reads, aggregation)
    widths = [width] + [growth] * (len(reads) - 1)
    readers = []
    for r, read in enumerate(reads):
        gathered = sum(widths[j] for j in read) if aggregation == "concat" else growth
        weight = (
            torch.randn(growth, gathered, kernel, kernel).double() * 0.3
            if r < len(reads) - 1
            else None
        )
        scale, shift = torch.rand(gathered).double() + 0.5, torch.randn(gathered).double()
        readers.append(Reader(scale, shift, weight))
    statistics = [Statistics(torch.zeros(w).double(), torch.ones(w).double()) for w in widths]
    return plan, readers, statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_gradcheck(engine, training, kernel):
    torch.manual_seed(0)
    plan, readers, statistics = stage(kernel=kernel)
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    tensors = [t.requires_grad_() for reader in readers for t in reader if t is not None]

    def run(x, *tensors):
        given = iter(tensors)
        again = [
            Reader(*(None if t is None else next(given) for t in reader)) for reader in readers
        ]
        return aggregate(engine, plan, x, Operands(again, statistics, training))

    assert torch.autograd.gradcheck(run, (x, *tensors))


@given(reads=READS, aggregation=st.sampled_from(["concat", "sum"]), training=st.booleans())
@settings(deadline=None)
def test_any_topology_gives_what_the_reference_does(reads, aggregation, training):
    torch.manual_seed(0)
    plan, readers, statistics = stage(reads, 2, 2, 1, aggregation)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(t.requires_grad_() for reader in readers for t in reader if t is not None)]
    results = {}
    for implementation in (
        "reference",
        *(e for e in ("shared", "native") if not unavailable(e, x.device)),
    ):
        kept = copy.deepcopy(statistics)
        out = aggregate(implementation, plan, x, Operands(readers, kept, training))
        gradients = torch.autograd.grad(out, tensors, out.detach().sin(), allow_unused=True)
        results[implementation] = [out, *gradients, *(t for each in kept for t in each)]
        with torch.no_grad():
            again = Operands(readers, copy.deepcopy(statistics), training)
            close(aggregate(implementation, plan, x, again), out)
    expected = results.pop("reference")
    scale = max(t.abs().max() for t in expected if t is not None)
    for actual in results.values():
        for a, b in zip(actual, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or close(a, b, scale) is None


@pytest.mark.parametrize("which", [0, 1])
def test_running_statistics_move_once_a_step_and_belong_to_the_feature(engine, which):
    model = pair(engine, depth=13, growth_rate=2)[which].train()
    stage = model.stages[0]
    before = [copy.deepcopy(s.state_dict()) for s in stage.statistics]
    x = torch.randn(4, stage.statistics[0].running_mean.numel(), 8, 8, dtype=torch.float64)
    stage(x).sum().backward()  # backward recomputes, and must not update again
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    close(stage.statistics[0].running_mean, 0.9 * before[0]["running_mean"] + 0.1 * mean)
    close(stage.statistics[0].running_var, 0.9 * before[0]["running_var"] + 0.1 * var)


def test_what_backward_keeps_grows_with_features_not_with_links(engine):
    """Bytes saved for backward: the features once, where the textbook saves every concatenation."""
    saved = {}
    for implementation in ("reference", engine):
        model = SparseNet(
            Architecture(fetch="dense", depth=40, growth_rate=4), implementation
        ).train()
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.stages[0](torch.randn(2, 8, 16, 16, requires_grad=True))
        saved[implementation] = sum(kept.values())
    features = 2 * 16 * 16 * 4 * (8 + 12 * 4)
    parameters = sum(4 * p.numel() for p in model.stages[0].parameters())
    assert saved[engine] <= 1.05 * (features + parameters)
    assert saved[engine] < 0.35 * saved["reference"]


def errors_in_half(implementation, architecture, start, images, d_logits, expected):
    """Relative errors of logits and of each gradient in bf16."""
    model = SparseNet(architecture, implementation)
    model.load_state_dict(start)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, gradients = forward_backward(model.train(), images.float(), d_logits.float())
    found = [logits, *(gradients[name] for name in expected[1])]
    true = [expected[0], *expected[1].values()]
    return torch.stack(
        [(f.double() - e).norm() / e.norm() for f, e in zip(found, true, strict=True)]
    )


@functools.cache  # each build of the kernels is held to them
def textbook_in_half(seed, **settings):
    """A network and a batch with their fp64 truth, and the reference's own errors."""
    truth, _ = pair("reference", seed=seed, **settings)
    start = copy.deepcopy(truth.state_dict())
    images, d_logits = torch.randn(8, 3, 16, 16).bfloat16().double(), torch.randn(8, 10).double()
    logits, _, gradients = forward_backward(truth.train(), images, d_logits)
    case = truth.architecture, start, images, d_logits, (logits.detach(), gradients)
    return case, errors_in_half("reference", *case)


@pytest.mark.parametrize("more", [{}, {"bottleneck": True}, {"aggregation": "sum"}])
def test_half_precision_errs_no_more_than_the_textbook(engine, more):
    """Against an fp64 truth: at most twice the reference's own error, a rounding, and chance."""
    textbook = [textbook_in_half(seed, depth=22, growth_rate=6, **more) for seed in range(16)]
    own = torch.stack([errors for _, errors in textbook]).mean(0)
    actual = torch.stack([errors_in_half(engine, *case) for case, _ in textbook]).mean(0)
    architecture = textbook[0][0][0]
    luck = torch.full_like(own, 5**0.5 * chance(16 * fewest_relus(architecture, 8, 16)))
    luck[0] = 0  # no ReLU that flips moves logits far
    assert (actual <= 2 * own + 2**-8 + luck).all()


def test_a_second_backward_over_a_kept_graph_gives_the_same(engine):
    _, shared = pair(engine, depth=13, growth_rate=2)
    logits = shared.train()(torch.randn(2, 3, 8, 8).double())
    weight = shared.stages[0].layers[0][0].conv.weight
    first, second = (
        torch.autograd.grad(logits.sum(), weight, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_lean_memory_allows_a_second_backward(engine):
    _, model = pair(engine, depth=16, growth_rate=2, bottleneck=True, dropout=0.2)
    logits = remembering(model, "lean").train()(torch.randn(2, 3, 8, 8).double())
    weight = model.stages[0].layers[0][0].conv.weight
    first, second = (
        torch.autograd.grad(logits.sum(), weight, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_stage_input_is_left_as_it_was(engine):
    _, shared = pair(engine, depth=13, growth_rate=2)
    x = torch.randn(2, 4, 8, 8).double()
    before = x.clone()
    shared.train().stages[0](x)
    assert torch.equal(x, before)


def test_auto_picks_by_device_what_can_run_there(monkeypatch):
    assert choose("auto") == "auto"  # until the device is known
    assert choose("auto", torch.device("meta")) == "shared"
    assert SparseNet(Architecture(depth=7, growth_rate=2)).to("meta").implementation == "shared"
    monkeypatch.setattr(dispatch, "unavailable", lambda implementation, device: None)
    assert choose("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(
        dispatch, "unavailable", lambda name, device: "no reason" if name == "triton" else None
    )
    assert choose("auto", torch.device("cuda")) == "shared"


def test_asking_for_what_cannot_run_says_why():
    with pytest.raises(
        ValueError, match=r"expected one of auto, reference, shared, .*found 'fast'"
    ):
        choose("fast")


@pytest.mark.parametrize("implementation", ["reference", "shared", "native"])
def test_one_value_a_channel_has_no_variance(implementation):
    model = SparseNet(Architecture(depth=7, growth_rate=2), implementation).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 4, 4))
