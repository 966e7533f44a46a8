"""The benchmark can be believed: what is wrong is not timed, figures are what they say."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import Outcome, record_on_cpu
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench import __main__, depth, equality, measure, plots, tables
from benchmarks.bench.comparison import BenchConfig, bench
from benchmarks.bench.epoch import can_train, measure_epochs, write_images
from benchmarks.bench.equality import check
from benchmarks.bench.record import Epoch, Point, Record, Row, Spread, Sweep
from benchmarks.bench.variants import Variant, default_variants
from benchmarks.bench.workload import Case, Workload
from sparsenet import zoo
from sparsenet.architecture import Architecture
from sparsenet.data.config import DataConfig
from sparsenet.data.load import load_dataset
from sparsenet.environment import environment
from sparsenet.ops import dispatch
from sparsenet.ops.implementations import IMPLEMENTATIONS
from sparsenet.ops.plan import EPS, Plan

CPU = torch.device("cpu")
LARGER = Case(Architecture(depth=10, growth_rate=12), 32, 16, CPU)
TINY = Architecture(depth=10, growth_rate=4)  # two layers a stage
CASE = Case(TINY, batch_size=4, image_size=8, device=CPU)
REFERENCE, SHARED = Variant("reference", "fp32"), Variant("shared", "fp32")
SHARED_BF16 = Variant("shared", "bf16")
CAPTURED = Variant("shared", "fp32", ("captured",))
FLAGS = ("--model", "sparsenet_40_12", "--batch_size", 2, "--image_size", 8, "--device", "cpu")
SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def tiny_config(**changes):
    settings = {"model": ("sparsenet_40_12",), "batch_size": 2, "image_size": 8, "steps": 2}
    return BenchConfig(**settings | {"device": "cpu"} | changes)


def checked(*variants, case=CASE):
    return check({variant: Workload(variant, case) for variant in variants})


@pytest.fixture
def bench_command(capfd, tmp_path, monkeypatch):
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        code = __main__.main([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    return run


# --- variants ------------------------------------------------------------------------------------


@given(
    st.sampled_from(list(IMPLEMENTATIONS)),
    st.sampled_from(["fp32", "bf16"]),
    st.permutations(["nhwc", "captured", "compiled"]),
    st.integers(0, 3),
)
def test_a_name_is_its_variant_in_any_order_of_options(implementation, precision, options, count):
    variant = Variant.parse("-".join((implementation, precision, *options[:count])))
    assert Variant.parse(str(variant)) == variant
    assert (variant.implementation, variant.precision) == (implementation, precision)
    assert set(variant.options) == set(options[:count])


def test_by_default_every_implementation_is_compared_with_the_reference_first():
    variants = list(default_variants(("fp32", "bf16"), CPU))
    assert variants[0] == REFERENCE
    assert {variant.implementation for variant in variants} == set(IMPLEMENTATIONS)


def test_what_cannot_run_is_told_and_only_refused_where_it_was_asked_for(monkeypatch):
    missing = lambda name, device: None if name == "reference" else "of the moon"  # noqa: E731
    monkeypatch.setattr(dispatch, "unavailable", missing)
    with pytest.raises(ValueError, match=r"--variants: shared-fp32 cannot run here: of the moon"):
        bench(tiny_config(variants=(REFERENCE, SHARED)))
    record = bench(tiny_config(measures=("none",)))
    others = [f"{name}-fp32" for name in IMPLEMENTATIONS if name != "reference"]
    assert record.absent == dict.fromkeys(others, "of the moon")
    assert f"Not run: {', '.join(others)}: of the moon." in tables.report(record)


# --- correctness ---------------------------------------------------------------------------------


def test_equal_networks_pass_say_how_equal_they_are_and_stay_as_they_were():
    works = {variant: Workload(variant, LARGER) for variant in (REFERENCE, SHARED, SHARED_BF16)}
    work = works[SHARED]
    before = {name: tensor.clone() for name, tensor in work.model.state_dict().items()}
    images, labels = work.images.clone(), work.labels.clone()
    for errors in check(works).values():
        assert {"logits", "inference logits"} < errors.keys() and len(errors) == 3
        assert all(0 <= each.error <= each.allowed for each in errors.values())
    for name, tensor in work.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(work.images, images) and torch.equal(work.labels, labels)


@pytest.mark.parametrize(
    "network",
    [
        Architecture(depth=7, growth_rate=4),
        Architecture(depth=10, growth_rate=12, bottleneck=True),
        Architecture(depth=10, growth_rate=16, aggregation="sum"),
        Architecture(depth=40, growth_rate=24),
    ],
    ids=["plain", "bottleneck", "sum", "deep"],
)
def test_no_luck_refuses_what_is_right_however_small(network):
    """Of two images of 8 pixels a side, a few flipped ReLUs are all of a gradient's error."""
    checked(SHARED, SHARED_BF16, case=Case(network, 2, 8, CPU))


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_an_error_by_chance_varies_as_much_as_is_derived(share):
    """A gradient at a ReLU is like a product of two normal numbers, and some of them change."""
    relus, random = 4096, torch.Generator().manual_seed(0)
    squares = torch.randn(2, 1000, relus, generator=random).prod(0).square()
    flipped = torch.rand(squares.shape, generator=random) < share
    errors = ((squares * flipped).sum(1) / squares.sum(1)).sqrt()
    derived = equality.SPREAD / relus**0.5
    assert errors.std() <= derived <= 1.3 * errors.std()  # 1.2 for 0.2: 1 / (1 - share)**.5


def _without_a_gradient(plan, x, operands):
    readers = [r._replace(scale=r.scale.detach().requires_grad_()) for r in operands.readers]
    return dispatch.reference.aggregate(plan, x, operands._replace(readers=readers))


def _without_shifts(plan, x, operands):
    readers = [reader._replace(shift=0 * reader.shift) for reader in operands.readers]
    return dispatch.reference.aggregate(plan, x, operands._replace(readers=readers))


def _with_another_order(plan, x, operands):
    plan = Plan(tuple(read[::-1] for read in plan.reads))
    return dispatch.reference.aggregate(plan, x, operands)


def _always_as_in_training(plan, x, operands):
    return dispatch.reference.aggregate(plan, x, operands._replace(training=True))


def refusals(*variants):
    """Checks all variants and returns what is said of those that are wrong."""
    messages = {}

    def note(variant, errors, raise_if_wrong=equality._raise_if_wrong):
        try:
            raise_if_wrong(variant, errors)
        except ValueError as error:
            messages[variant] = str(error)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(equality, "_raise_if_wrong", note)
        checked(*variants, case=LARGER)
    return messages


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (_without_a_gradient, "gradients of stages"),
        (_without_shifts, "inference logits"),
        (_with_another_order, "inference logits"),
        (_always_as_in_training, "inference logits"),
    ],
)
def test_what_computes_something_else_is_refused_in_either_precision(monkeypatch, wrong, what):
    monkeypatch.setattr(dispatch.shared, "aggregate", wrong)
    messages = refusals(SHARED, SHARED_BF16)
    for variant in (SHARED, SHARED_BF16):
        expected = f"the {what}.* of {variant} differ from reference-fp32's by .*nothing was timed"
        assert re.match(expected, messages[variant])


def test_what_is_refused_is_not_timed(monkeypatch, tiny_zoo):
    monkeypatch.setattr(dispatch.shared, "aggregate", _without_shifts)
    monkeypatch.setattr(measure, "time_in_turns", lambda *_: pytest.fail("was timed"))
    with pytest.raises(ValueError, match="the inference logits of shared-fp32 differ"):
        bench(tiny_config(variants=(REFERENCE, SHARED), batch_size=64))


@pytest.fixture
def tiny_zoo(monkeypatch):
    """Makes every name that of the same small network."""
    monkeypatch.setattr(zoo, "architecture", lambda name: TINY)


def _times(factor, tensor):
    """The tensor, whose gradient comes out so many times as large."""
    return tensor.detach() + factor * (tensor - tensor.detach())


def _with_gradients(**factors):
    """Of the first stage's parameters; the others' are right."""

    def aggregate(plan, x, operands):
        if x.shape[-1] == 16:
            changed = [
                {
                    k: _times(f, getattr(r, k))
                    for k, f in factors.items()
                    if getattr(r, k) is not None
                }
                for r in operands.readers
            ]
            readers = [
                reader._replace(**each)
                for reader, each in zip(operands.readers, changed, strict=True)
            ]
            operands = operands._replace(readers=readers)
        return dispatch.reference.aggregate(plan, x, operands)

    return aggregate


def _as_if_statistics_had_no_gradient(plan, x, operands):
    right = dispatch.reference._batch_norm

    def wrong(plan, r, joined, reader, statistics, training, group):
        normed = right(plan, r, joined.detach(), reader, statistics, training, group)
        slope = reader.scale / (joined.detach().float().var((0, 2, 3), correction=0) + EPS).sqrt()
        return normed + (slope.view(-1, 1, 1) * (joined - joined.detach())).to(normed.dtype)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(dispatch.reference, "_batch_norm", wrong)
        return dispatch.reference.aggregate(plan, x, operands)


WRONG = {
    "weights": _with_gradients(weight=0.9),
    "scales": _with_gradients(scale=0.9),
    "shifts": _with_gradients(shift=0.9),
    "larger": _with_gradients(weight=1.1),
    "sign": _with_gradients(weight=-1.0),
    "sign of shifts": _with_gradients(shift=-1.0),
    "statistics": _as_if_statistics_had_no_gradient,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_gradient_that_is_wrong_by_a_tenth_is_found_in_either_precision(monkeypatch, wrong):
    """Though flipped ReLUs make an error of more than a tenth in bf16."""
    monkeypatch.setattr(dispatch.shared, "aggregate", WRONG[wrong])
    messages = refusals(SHARED, SHARED_BF16)
    for variant in (SHARED, SHARED_BF16):
        expected = f"the (lengths of the )?gradients of st.* of {variant} differ"
        assert re.match(expected, messages[variant])


def test_where_wrong_gradients_are_found_right_ones_are_not_refused():
    assert refusals(SHARED, SHARED_BF16) == {}


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


def test_what_is_captured_is_checked_and_timed_as_replayed(monkeypatch, tiny_zoo):
    recorder = Again()
    record_on_cpu(monkeypatch, lambda device: recorder)
    monkeypatch.setattr(equality, "ENOUGH_RELUS", 1)  # one batch
    config = tiny_config(variants=(REFERENCE, CAPTURED), measures=("step", "infer"))
    record = bench(config)
    assert record.rows[1].errors["logits"].error > 0
    assert recorder.replays == 2 * (1 + measure.WARM_UP_ROUNDS + config.steps)
    shared = [v for v in default_variants(("fp32",), CPU) if v.implementation == "shared"]
    assert shared == [CAPTURED, SHARED]


def test_what_cannot_be_captured_is_not_timed_as_if_it_were(monkeypatch):
    record_on_cpu(monkeypatch, lambda device: Again(fail=True))
    message = "shared-fp32-captured: the inference pass is not captured: this device is"
    with pytest.raises(ValueError, match=message):
        checked(CAPTURED)
    message = "an epoch of shared-fp32-captured: the training step is not captured: this"
    with pytest.raises(ValueError, match=message):
        measure_epochs([CAPTURED], CASE, images=20)


def test_what_does_not_compile_is_told_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("BackendCompilerFailed: no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: fails)
    message = r"^reference-fp32-compiled does not compile: Back.*: no compiler$"
    with pytest.raises(ValueError, match=message):
        checked(Variant("reference", "fp32", ("compiled",)))


# --- the clock -----------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4))
def test_turns_are_taken(rounds, count):
    calls = []
    acts = {name: lambda name=name: calls.append(name) for name in range(count)}
    seconds = measure.time_in_turns(acts, rounds, CPU)
    assert calls == list(range(count)) * (measure.WARM_UP_ROUNDS + rounds)
    assert list(seconds) == list(acts)
    assert all(each.min <= each.median <= each.max for each in seconds.values())


def _end(way):
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "ended":
        os._exit(3)
    raise {"full": RuntimeError(f"… {measure.OUT_OF_MEMORY}: …"), "wrong": KeyError("x")}[way]


@pytest.mark.parametrize(
    ("way", "kind", "message"),
    [
        ("killed", torch.OutOfMemoryError, "_end of killed: out of memory"),
        ("full", torch.OutOfMemoryError, "out of memory"),
        ("wrong", ValueError, "_end of wrong failed with exit code 1: KeyError: 'x'"),
        ("ended", ValueError, "exit code 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_fails_says_why(monkeypatch, way, kind, message):
    quick = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: quick)
    with pytest.raises(kind, match=message):
        measure.run_alone(_end, way)


def test_a_process_of_its_own_measures_from_its_start():
    seconds = measure.run_alone(measure.seconds_to_first_step, REFERENCE, CASE, 0.0, {})
    assert seconds > 1e9  # Unix time


# --- memory --------------------------------------------------------------------------------------


def test_what_memory_consists_of_is_all_of_it():
    parts = {}
    for variant in (SHARED, REFERENCE):
        work = Workload(variant, Case(TINY, 64, 16, CPU))
        work.set_training(True)
        work.step()
        parts[variant] = measure.parts_of_memory(work, 100.0)
        weights = sum(p.nbytes for p in work.model.parameters()) / 1e6
        for name in ("parameters", "gradients", "optimizer state"):
            assert parts[variant][name] == pytest.approx(weights, abs=0.05)
        above_base = [mb for name, mb in parts[variant].items() if name not in measure.IN_BASE]
        assert sum(above_base) == pytest.approx(100.0, abs=0.5)
    saved = [parts[variant]["saved for backward"] for variant in (REFERENCE, SHARED)]
    assert saved[0] > saved[1] > 0


# --- a whole epoch -------------------------------------------------------------------------------


def test_random_images_are_read_as_any_others(tmp_path):
    write_images(tmp_path, 23, 5)
    data = load_dataset(DataConfig(dataset="c10", dataset_dir=str(tmp_path)))
    assert (len(data.train), len(data.test), len(data.classes)) == (23, 5, 10)
    assert data.train.pixels.float().std() > 70  # of 0 to 255, all equally likely: 73.9


def test_an_epoch_of_fewer_images_is_an_estimate():
    epochs = measure_epochs([REFERENCE, SHARED], Case(TINY, 8, 8, CPU), images=20)
    assert list(epochs) == [REFERENCE, SHARED]
    for epoch in epochs.values():
        assert (epoch.batch_size, epoch.images, epoch.estimated_from_steps) == (8, 20, 3)
        assert epoch.train_seconds.median > 0 and epoch.test_seconds.median > 0
    assert can_train(CAPTURED)
    assert not can_train(Variant("reference", "fp32", ("compiled",)))
    assert not can_train(Variant("torchvision", "fp32"))


# --- depth ---------------------------------------------------------------------------------------


def test_a_depth_is_the_nearest_there_is():
    depths = [depth.network_of_depth("dense", d).depth for d in (7, 40, 250, 500, 1000)]
    assert depths == [7, 40, 250, 499, 1000]


@pytest.mark.parametrize(
    ("seconds", "free", "reason"),
    [(1.0, 1e9, "out of memory"), (400.0, 1e9, "about [0-9]+ s"), (1.0, 1.0, "MB.* are free")],
)
def test_what_does_not_fit_is_left_out_and_so_is_what_is_deeper(monkeypatch, seconds, free, reason):
    def run_alone(function, variant, case, *arguments):
        if case.network.depth > 20:
            raise torch.OutOfMemoryError("far too much")
        return measure.TrainingCost(10.0, None, Spread(seconds, seconds, seconds))

    monkeypatch.setattr(depth, "run_alone", run_alone)
    monkeypatch.setattr(depth, "available_mb", lambda: free)
    points = depth.sweep([SHARED], [40, 10, 100], CASE, 1).points
    for fetch in depth.FETCHES:
        shallow, left_out = [point for point in points if point.fetch == fetch]
        assert (shallow.depth, shallow.left_out) == (10, None)
        assert (shallow.seconds_per_layer, shallow.mb_per_layer) == (seconds / 6, 10 / 6)
        assert left_out.depth == 40 and re.search(reason, left_out.left_out)


# --- what comes out ------------------------------------------------------------------------------


def _row(variant, seconds, megabytes):
    implementation, precision = variant.split("-")
    spread = Spread(seconds, 0.9 * seconds, 1.1 * seconds)
    row = Row("sparsenet_100_24", 32, 64, variant, implementation, precision, ())
    row.train_seconds = row.infer_seconds = spread
    row.peak_memory_mb = megabytes
    row.epoch = Epoch(64, 320, spread, spread, estimated_from_steps=5)
    return row


@pytest.fixture
def record():
    points = [
        Point("shared-fp32", "sparse", d, d, Spread(1, 1, 1), 9.0, 0.001 * math.log2(d), 2.0)
        for d in (40, 100, 1000)
    ]
    points.append(Point("shared-fp32", "dense", 1000, 996, left_out="about 9 s"))
    return Record(
        model=("sparsenet_100_24",),
        batch_size=64,
        image_size=0,
        precision=("fp32", "bf16"),
        steps=5,
        environment=dataclasses.replace(
            environment(torch.device("cpu")), device_name="a machine", threads=2, torch="2"
        ),
        absent={},
        rows=[
            _row("reference-fp32", 8.0, 3000.0),
            _row("reference-bf16", 4.0, 1500.0),
            _row("shared-bf16", 2.0, 750.0),
        ],
        depth=Sweep(64, 12, points),
    )


def test_ratios_are_to_the_first_row_and_to_the_reference_in_the_same_precision(record):
    lines = [line for line in tables.report(record) if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = {each[0]: each[1:] for each in cells[1:4]}
    assert cells[0][:4] == ["batch 64", "training step, s", "ratio", "same precision"]
    assert rows["reference-bf16"][:3] == ["4.00 (3.60–4.40)", "0.50", "1.00"]
    assert rows["shared-bf16"][:3] == ["2.00 (1.80–2.20)", "0.25", "0.50"]
    assert rows["shared-bf16"][6:] == ["750", "0.25", "0.50"]


def test_published_figures_are_named_as_such_and_estimates_as_estimates(record):
    lines = tables.report(record)
    published = [line for line in lines if "61–70" in line]
    assert len(published) == 1 and "*published:*" in published[0]
    assert sum("estimated from 5 steps" in line for line in lines) == 3
    for row in record.rows:
        row.model = "sparsenet_40_12"
    assert not any("published" in line for line in tables.report(record))


def test_figures_have_three_digits():
    numbers = (0, 0.00012345, 0.98765, 1.2345, 98.765, 1234.5)
    texts = ["0", "0.000123", "0.988", "1.23", "98.8", "1,234"]
    assert [tables._format(number) for number in numbers] == texts


def test_everything_is_written(record, tmp_path):
    folder = tmp_path / "out" / "of" / "it"
    plots.write_record(record, folder)
    picture = "sparsenet_100_24.png"
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md", picture}
    assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert msgspec.json.decode((folder / "bench.json").read_bytes(), type=Record) == record
    page = (folder / "bench.md").read_text()
    assert f"]({picture})" in page and "left out: about 9 s" in page
    line = msgspec.json.encode(msgspec.structs.replace(record, record="all"))
    (tmp_path / "bench.jsonl").write_bytes(line + b"\n")
    plots.main(tmp_path / "bench.jsonl", tmp_path)
    assert (tmp_path / "gpu-all" / "bench.md").read_text() == page


def test_the_records_that_are_kept_can_be_read_and_say_what_they_said():
    for file in SCRIPTS.parent.glob("results/**/bench.json"):
        record = msgspec.json.decode(file.read_bytes(), type=Record)
        page = file.with_name("bench.md").read_text().splitlines()
        lines = [line for line in page if not line.startswith(("- ", "!["))]  # fits and pictures
        assert list(filter(None, lines)) == list(filter(None, tables.report(record)))


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--variants", "refrence-fp32"), ("'refrence'", "did you mean reference?")),
        (("--variants", "shared"), ("a precision of fp32, bf16",)),
        (("--variants", "shared-fp32-fast"), ("'fast'", "compiled")),
        (("--variants", "shared-fp32-captured"), ("only CUDA devices record", "cpu")),
        (("--variants", "torchvision-fp64"), ("'fp64'",)),
        (("--variants", "native-fp32-compiled"), ("cannot look into",)),
        (("--variants", ","), ("--variants", "at least one", "none")),
        (("--measures", "step,speed"), ("step,infer,memory,parts,first,epoch", "'speed'")),
        (("--precision", "fp16"), ("fp32,bf16", "'fp16'")),
        (("--steps", "0"), ("--steps", "at least 1", "0")),
        (("--steps", "many"), ("--steps", "a whole number", "'many'")),
        (("--batch-size", "-4"), ("--batch_size", "at least 1", "-4")),
        (("--image_size", "3"), ("image_size: expected at least 4",)),
        (("--image_size", "-1"), ("--image_size", "a whole number of at least 0")),
        (("--depths", "40,x"), ("--depths", "'x'")),
        (("--depths", "4"), ("--depths", "at least 7", "4")),
        (("--model", ""), ("--model", "none")),
        (("--model", "sparsnet"), ("sparsenet", "'sparsnet'")),
        (("--device", "gpu"), ("--device", "cpu", "'gpu'")),
        (("--sped", "1"), ("--sped",)),
    ],
)
def test_a_bad_call_gets_one_line(bench_command, flags, expected):
    outcome = bench_command("--device", "cpu", *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error.startswith("sparsenet bench: ")
    assert all(part in outcome.error for part in expected), outcome.error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), OSError("full")])
def test_a_failure_gets_one_line_and_another_code(bench_command, monkeypatch, error):
    def fails(config):
        raise error

    monkeypatch.setattr(__main__, "bench", fails)
    outcome = bench_command()
    assert outcome.code == 1 and outcome.error.endswith(("full", "out of memory"))


def test_lists_may_have_commas_or_be_given_again(bench_command, tiny_zoo):
    names = ("--model", "densenet_40_12", "--variants", "reference-fp32,shared-bf16")
    measures = ("--steps", 1, "--measures", "step,infer", "--batch_size", 64)
    outcome = bench_command(*FLAGS, *names, *measures, "--out", "there", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    value = json.loads(outcome.out)
    assert [(row["model"], row["implementation"]) for row in value["rows"]] == [
        (model, implementation)
        for model in ("sparsenet_40_12", "densenet_40_12")
        for implementation in ("reference", "shared")
    ]
    assert json.loads(Path("there/bench.json").read_text()) == value
    assert {"torch", "device_name", "commit", "threads"} <= value["environment"].keys()
    for row in value["rows"]:
        assert row["options"] == [] and row["train_seconds"]["median"] > 0
    record = msgspec.json.decode(outcome.out, type=Record)
    assert Path("there/bench.md").read_text().startswith("\n".join(tables.report(record)))


def test_the_network_of_a_run_can_be_timed(bench_command, trained):
    flags = ("--measures", "step", "--steps", 1, "--batch_size", 2, "--device", "cpu")
    outcome = bench_command("--model", trained, "--variants", "reference-fp32", *flags, "--json")
    [row] = json.loads(outcome.out)["rows"]
    assert (row["model"], row["image_size"]) == (str(trained), 8)
    assert bench_command("--model", trained.parent, *flags).code == 2  # a folder that is no run


# --- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compare.sh", "publish.sh", "gpu.sh"])
def test_the_scripts_are_sound(name):
    assert subprocess.run(["bash", "-n", SCRIPTS / name]).returncode == 0
    outcome = subprocess.run([SCRIPTS / name], capture_output=True, text=True)
    assert outcome.returncode == 2 and outcome.stderr.startswith("usage: ")


PROGRAM = """#!/usr/bin/env bash
# Stands in for the program and a Python that runs it: leaves a record, or a run of $EPOCHS epochs.
[ -z "${FAIL:-}" ] || exit 1
case " $* " in
    *" train "*) ;;
    *" benchmarks.bench "*)
        [[ $* != *"${WRONG:-nothing}"* ]] || { echo "sparsenet bench: $WRONG: not so" >&2; exit 2; }
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
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "QUICK": "1",
    }

    def run(name, *arguments, until=None, **more):
        """*until*: a file and what is in it when the script is told to end."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command, variables = [SCRIPTS / name, *arguments], environment | more
        with subprocess.Popen(command, cwd=tmp_path, env=variables, **pipes) as process:
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
    files = "config.json curves.png graph.svg metrics.csv requirements.txt result.json train.log"
    assert sorted(file.name for file in record.iterdir()) == files.split()
    assert not (tmp_path / "records" / "densenet-22-8-seed1" / "curves.png").exists()
    # A run is no folder of records.
    assert script("publish.sh", *runs[:2]).returncode == 1
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
    unfinished = members(tmp_path / "1", "runs")
    assert "fast-15-seed0/checkpoints/last-1.json" in unfinished
    assert not any("best" in name for name in unfinished)
    second = script("gpu.sh", "2", "1", EPOCHS="2", **two)
    assert second.returncode == 3 and "--resume" in second.stdout
    assert script("gpu.sh", "2", EPOCHS="3", **two).returncode == 0
    assert members(tmp_path / "2", "runs") == []
    finished = members(tmp_path / "2", "done")
    for run in ("fast-15", "strong"):
        assert f"{run}-seed0/checkpoints/best-1.safetensors" in finished
    assert not any("last" in name for name in finished)
    for path in (tmp_path / "2").glob("done.*"):  # fetched and put away
        path.unlink()
    again = script("gpu.sh", "3", "2", EPOCHS="0", **two)
    assert again.returncode == 0 and "sparsenet train" not in again.stdout


def test_a_variant_that_fails_on_the_gpu_takes_nothing_from_the_others(script, tmp_path):
    pieces = {"PIECES": "(step|epoch|compiled)-100-24"}
    outcome = script("gpu.sh", "out", WRONG="shared-fp32", **pieces)
    assert outcome.returncode == 1
    assert "FAILED: step-100-24 epoch-100-24 compiled-100-24" in outcome.stdout
    calls = records(tmp_path / "out")
    # An epoch is measured of that variant alone.
    assert calls.keys() == {"step-100-24", "compiled-100-24"}
    assert all("reference-fp32-nhwc" in call and "shared" not in call for call in calls.values())
    assert script("gpu.sh", "out", **pieces).returncode == 0
    assert all("shared" in call for call in records(tmp_path / "out").values())
    assert "benchmarks.bench --variants" not in script("gpu.sh", "out", **pieces).stdout


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
    outcome = script("gpu.sh", "out", PIECES="epoch-100-24", HANGS="epoch", LIMIT="2")
    assert outcome.returncode == 3 and "yet to be made, by a call with " in outcome.stdout


def test_a_gpu_machine_without_the_packages_is_told_so_at_once(script, tmp_path):
    program = PROGRAM.replace("case", '[[ $* != *"import msgspec"* ]] || exit 1\ncase', 1)
    (tmp_path / "bin" / "python").write_text(program)
    outcome = script("gpu.sh", "out")
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1
    assert "msgspec" in outcome.stderr and "benchmarks/README.md" in outcome.stderr
