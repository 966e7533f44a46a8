"""The benchmark can be believed: turns are taken, what is wrong is not timed, figures are what they say."""

import json
import math
import os
import re
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import record_on_cpu
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench import BenchConfig, bench, depth, equality, measure, memory, plots, tables
from benchmarks.bench.epoch import epochs, trained, write_images
from benchmarks.bench.equality import check
from benchmarks.bench.variants import Variant, Workload, defaults
from sparsenet import zoo
from sparsenet.architecture import Architecture
from sparsenet.data.config import DataConfig
from sparsenet.data.load import load_dataset
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import IMPLEMENTATIONS
from sparsenet.ops.plan import EPS, Plan

CPU = torch.device("cpu")
TINY = Architecture(depth=10, growth_rate=4)  # two layers a stage
REFERENCE, SHARED = Variant("reference", "fp32"), Variant("shared", "fp32")
SMALL = {
    "model": ("sparsenet_40_12",),
    "batch_size": 2,
    "image_size": 8,
    "steps": 2,
    "device": "cpu",
}


def workload(name, batch_size=4, image_size=8, architecture=TINY):
    return Workload(Variant.parse(name), architecture, batch_size, image_size, CPU)


def checked(*names, batch_size=4):
    return check(
        {Variant.parse(name): workload(name, batch_size) for name in names}, TINY, batch_size, 8
    )


# --- variants -------------------------------------------------------------------------------------


@given(
    st.sampled_from(list(IMPLEMENTATIONS)),
    st.sampled_from(["fp32", "bf16"]),
    st.permutations(["nhwc", "lean", "captured", "compiled"]),
    st.integers(0, 4),
)
def test_a_name_is_its_variant_in_any_order_of_options(implementation, precision, options, count):
    name = "-".join((implementation, precision, *options[:count]))
    variant = Variant.parse(name)
    assert Variant.parse(str(variant)) == variant
    assert (variant.implementation, variant.precision, set(variant.options)) == (
        *(implementation, precision),
        set(options[:count]),
    )


def test_by_default_every_implementation_is_compared_with_the_reference_first():
    found = list(defaults(("fp32", "bf16"), False, CPU))
    assert found[0] == REFERENCE
    assert {v.implementation for v in found} == set(IMPLEMENTATIONS)
    assert Variant("reference", "fp32", ("compiled",)) in defaults(("fp32",), True, CPU)


def test_what_cannot_run_is_told_and_only_refused_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(
        dispatch, "unavailable", lambda name, device: "of the moon" if name == "shared" else None
    )
    with pytest.raises(ValueError, match=r"--variants: shared-fp32 cannot run here: of the moon"):
        bench(BenchConfig(**SMALL, variants=("reference-fp32", "shared-fp32")))
    monkeypatch.setattr(
        dispatch,
        "IMPLEMENTATIONS",
        {name: IMPLEMENTATIONS[name] for name in ("reference", "shared")},
    )
    found = bench(BenchConfig(**SMALL, measures=("step",)))
    assert found["absent"] == {"shared-fp32": "of the moon"}
    assert [row["variant"] for row in found["rows"]] == ["reference-fp32"]
    assert "Not run: shared-fp32: of the moon." in tables.report(found)


# --- correctness ----------------------------------------------------------------------------------


def test_equal_networks_pass_and_say_how_equal_they_are():
    found = checked("reference-fp32", "shared-fp32", "shared-bf16")
    for errors in found.values():
        assert {"logits", "inference logits"} < errors.keys() and len(errors) == 3
        assert all(0 <= each["error"] <= each["allowed"] for each in errors.values())


def test_after_the_check_the_network_is_a_new_one_again():
    work = workload("shared-fp32")
    before = {name: tensor.clone() for name, tensor in work.model.state_dict().items()}
    images, labels = work.images.clone(), work.labels.clone()
    check({SHARED: work}, TINY, 4, 8)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in work.model.state_dict().items()
    )
    assert torch.equal(work.images, images) and torch.equal(work.labels, labels)


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(depth=7, growth_rate=4),
        Architecture(depth=22, growth_rate=6, bottleneck=True),
        Architecture(depth=16, growth_rate=8, aggregation="sum"),
        zoo.architecture("sparsenet_40_12"),
    ],
    ids=["plain", "bottleneck", "sum", "deep"],
)
def test_no_luck_refuses_what_is_right_however_small(architecture):
    """Of two images of 8 pixels a side, a few ReLUs that rounding flips are all of a gradient's error."""
    variants = [Variant("shared", precision) for precision in ("fp32", "bf16")]
    check({v: Workload(v, architecture, 2, 8, CPU) for v in variants}, architecture, 2, 8)


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_an_error_by_chance_varies_as_much_as_is_derived(share):
    """The gradient at a ReLU is like a product of two normal numbers, and at a share of them it changes."""
    relus, random = 4096, torch.Generator().manual_seed(0)
    squares = torch.randn(2, 1000, relus, generator=random).prod(0).square()
    flipped = torch.rand(squares.shape, generator=random) < share
    errors = ((squares * flipped).sum(1) / squares.sum(1)).sqrt()
    assert (
        errors.std() <= equality.SPREAD / relus**0.5 <= 1.3 * errors.std()
    )  # 1.2 times for 0.2: 1 / (1 - share)**.5


def _without_a_gradient(plan, x, readers, statistics, training):
    readers = [reader._replace(scale=reader.scale.detach().requires_grad_()) for reader in readers]
    return dispatch.reference.aggregate(plan, x, readers, statistics, training)


def _without_shifts(plan, x, readers, statistics, training):
    readers = [reader._replace(shift=0 * reader.shift) for reader in readers]
    return dispatch.reference.aggregate(plan, x, readers, statistics, training)


def _with_another_order(plan, x, readers, statistics, training):
    plan = Plan(tuple(read[::-1] for read in plan.reads))
    return dispatch.reference.aggregate(plan, x, readers, statistics, training)


def _always_as_in_training(plan, x, readers, statistics, training):
    return dispatch.reference.aggregate(plan, x, readers, statistics, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (_without_a_gradient, "gradients of stages"),
        (_without_shifts, "inference logits"),
        (_with_another_order, "inference logits"),
        (_always_as_in_training, "inference logits"),
    ],
)
def test_what_computes_something_else_is_not_timed(monkeypatch, wrong, what, precision):
    monkeypatch.setattr(dispatch.shared, "aggregate", wrong)
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("was timed"))
    name = f"shared-{precision}"
    with pytest.raises(
        ValueError, match=f"bench: the {what}.* of {name} differ from reference-fp32's by .*nothing"
    ):
        bench(
            BenchConfig(
                **SMALL | {"batch_size": 4}, variants=("reference-fp32", name), measures=("step",)
            )
        )


def _times(factor, tensor):
    """The tensor, whose gradient comes out so many times as large."""
    return tensor.detach() + factor * (tensor - tensor.detach())


def _with_gradients(**factors):
    """Of the first stage's parameters; the others' are right."""

    def aggregate(plan, x, readers, statistics, training):
        if x.shape[-1] == 16:
            changed = [
                {
                    k: _times(f, getattr(r, k))
                    for k, f in factors.items()
                    if getattr(r, k) is not None
                }
                for r in readers
            ]
            readers = [
                reader._replace(**each) for reader, each in zip(readers, changed, strict=True)
            ]
        return dispatch.reference.aggregate(plan, x, readers, statistics, training)

    return aggregate


def _as_if_statistics_had_no_gradient(plan, x, readers, statistics, training):
    right = dispatch.reference._batch_norm

    def wrong(plan, r, joined, reader, statistics, training):
        normed = right(plan, r, joined.detach(), reader, statistics, training)
        slope = reader.scale / (joined.detach().float().var((0, 2, 3), correction=0) + EPS).sqrt()
        return normed + (slope.view(-1, 1, 1) * (joined - joined.detach())).to(normed.dtype)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(dispatch.reference, "_batch_norm", wrong)
        return dispatch.reference.aggregate(plan, x, readers, statistics, training)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "wrong",
    [
        _with_gradients(weight=0.9),
        _with_gradients(scale=0.9),
        _with_gradients(shift=0.9),
        _with_gradients(weight=1.1),
        _with_gradients(weight=-1.0),
        _with_gradients(shift=-1.0),
        _as_if_statistics_had_no_gradient,
    ],
    ids=["weights", "scales", "shifts", "larger", "sign", "sign of shifts", "statistics"],
)
def test_a_gradient_that_is_wrong_by_a_tenth_is_found_in_either_precision(
    monkeypatch, wrong, precision
):
    """Though flipped ReLUs make an error of more than a tenth in bf16."""
    architecture, variant = Architecture(depth=13, growth_rate=12), Variant("shared", precision)
    check({variant: Workload(variant, architecture, 32, 16, CPU)}, architecture, 32, 16)
    monkeypatch.setattr(dispatch.shared, "aggregate", wrong)
    with pytest.raises(
        ValueError, match=r"bench: the (lengths of the )?gradients of st.* of shared-.* differ"
    ):
        check({variant: Workload(variant, architecture, 32, 16, CPU)}, architecture, 32, 16)


class Again:
    """Records by calling again; ``fail``: cannot record."""

    def __init__(self, fail=False):
        self.fail, self.replays = fail, 0

    def warm_up(self, work):
        return work()

    def capture(self, work):
        if self.fail:
            raise RuntimeError("this device is tired")
        outputs = work()

        def replay():
            self.replays += 1
            made = work()
            pairs = (
                [(outputs, made)]
                if isinstance(outputs, torch.Tensor)
                else zip(outputs, made, strict=True)
            )
            for old, new in pairs:
                old.copy_(new)

        return replay, outputs


def test_what_is_captured_is_checked_and_timed_as_replayed(monkeypatch):
    recorder = Again()
    record_on_cpu(monkeypatch, lambda device: recorder)
    monkeypatch.setattr(equality, "ENOUGH", 1)  # one batch
    found = bench(
        BenchConfig(
            **SMALL, variants=("reference-fp32", "shared-fp32-captured"), measures=("step", "infer")
        )
    )
    assert found["rows"][1]["errors"]["logits"]["error"] > 0
    assert recorder.replays == 2 * (1 + measure.WARM_UP + SMALL["steps"])
    assert [v.options for v in defaults(("fp32",), False, CPU) if v.implementation == "shared"] == [
        ("captured",),
        (),
    ]


def test_what_cannot_be_captured_is_not_timed_as_if_it_were(monkeypatch):
    record_on_cpu(monkeypatch, lambda device: Again(fail=True))
    with pytest.raises(
        ValueError,
        match=r"shared-fp32-captured: the inference pass is not captured: this device is",
    ):
        checked("reference-fp32", "shared-fp32-captured")
    with pytest.raises(
        ValueError,
        match="an epoch of shared-fp32-captured: the training step is not captured: this",
    ):
        epochs([Variant("shared", "fp32", ("captured",))], TINY, 4, 8, CPU, 20)


def test_what_does_not_compile_is_told_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("BackendCompilerFailed: no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: fails)
    with pytest.raises(
        ValueError, match=r"^bench: reference-fp32-compiled does not compile: Back.*: no compiler$"
    ):
        checked("reference-fp32", "reference-fp32-compiled")


# --- the clock ------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4))
def test_turns_are_taken(rounds, count):
    calls = []
    acts = {name: lambda name=name: calls.append(name) for name in range(count)}
    found = measure.interleaved(acts, rounds, CPU)
    assert calls == list(range(count)) * (measure.WARM_UP + rounds)
    assert list(found) == list(acts)
    assert all(each["min"] <= each["median"] <= each["max"] for each in found.values())


def test_a_process_of_its_own_measures_from_its_start():
    work = measure.work_of(REFERENCE, TINY, 2, 8, CPU)
    assert measure.alone("first", work | {"since": 0.0})["seconds"] > 1e9  # Unix time


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (-9, "", torch.OutOfMemoryError),
        (1, "…\ntorch.OutOfMemoryError: CUDA out of memory. Tried …", torch.OutOfMemoryError),
        (
            1,
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: …",
            torch.OutOfMemoryError,
        ),
        (1, "Traceback\nKeyError: 'x'", ValueError),
        (1, "", ValueError),
    ],
)
def test_a_process_that_fails_says_why(monkeypatch, code, said, expected):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code, stderr=said, stdout="")
    )
    with pytest.raises(
        expected, match="memory" if expected is torch.OutOfMemoryError else "KeyError|exit code 1"
    ):
        measure.alone("memory", {"variant": "shared-fp32"})


# --- the best batch -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "best", "ended"),
    [
        (
            [10, 19, 30, 30.5],
            512,
            "batch 512 gains less than 3%",
        ),  # and is still the best by a little
        ([10, 19, 18], 128, "batch 256 gains less than 3%"),
        ([10, 19, None], 128, "batch 256 does not fit into memory"),
    ],
)
def test_the_best_batch_is_found_by_doubling(monkeypatch, rates, best, ended):
    def alone(task, work):
        rate = rates[int(math.log2(work["batch_size"] // 64))]
        if rate is None:
            raise torch.OutOfMemoryError
        return {
            "batch_size": work["batch_size"],
            "train_images_per_second": rate,
            "peak_memory_mb": 1.0,
        }

    monkeypatch.setattr(measure, "alone", alone)
    found = measure.best_batch(3, measure.work_of(SHARED, TINY, 64, 8, CPU))
    assert (found["batch_size"], found["ended"]) == (best, ended)
    assert [trial["batch_size"] for trial in found["trials"]] == [
        64 * 2**i for i, r in enumerate(rates) if r
    ]


def test_a_batch_that_would_not_fit_into_a_shared_memory_is_not_tried(monkeypatch):
    trial = {"batch_size": 64, "train_images_per_second": 1.0, "peak_memory_mb": 600.0}
    monkeypatch.setattr(measure, "alone", lambda *_: trial)
    monkeypatch.setattr(memory, "available_mb", lambda: 1000.0)
    found = measure.best_batch(3, measure.work_of(SHARED, TINY, 64, 8, CPU))
    assert found["ended"] == "batch 128 needs about 1200 MB, 1000 MB are free"


# --- memory ---------------------------------------------------------------------------------------


def test_the_peak_is_of_what_is_alive_at_once():
    live = memory.Live(CPU)
    with live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # its own memory; the view has none
        del a
        c = torch.zeros(500)
        del b, c
    assert (live.highest, live.total, sorted(live.peak.values())) == (8000, 0, [4000, 4000])


def test_what_memory_consists_of_is_all_of_it():
    work = workload("shared-fp32", batch_size=64, image_size=16)
    work.mode(training=True)
    work.step()
    found = memory.parts(work, 100.0)
    parameters = sum(p.nbytes for p in work.model.parameters()) / memory.MB
    assert found["parameters"] == found["optimizer state"] == pytest.approx(parameters, abs=0.05)
    assert sum(value for name, value in found.items() if name not in memory.BASE) == pytest.approx(
        100.0, abs=0.5
    )
    reference = workload("reference-fp32", batch_size=64, image_size=16)
    reference.mode(training=True)
    reference.step()
    plain = memory.parts(reference, 100.0)
    assert plain["features"] == plain["gradient sums"] == plain["readers' buffers"] == 0
    assert (
        plain["other saved by autograd"] > found["features"] + found["other saved by autograd"] > 0
    )


def test_an_engines_blocks_are_known_by_the_sizes_of_its_plan():
    architecture = zoo.architecture("sparsenet_40_12")
    work = workload("shared-fp32", batch_size=16, image_size=8, architecture=architecture)
    work.mode(training=True)
    work.step()
    found, sizes = memory.parts(work, 0.0), sorted(memory.feature_blocks(work))
    # It is highest in the backward pass of the first stage: one block of features, one of their gradients' sums.
    assert (
        found["features"]
        == found["gradient sums"]
        == pytest.approx(sizes[-1] / memory.MB, abs=0.06)
    )
    assert 0 < found["readers' buffers"] < found["features"]


# --- a whole epoch --------------------------------------------------------------------------------


def test_random_images_are_read_as_any_others(tmp_path):
    write_images(tmp_path, 23, 5)
    data = load_dataset(DataConfig(dataset="c10", dataset_dir=str(tmp_path)))
    assert (len(data.train), len(data.test), len(data.classes)) == (23, 5, 10)
    assert data.train.pixels.float().std() > 70  # of 0 to 255, all equally likely: 73.9


def test_an_epoch_of_fewer_images_is_an_estimate():
    found = epochs([REFERENCE, SHARED], TINY, 8, 8, CPU, 20)
    assert list(found) == [REFERENCE, SHARED]
    for each in found.values():
        assert (each["batch_size"], each["images"], each["estimated_from_steps"]) == (8, 20, 3)
        assert each["train_seconds"]["median"] > 0 and each["test_seconds"]["median"] > 0
    assert trained(Variant("shared", "fp32", ("lean", "captured")))
    assert not trained(Variant("reference", "fp32", ("compiled",)))
    assert not trained(Variant("torchvision", "fp32"))


# --- depth ----------------------------------------------------------------------------------------


@given(
    st.floats(-10, 10),
    st.floats(-10, 10),
    st.lists(st.integers(7, 2000), min_size=2, max_size=8, unique=True),
)
def test_the_fit_finds_a_logarithm(a, b, depths):
    line = depth.fit([(math.log2(d), a + b * math.log2(d)) for d in depths])
    assert line["a"] + line["b"] * 7 == pytest.approx(
        a + b * 7, abs=1e-6 * (1 + abs(a) + abs(b)) / _span(depths)
    )
    assert line["b"] == pytest.approx(b, abs=1e-8 * (1 + abs(a) + abs(b)) / _span(depths))


def _span(depths):
    return math.log2(max(depths)) - math.log2(min(depths))


def test_growth_is_told_beside_the_logarithms():
    points = [_point(d, (math.log2(d), 2.0)) for d in (40, 100, 1000)]
    seconds, megabytes = depth.fits(points)
    assert seconds["r2"] == pytest.approx(1) and (seconds["from"], seconds["to"]) == (100, 1000)
    assert seconds["growth"] == pytest.approx(seconds["log_growth"]) == pytest.approx(1.5)
    assert megabytes["growth"] == 1 and megabytes["b"] == pytest.approx(0)


def _point(layers, figures, variant="shared-fp32", fetch="sparse"):
    names = ("seconds_per_layer", "mb_per_layer")
    total = {
        "train_seconds": dict.fromkeys(("median", "min", "max"), figures[0] * layers),
        "peak_memory_mb": 9.0,
    }
    where = {
        "variant": variant,
        "fetch": fetch,
        "depth": layers,
        "layers": layers,
        "left_out": None,
    }
    return where | total | dict(zip(names, figures, strict=True))


def test_a_depth_is_the_nearest_there_is():
    assert [depth.architecture("dense", d).depth for d in (7, 40, 250, 500, 1000)] == [
        7,
        40,
        250,
        499,
        1000,
    ]


@pytest.mark.parametrize(
    "seconds, free, reason", [(1.0, 1e9, "out of memory"), (400.0, 1e9, "s"), (1.0, 1.0, "MB")]
)
def test_what_does_not_fit_is_left_out_and_so_is_what_is_deeper(monkeypatch, seconds, free, reason):
    def alone(task, work):
        if sum(Architecture(**work["architecture"]).stage_depths) > 20:
            raise torch.OutOfMemoryError("far too much")
        return {"train_seconds": {"median": seconds}, "peak_memory_mb": 10.0}

    monkeypatch.setattr(measure, "alone", alone)
    monkeypatch.setattr(memory, "available_mb", lambda: free)
    points = depth.sweep([SHARED], [40, 10, 100], 2, 8, 1, CPU)["points"]
    for fetch in depth.FETCHES:
        own = [point for point in points if point["fetch"] == fetch]
        assert [point["depth"] for point in own] == [10, 40]
        assert (
            own[0]["left_out"] is None and own[1]["left_out"].endswith(reason)
        ) or "free" in own[1]["left_out"]


# --- what comes out -------------------------------------------------------------------------------


def _row(variant, seconds, megabytes):
    implementation, precision = variant.split("-")
    times = {"median": seconds, "min": 0.9 * seconds, "max": 1.1 * seconds}
    return {
        "model": "sparsenet_100_24", "image_size": 32, "batch_size": 64, "variant": variant, "options": [],
        "implementation": implementation, "precision": precision, "train_seconds": times, "infer_seconds": times,
        "peak_memory_mb": megabytes,
        "epoch": {
            "batch_size": 64, "images": 320, "train_seconds": times, "test_seconds": times, "estimated_from_steps": 5,
        },
    }  # fmt: skip


@pytest.fixture
def found():
    rows = [
        _row("reference-fp32", 8.0, 3000.0),
        _row("reference-bf16", 4.0, 1500.0),
        _row("shared-bf16", 2.0, 750.0),
    ]
    points = [_point(d, (0.001 * math.log2(d), 2.0)) for d in (40, 100, 1000)]
    points.append(
        {
            "variant": "shared-fp32",
            "fetch": "dense",
            "depth": 1000,
            "layers": 996,
            "left_out": "about 9 s",
        }
    )
    sweep = {"batch_size": 64, "growth_rate": 12, "points": points, "fits": depth.fits(points)}
    environment = {"device_name": "a machine", "threads": 2, "torch": "2", "commit": None}
    return {"steps": 5, "environment": environment, "absent": {}, "rows": rows, "depth": sweep}


def test_ratios_are_to_the_first_row_and_to_the_reference_in_the_same_precision(found):
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in tables.report(found)
        if line.startswith("| ")
    ]
    rows = {each[0]: each[1:] for each in cells[1:4]}
    assert cells[0][:4] == ["batch 64", "training step, s", "ratio", "same precision"]
    assert rows["reference-bf16"][:3] == ["4.00 (3.60–4.40)", "0.50", "1.00"]
    assert rows["shared-bf16"][:3] == ["2.00 (1.80–2.20)", "0.25", "0.50"]
    assert rows["shared-bf16"][6:] == ["750", "0.25", "0.50"]


def test_published_figures_are_named_as_such_and_estimates_as_estimates(found):
    lines = tables.report(found)
    published = [line for line in lines if "61–70" in line]
    assert len(published) == 1 and "*published:*" in published[0]
    assert sum("estimated from 5 steps" in line for line in lines) == 3
    for row in found["rows"]:
        row["model"] = "sparsenet_40_12"
    assert not any("published" in line for line in tables.report(found))


def test_figures_have_three_digits():
    numbers = (0, 0.00012345, 0.98765, 1.2345, 98.765, 1234.5)
    assert [tables._number(x) for x in numbers] == [
        "0",
        "0.000123",
        "0.988",
        "1.23",
        "98.8",
        "1,234",
    ]


def test_everything_is_written(found, tmp_path):
    folder = tmp_path / "out" / "of" / "it"
    plots.write(found, folder)
    assert {path.name for path in folder.iterdir()} == {
        "bench.json",
        "bench.md",
        "sparsenet_100_24.png",
        "depth.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert json.loads((folder / "bench.json").read_text()) == found
    page = (folder / "bench.md").read_text()
    assert (
        "](depth.png)" in page
        and "left out: about 9 s" in page
        and "×1.50, the logarithm ×1.50" in page
    )


def test_what_is_measured_is_a_json_value():
    config = BenchConfig(
        **SMALL, variants=("reference-fp32", "shared-bf16"), measures=("step", "infer")
    )
    found = bench(config)
    assert json.loads(json.dumps(found)) == found
    assert [row["variant"] for row in found["rows"]] == list(config.variants)
    assert {"torch", "device_name", "commit", "threads"} <= found["environment"].keys()
    assert tables.report(found) == tables.report(json.loads(json.dumps(found)))


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--variants", "refrence-fp32"), ("'refrence'", "did you mean reference?")),
        (("--variants", "shared"), ("a precision of fp32, bf16",)),
        (("--variants", "shared-fp32-fast"), ("'fast'", "compiled")),
        (("--variants", "shared-fp32-captured"), ("only cuda records", "cpu")),
        (("--variants", "torchvision-fp64"), ("'fp64'",)),
        (("--variants", "reference-fp32-lean"), ("keep everything",)),
        (("--measures", "step,speed"), ("step,infer,memory,first,epoch", "'speed'")),
        (("--precision", "fp16"), ("fp32,bf16", "'fp16'")),
        (("--steps", "0"), ("--steps", "at least 1", "0")),
        (("--steps", "many"), ("--steps", "a whole number", "'many'")),
        (("--batch-size", "-4"), ("--batch_size", "at least 1", "-4")),
        (("--epoch", "3", "--batch_size", "8"), ("--epoch", "3")),
        (("--depths", "40,x"), ("--depths", "'x'")),
        (("--depths", "4"), ("--depths", "at least 7", "4")),
        (("--model", ""), ("--model", "none")),
        (("--model", "sparsenet_40_12,sparsnet"), ("sparsenet", "'sparsnet'")),
    ],
)
def test_a_bad_call_gets_one_line(call, flags, expected):
    outcome = bench_command("--device", "cpu", *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert all(part in outcome.error for part in expected), outcome.error


def test_lists_may_have_commas_or_be_given_again(call):
    tiny = (
        "--batch_size",
        2,
        "--image_size",
        8,
        "--steps",
        1,
        "--device",
        "cpu",
        "--measures",
        "step",
    )
    names = (
        "--model",
        "sparsenet_40_12",
        "--model",
        "densenet_40_12",
        "--variants",
        "reference-fp32,shared-fp32",
    )
    outcome = bench_command(*tiny, *names, "--out", "there", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert [(row["model"], row["implementation"]) for row in found["rows"]] == [
        (model, each)
        for model in ("sparsenet_40_12", "densenet_40_12")
        for each in ("reference", "shared")
    ]
    assert json.loads(Path("there/bench.json").read_text()) == found


def test_the_network_of_a_run_can_be_timed(call, trained):
    flags = (
        "--variants",
        "reference-fp32,shared-fp32",
        "--measures",
        "step",
        "--steps",
        1,
        "--batch_size",
        2,
    )
    found = json.loads(bench_command("--model", trained, *flags, "--device", "cpu", "--json").out)
    assert [(row["model"], row["image_size"]) for row in found["rows"]] == [(str(trained), 8)] * 2
    assert bench_command("--model", trained.parent, *flags).code == 2  # a folder that is no run


def test_the_scripts_are_sound():
    folder = Path(__file__).parent.parent / "benchmarks"
    for name in ("compare.sh", "publish.sh"):
        assert subprocess.run(["bash", "-n", folder / name]).returncode == 0
        outcome = subprocess.run([folder / name], capture_output=True, text=True)
        assert outcome.returncode == 2 and outcome.stderr.startswith("usage: ")


PROGRAM = """#!/usr/bin/env bash
# Stands in for the program, and for a Python that runs it: leaves a run of as many epochs as $EPOCHS has, or a record.
[ -z "${FAIL:-}" ] || exit 1
case " $* " in
    *" train "*) ;;
    *" bench "*)
        [[ $* != *"${WRONG:-nothing}"* ]] || { echo "sparsenet: bench: $WRONG: not captured" >&2; exit 2; }
        [[ $* != *"measures ${HANGS:-nothing}"* ]] || exec sleep 600
        printf '{\n  "call": "%s"\n}\n' "$*"
        exit
        ;;
    *" pytest "*) exit "${RED:-0}" ;;
    *) exit 0 ;;
esac
while [ $# -gt 0 ]; do
    case $1 in --out | --resume) run=$2 ;; --dataset_dir) data=$2 ;; esac
    shift
done
mkdir -p "$run/checkpoints"
printf '{"data": {"dataset_dir": "%s"}}\n' "$data" >"$run/config.json"
echo epoch >"$run/metrics.csv"
seq "$EPOCHS" >>"$run/metrics.csv"
for file in result.json requirements.txt train.log curves.png graph.svg; do touch "$run/$file"; done
for kind in last best; do
    touch "$run/checkpoints/$kind-1.json"
    head -c "${SIZE:-1}" /dev/urandom >"$run/checkpoints/$kind-1.safetensors"
done
[ -z "${STAYS:-}" ] || exec sleep 600
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script of benchmarks/ with a program in which nothing is trained."""
    (tmp_path / "bin").mkdir()
    for name in ("sparsenet", "python"):
        (tmp_path / "bin" / name).write_text(PROGRAM)
        (tmp_path / "bin" / name).chmod(0o755)
    folder = Path(__file__).parent.parent / "benchmarks"
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "QUICK": "1",
    }

    def run(name, *arguments, until=None, **more):
        """*until*: a file and what is in it when the script is told to end."""
        how = {
            "env": environment | more,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        with subprocess.Popen([folder / name, *arguments], cwd=tmp_path, **how) as process:
            while until and process.poll() is None:
                file, text = until
                if (tmp_path / file).exists() and text in (tmp_path / file).read_text():
                    process.terminate()
                    break
                time.sleep(0.05)
            out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def test_comparisons_are_made_once_wherever_they_go_and_published_without_paths(script, tmp_path):
    out, data, times = "my runs", "/o'neil/my data", []
    for _ in range(2):
        assert script("compare.sh", "topologies", out, data, EPOCHS="4").returncode == 0
        runs = sorted((tmp_path / out).iterdir())
        assert len(runs) == 18 and all((run / "result.json").exists() for run in runs)
        assert json.loads((runs[0] / "config.json").read_text())["data"]["dataset_dir"] == data
        times.append([(run / "result.json").stat().st_mtime_ns for run in runs])
    assert times[0] == times[1]
    assert script("publish.sh", *runs, "records").returncode == 0
    record = tmp_path / "records" / runs[0].name
    assert json.loads((record / "config.json").read_text())["data"]["dataset_dir"] == "my data"
    assert {file.name for file in record.iterdir()} == {
        "config.json", "result.json", "metrics.csv", "requirements.txt", "train.log", "curves.png", "graph.svg",
    }  # fmt: skip
    assert not (tmp_path / "records" / "densenet-22-8-seed1" / "curves.png").exists()
    assert (
        script("publish.sh", *runs[:2]).returncode == 1
    )  # the last is a run, not a folder of records
    (runs[0] / "result.json").unlink()
    assert script("publish.sh", runs[0], "records").returncode == 1


def test_a_comparison_that_lacks_a_result_says_so(script, tmp_path):
    outcome = script("compare.sh", "topologies", "runs", "data", SEEDS="7", FAIL="1")
    assert outcome.returncode == 1
    assert outcome.stderr.count("-seed7: no result") == 6


def members(folder, kind):
    """Names of the files in an archive of gpu.sh."""
    with tempfile.TemporaryFile() as whole:
        for part in sorted(folder.glob(f"{kind}.tar.gz.*")):
            assert part.stat().st_size <= 15 * 2**20
            whole.write(part.read_bytes())
        if not whole.tell():
            return []
        whole.seek(0)
        with tarfile.open(fileobj=whole, mode="r:gz") as archive:
            return [name.removeprefix(f"{kind}/") for name in archive.getnames()]


def records(folder):
    lines = (folder / "bench.jsonl").read_text().splitlines()
    return {record["record"]: record["call"] for record in map(json.loads, lines)}


def test_the_gpu_s_trainings_go_on_wherever_they_are_carried(script, tmp_path):
    large, two = str(8 * 2**20), {"PIECES": "fast-15-seed0|strong-seed0"}
    assert script("gpu.sh", "1", EPOCHS="1", SIZE=large, **two).returncode == 3  # of 3
    assert len(list((tmp_path / "1").glob("runs.tar.gz.*"))) == 2
    found = members(tmp_path / "1", "runs")
    assert "fast-15-seed0/checkpoints/last-1.json" in found and not any(
        "best" in name for name in found
    )
    second = script("gpu.sh", "2", "1", EPOCHS="2", **two)
    assert second.returncode == 3 and "--resume" in second.stdout
    assert script("gpu.sh", "2", EPOCHS="3", **two).returncode == 0
    assert members(tmp_path / "2", "runs") == []
    found = members(tmp_path / "2", "done")
    assert {f"{run}-seed0/checkpoints/best-1.safetensors" for run in ("fast-15", "strong")} < set(
        found
    )
    assert not any("last" in name for name in found)
    for path in (tmp_path / "2").glob("done.*"):  # fetched and put away
        path.unlink()
    again = script("gpu.sh", "3", "2", EPOCHS="0", **two)
    assert again.returncode == 0 and "sparsenet train" not in again.stdout


def test_a_variant_that_fails_on_the_gpu_takes_nothing_from_the_others(script, tmp_path):
    pieces = {"PIECES": "(step|epoch|compiled)-100-24"}
    outcome = script("gpu.sh", "out", WRONG="shared-fp32", **pieces)
    assert (
        outcome.returncode == 1
        and "FAILED: step-100-24 epoch-100-24 compiled-100-24" in outcome.stdout
    )
    found = records(tmp_path / "out")
    assert found.keys() == {
        "step-100-24",
        "compiled-100-24",
    }  # an epoch is measured of that variant alone
    assert all("reference-fp32-nhwc" in call and "shared" not in call for call in found.values())
    assert script("gpu.sh", "out", **pieces).returncode == 0
    assert all("shared" in call for call in records(tmp_path / "out").values())
    assert "sparsenet bench" not in script("gpu.sh", "out", **pieces).stdout


def test_wrong_kernels_are_told_and_the_rest_is_measured(script, tmp_path):
    outcome = script("gpu.sh", "out", PIECES=".*-100-24|correctness", RED="1")
    assert outcome.returncode == 1 and outcome.stdout.endswith("FAILED: correctness\n")
    assert list(records(tmp_path / "out"))[:2] == ["reference-100-24", "step-100-24"]


def test_the_gpu_script_killed_leaves_what_it_has(script, tmp_path):
    log = "out/gpu.log"
    assert script("gpu.sh", "out", HANGS="epoch", until=(log, "measures epoch")).returncode == 143
    assert records(tmp_path / "out").keys() == {"step-100-24"}
    program = PROGRAM.replace("exec sleep", f"echo x >{tmp_path / 'saved'}; exec sleep")
    (tmp_path / "bin" / "python").write_text(program)
    training = {"PIECES": "fast-15-seed0", "STAYS": "1", "EPOCHS": "1"}
    assert script("gpu.sh", "out", until=("saved", "x"), **training).returncode == 143
    assert "fast-15-seed0/checkpoints/last-1.safetensors" in members(tmp_path / "out", "runs")


def test_a_piece_that_hangs_on_the_gpu_is_ended(script):
    outcome = script("gpu.sh", "out", PIECES="epoch-100-24", HANGS="epoch", LIMIT="3")
    assert outcome.returncode == 3 and "yet to be made, by a call with " in outcome.stdout


def test_the_gpu_script_is_sound():
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    outcome = subprocess.run([script], capture_output=True, text=True)
    assert outcome.returncode == 2 and outcome.stderr.startswith("usage: ")


def test_the_command_prints_one_json_value(bench_command):
    tiny = ["--batch_size", "2", "--image_size", "8", "--steps", "1", "--device", "cpu"]
    said = bench_command("--json", "--model", "sparsenet_40_12", *tiny)
    found = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert {"model", "batch_size", "image_size", "precision", "environment", "rows"} <= found.keys()
    assert {"reference", "shared"} <= {row["implementation"] for row in found["rows"]}
    assert all(row["train_seconds"]["median"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "sparsenet_40_21"], "sparsenet_40_12.*'sparsenet_40_21'"),
        (["--model", "sparsenet_40_12", "--image_size", "3"], "image_size: expected at least 4"),
        (
            ["--model", "sparsenet_40_12", "--image_size", "-1"],
            "--image_size: expected a whole number of at least 0",
        ),
        (["--device", "gpu"], "--device.*cpu.*'gpu'"),
    ],
)
def test_a_bad_call_is_one_line(bench_command, flags, expected):
    said = bench_command(*flags, "--batch_size", "2", "--steps", "1")
    assert (
        (said.code, said.out) == (2, "")
        and said.err.count("\n") == 1
        and re.search(expected, said.err)
    ), said.err
