"""The C kernels for themselves: index arithmetic, every build, memory, other libraries."""

import itertools
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import test_ops
import torch
from torch.nn import functional as F

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops import compiler, native
from sparsenet.ops.blocks import IDLE, LEAST, Block
from sparsenet.ops.dispatch import aggregate
from sparsenet.ops.engine import StageCall
from sparsenet.ops.plan import EPS, Operands, Plan, Reader, Statistics

if reason := native.unavailable(torch.device("cpu")):
    pytest.skip(f"native: {reason}", allow_module_level=True)

# What a processor or an operating system may lack, and what is not chosen here. Of two flags that
# set the same the last one counts.
BUILDS = {
    "what is chosen here": "",
    "no wide vectors": "-march=x86-64",
    "tiles in C": "-DMATRIX=2",
    "tiles in C, no wide vectors": "-march=x86-64 -DMATRIX=2",
    "pairs": "-DMATRIX=0 -DPAIRS",
    "vectors of 64 bytes": "-DMATRIX=0 -DBYTES=64",
    "vectors of 32 bytes": "-DMATRIX=0 -DBYTES=32",
}


def few(generator, *shape, share):
    """Whole numbers: so many 1 and -1, the others 0."""
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (signs * (torch.rand(shape, generator=generator) < share)).double()


def whole_numbers(images, height, width, channels, kernels):
    """A stage of whole numbers, small enough for bf16, whose statistics are 0 and 1.

    The result is its plan, its input, its readers and a gradient of its output.
    """
    generator = torch.Generator().manual_seed(height * 1000 + width)
    reads = [tuple(range(r, -1, -1)) for r in range(len(kernels) + 1)]
    readers = []
    for read, out, kernel in zip(reads, [*channels[1:], 0], [*kernels, 0], strict=True):
        gathered = sum(channels[j] for j in read)
        scale = torch.randint(0, 2, (gathered,), generator=generator).double() * 2 - 1
        shift = few(generator, gathered, share=0.3)
        weight = (
            few(generator, out, gathered, kernel, kernel, share=4 / (gathered * kernel**2))
            if kernel
            else None
        )
        readers.append(Reader(scale, shift, weight))
    x = few(generator, images, channels[0], height, width, share=0.5)
    d = few(generator, images, sum(channels), height, width, share=0.2)
    return Plan(tuple(reads)), x, readers, d


def gradients_of(implementation, dtype, plan, x, readers, d):
    """Output and gradients, with statistics that do not change."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [
        [None if t is None else t.to(wide, copy=True).requires_grad_() for t in reader]
        for reader in readers
    ]
    widths = [x.shape[1], *(len(reader.weight) for reader in readers[:-1])]
    statistics = [
        Statistics(x.new_zeros(w, dtype=wide), x.new_full((w,), 1 - EPS, dtype=wide))
        for w in widths
    ]
    x = x.to(dtype, copy=True).requires_grad_()
    operands = Operands([Reader(*each) for each in parameters], statistics, training=False)
    out = aggregate(implementation, plan, x, operands)
    out.backward(d.to(dtype))
    return [out, x.grad, *(t.grad for each in parameters for t in each if t is not None)]


SIZES = [
    (1, 1),
    (2, 3),
    (3, 7),
    (5, 8),
    (7, 12),
    (9, 14),
    (4, 16),
    (3, 17),
    (2, 24),
    (20, 32),
    (3, 33),
    (2, 70),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height, width", SIZES)
def test_whole_numbers_come_out_exactly(height, width, dtype):
    """Every product, mask and sum of a stage is exact, so one value out of its place is seen."""
    for channels, kernels in (
        ((24, 24, 24), (3, 3)),
        ((5, 33, 12), (1, 3)),
        ((40, 17, 70), (5, 1)),
    ):
        stage = whole_numbers(2, height, width, channels, kernels)
        expected = gradients_of("reference", torch.float64, *stage)
        assert max(t.abs().max() for t in expected[:2]) <= 256, "more than bf16 can count to"
        for actual, truth in zip(gradients_of("native", dtype, *stage), expected, strict=True):
            assert torch.equal(actual.double(), truth.round())


def test_many_images_and_threads_give_whole_numbers():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        stage = whole_numbers(7, 9, 8, (24, 24, 24), (3, 3))
        expected = gradients_of("reference", torch.float64, *stage)
        for actual, truth in zip(
            gradients_of("native", torch.bfloat16, *stage), expected, strict=True
        ):
            assert torch.equal(actual.double(), truth.round())
    finally:
        torch.set_num_threads(before)


def cases(test):
    """Each combination of the parameters that a test has."""
    choices = []
    for mark in test.pytestmark:
        names, values = mark.args
        names = re.findall(r"\w+", names) if isinstance(names, str) else names
        values = values if len(names) > 1 else [(value,) for value in values]
        choices.append([dict(zip(names, each, strict=True)) for each in values])
    for chosen in itertools.product(*choices):
        yield {name: value for each in chosen for name, value in each.items()}


@pytest.fixture
def built(tmp_path):
    """Has the kernels compiled as an environment asks for, until the test ends."""
    with pytest.MonkeyPatch.context() as environment:

        def build(**variables):
            environment.setenv("XDG_CACHE_HOME", str(tmp_path))
            for name, value in variables.items():
                environment.setenv(name, value)
            compiler._library.cache_clear()
            assert tmp_path in Path(compiler.library()._name).parents

        yield build
    compiler._library.cache_clear()


def check_laws():
    for height, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            test_whole_numbers_come_out_exactly(height, width, dtype)
    test_many_images_and_threads_give_whole_numbers()
    for law in (
        test_ops.test_engines_equal_the_reference,
        test_ops.test_shapes_and_layouts,
        test_ops.test_half_precision_errs_no_more_than_the_textbook,
    ):
        for case in cases(law):
            law("native", **case)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flags are x86's")
@pytest.mark.parametrize("build", BUILDS)
def test_the_laws_hold_for_every_build(build, built):
    built(CFLAGS=f"{BUILDS[build]} -DPOISON")
    check_laws()


@pytest.mark.skipif(not shutil.which("clang"), reason="needs Clang")
def test_clang_compiles_them(built):
    built(CC="clang", CFLAGS="-DPOISON")
    check_laws()


def test_other_users_of_the_matrix_unit_are_not_disturbed():
    """PyTorch's libraries keep settings of the unit between calls: the order has no effect."""
    torch.manual_seed(0)
    image, filters = torch.randn(2, 32, 16, 16).bfloat16(), torch.randn(64, 32, 3, 3).bfloat16()
    left, right = torch.randn(96, 64).bfloat16(), torch.randn(64, 80).bfloat16()
    query = torch.randn(1, 2, 128, 64).bfloat16()
    stage = whole_numbers(1, 8, 16, (24, 24, 24), (3, 3))
    calls = [
        lambda: torch.conv2d(image, filters),
        lambda: gradients_of("native", torch.bfloat16, *stage)[1],
        lambda: left @ right,
        lambda: gradients_of("native", torch.bfloat16, *stage)[-1],
        lambda: F.scaled_dot_product_attention(query, query, query),
    ]
    first = [call() for call in calls]
    for call, expected in list(zip(calls, first, strict=True)) * 3:
        assert torch.equal(call(), expected)


def engine_for(x):
    """An engine for a stage that is nothing but its output norm."""
    width = x.shape[1]
    plan = Plan(((0,),))
    tensor = x.shape, (width,), x.dtype, x.device, torch.channels_last
    call = StageCall(plan, plan, *tensor, training=True)
    return native.Native(call, [torch.ones(width), torch.zeros(width)])


def test_memory_that_cannot_be_had_is_an_error():
    x = torch.randn(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    engine = engine_for(x)
    tensors = {"x": x, "moments": engine.moments}
    with pytest.raises(MemoryError, match="no memory for what 'measure' works with"):
        engine.run("measure", tensors, out_channels=1 << 44)
    engine.run("measure", tensors, out_channels=4)
    assert torch.allclose(engine.moments[0], x.double().mean((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    "said, message", [("no memory for it", "sparsenet: no memory for it"), ("", "out of memory")]
)
def test_the_program_says_so_in_one_line(call, monkeypatch, said, message):
    def full(args):
        raise MemoryError(*filter(None, [said]))

    monkeypatch.setattr("sparsenet.commands.models.run", full)
    outcome = call("models")
    assert outcome.code == 1 and message in outcome.error


def test_a_compiler_that_hangs_is_stopped(tmp_path, monkeypatch):
    """What it has started, too, which would hold what it writes to open."""
    hanging = tmp_path / "cc"
    hanging.write_text("#!/bin/sh\nsleep 600 &\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(compiler, "TIME_LIMIT", 0.2)
    with pytest.raises(RuntimeError, match=r"nothing after 0\.2 s"):
        compiler.compile_library([str(hanging)], [], tmp_path / "native.so")
    assert not list(tmp_path.glob("*.so"))


def test_a_compiler_that_is_interrupted_is_stopped(tmp_path, monkeypatch):
    started = tmp_path / "started"
    sleeping = tmp_path / "cc"
    sleeping.write_text(f"#!/bin/sh\necho $$ > {started}\nsleep 600\n")
    sleeping.chmod(0o755)

    def interrupted(*_, **__):
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiler.run_compiler([str(sleeping)])
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_default_device_is_not_where_memory_is_taken():
    stage = whole_numbers(1, 64, 64, (24, 24, 24), (3, 3))
    with torch.device("meta"):
        actual = gradients_of("native", torch.bfloat16, *stage)
    assert actual[0].device.type == "cpu"


def test_statistics_far_from_zero():
    """A variance is taken from distances that are small, not as a difference of large squares."""
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 16, 16) + 1e4).contiguous(memory_format=torch.channels_last)
    engine = engine_for(x)
    engine.run("measure", {"x": x, "moments": engine.moments}, out_channels=3)
    exact = x.double()
    assert torch.allclose(engine.moments[0], exact.mean((0, 2, 3)), rtol=1e-7)
    assert torch.allclose(engine.moments[1], exact.var((0, 2, 3), correction=0), rtol=1e-4)


def test_a_block_is_handed_out_again_once_nobody_holds_it():
    block = Block()
    first = block.take(LEAST, torch.bfloat16)
    place, view = first.data_ptr(), first[:10].view(2, 5)
    del first
    second = block.take(LEAST, torch.bfloat16)
    assert second.data_ptr() != place  # the view holds the first
    del view
    assert block.take(LEAST // 2, torch.float32).data_ptr() == place


def test_one_block_is_kept_and_none_that_is_too_large():
    block = Block()
    large, small = block.take(4 * LEAST, torch.uint8), block.take(2 * LEAST, torch.uint8)
    del small
    assert block.memory is None
    del large
    assert len(block.memory) == 4 * LEAST
    for _ in range(IDLE + 1):
        held = block.take(2 * LEAST, torch.uint8)
        del held
    assert len(block.memory) == 2 * LEAST
    block.take(8 * LEAST, torch.uint8)
    assert len(block.memory) == 8 * LEAST


def test_lean_memory_keeps_no_block(monkeypatch):
    """Neither of a step nor of an evaluation."""
    blocks = {"features": Block(), "gradients": Block()}
    monkeypatch.setattr(native, "BLOCKS", blocks)
    model = SparseNet(Architecture(depth=10, growth_rate=12), "native", memory="lean")
    images = torch.randn(32, 3, 32, 32)
    model.train()(images).sum().backward()
    with torch.no_grad():
        model.eval()(images)
    assert all(block.memory is None for block in blocks.values())
    normal = SparseNet(model.architecture, "native").train()
    normal(images).sum().backward()
    assert all(block.memory is not None for block in blocks.values())


def test_a_kept_graph_keeps_its_block():
    """Between two backwards over one graph, another network trains in blocks of the same size."""
    torch.manual_seed(0)
    models = [SparseNet(Architecture(depth=10, growth_rate=12), "native").train() for _ in range(2)]
    images = torch.randn(32, 3, 32, 32)
    loss = models[0](images).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in models[0].parameters()]
    for _ in range(2):
        models[1](images).square().sum().backward()
    models[0].zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(models[0].parameters(), first, strict=True))
