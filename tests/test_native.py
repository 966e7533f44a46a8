"""The C kernels beyond what test_ops.py holds: other machines, threads, no compiler."""

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops import compiler, native

if reason := native.unavailable(torch.device("cpu")):
    pytest.skip(f"native: {reason}", allow_module_level=True)


def run(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def gradients(threads, size, dtype=torch.float64):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = SparseNet(Architecture(depth=10, growth_rate=12), "native").to(dtype).train()
        model(torch.randn(3, 3, size, size, dtype=dtype)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [4, 40])
def test_threads_change_the_order_of_sums_only(size):
    one, two = gradients(1, size), gradients(2, size)
    assert (one - two).norm() <= 1e-12 * one.norm()


def test_fewer_threads_than_asked_for(tmp_path):
    """OpenMP may give a team that is smaller than what it says is the most."""
    code = """
import torch
from sparsenet import Architecture, SparseNet
torch.set_num_threads(4)
torch.manual_seed(0)
model = SparseNet(Architecture(depth=10, growth_rate=12), "native").double().train()
model(torch.randn(3, 3, 8, 8).double()).sum().backward()
print(repr(sum(p.grad.abs().sum().item() for p in model.parameters())))
"""
    few, many = float(run(code, OMP_THREAD_LIMIT="2")), float(run(code))
    assert abs(few - many) <= 1e-10 * many


@pytest.mark.parametrize("way", ["compile", "export", "trace"])
def test_tracers_are_shown_the_reference(way):
    model, images = (
        SparseNet(Architecture(depth=7, growth_rate=3), "native").eval(),
        torch.randn(2, 3, 8, 8),
    )
    ways = {
        "compile": lambda: torch.compile(model, backend="eager"),
        "export": lambda: torch.export.export(model, (images,)).module(),
        "trace": lambda: torch.jit.trace(model, (images,)),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(images)
        assert torch.allclose(ways[way]()(images), expected, atol=1e-5)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("implementation", ["native", "shared"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_the_first_stage_reads_lies_as_features_do(channels, implementation, stem):
    network = Architecture(depth=7, growth_rate=4, stem=stem, in_chans=channels)
    model = SparseNet(network, implementation)
    found = []
    model.stem[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    images = torch.randn(2, channels, 32, 32, requires_grad=True)
    for forward in (model, model.forward_features, model.forward_intermediates):
        forward(images)
    model(images).sum().backward()
    last = implementation == "native"
    layouts = [torch.contiguous_format, torch.channels_last]
    assert all(each.is_contiguous(memory_format=layouts[last]) for each in found)
    assert len(found) == 4 and images.grad.shape == images.shape


def test_what_it_does_not_take():
    model = SparseNet(Architecture(depth=7, growth_rate=3), "native").eval()
    assert model(torch.randn(0, 3, 8, 8)).shape == (0, 10)
    half = SparseNet(model.architecture).eval().half()
    assert half(torch.randn(1, 3, 8, 8).half()).dtype == torch.float16  # auto takes another
    with pytest.raises(ValueError, match=r"expected fp64, fp32 or bf16, found torch\.float16"):
        model.half()(torch.randn(1, 3, 8, 8).half())


@pytest.mark.parametrize("images", [1, 64])
def test_tensors_without_data_have_shapes(images):
    with FakeTensorMode():
        model = SparseNet(Architecture(depth=7, growth_rate=12), "native").train()
        assert model(torch.randn(images, 3, 32, 32)).shape == (images, 10)


def test_the_same_threads_give_the_same_bits():
    assert torch.equal(gradients(2, 16, torch.float32), gradients(2, 16, torch.float32))


def test_bands_of_rows_join_without_a_seam():
    """Wide enough that a band holds a few rows only; one feature a channel wide, one image."""
    torch.manual_seed(0)
    architecture = Architecture(fetch="dense", depth=10, growth_rate=1)
    reference = SparseNet(architecture, "reference").double().train()
    model = SparseNet(architecture, "native").double().train()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 24, 3000).double()
    for each in (reference, model):
        each(images).square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm().clamp(min=1e-6)


CHOOSE = """
import torch
from sparsenet.ops.dispatch import choose
try:
    print(choose({!r}, torch.device("cpu")))
except ValueError as error:
    print(error)
"""


def test_without_a_compiler(tmp_path):
    """Auto takes one of the others, the fastest; asking for ``native`` says what is missing."""
    nowhere = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path)}
    assert run(CHOOSE.format("auto"), **nowhere) in ("shared\n", "reference\n")
    assert "needs a C compiler" in run(CHOOSE.format("native"), **nowhere)


@pytest.mark.parametrize("cache", ["a file", "no home"])
def test_without_a_cache(tmp_path, cache):
    """Compiled for this process alone, which leaves nothing behind."""
    (tmp_path / "file").touch()
    where = (
        {"XDG_CACHE_HOME": str(tmp_path / "file")}
        if cache == "a file"
        else {"XDG_CACHE_HOME": "", "HOME": "/dev/null"}
    )
    (tmp_path / "tmp").mkdir()
    code = """
import torch
from sparsenet.ops import compiler, native
print(native.unavailable(torch.device("cpu")))
"""
    assert run(code, TMPDIR=str(tmp_path / "tmp"), **where) == "None\n"
    assert not list((tmp_path / "tmp").rglob("*.so"))


def test_a_compiler_that_is_not_there(tmp_path):
    message = run(CHOOSE.format("native"), CC="nowhere-cc", XDG_CACHE_HOME=str(tmp_path))
    assert "could not be compiled by nowhere-cc: No such file or directory" in message


def test_a_compiler_with_an_open_quote_is_told_in_one_line(tmp_path):
    message = run(CHOOSE.format("native"), CC="'gcc", XDG_CACHE_HOME=str(tmp_path))
    assert "No closing quotation" in message and message.count("\n") == 1


def test_a_compiler_is_not_asked_again(tmp_path):
    """One that fails is remembered, and one with arguments is understood."""
    count, compiler = tmp_path / "count", tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\necho $@ >> {count}\nexit 1\n")
    compiler.chmod(0o755)
    twice = CHOOSE.format("auto") * 2
    assert run(twice, CC=f"{compiler} -pipe", XDG_CACHE_HOME=str(tmp_path)) in (
        "shared\n" * 2,
        "reference\n" * 2,
    )
    asked = count.read_text().splitlines()
    assert len(asked) == 1 and asked[0].startswith("-pipe")


def test_ctrl_c_is_not_lost_where_the_compiler_has_just_ended(monkeypatch):
    def interrupted(self, **options):
        self.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiler.run_compiler(["true"])


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path):
    actual = run(CHOOSE.format("native"), CFLAGS="-march=none", XDG_CACHE_HOME=str(tmp_path))
    assert "could not be compiled" in actual and actual.count("\n") == 1


def script(path, lines):
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def test_what_a_compiler_prints_need_not_be_text(tmp_path):
    hostile = script(tmp_path / "cc", "printf 'a.c: error: \\377\\351 \\200\\n' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"compiled by .*cc: a\.c: error: \ufffd+ \ufffd$"):
        compiler.compile_library([hostile], [], tmp_path / "native.so")


class Kept:
    """A cache with the compiled kernels, whose compiler takes no time: it copies a library."""

    def __init__(self, folder):
        self.library, self.log = folder / "library.so", folder / "log"
        shutil.copy(compiler.library()._name, self.library)
        lines = f'for target; do :; done; echo >> {self.log}; cp {self.library} "$target"'
        self.cc, self.folder = script(folder / "cc", lines), folder / "sparsenet" / "kernels"

    @property
    def file(self):
        (path,) = self.folder.glob("native-*.so")
        return path

    @property
    def compiled(self):
        """So often since the last time that this was asked for."""
        count = len(self.log.read_text().splitlines()) if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return count

    def load(self):
        return Path(compiler._load(self.cc, [])._name)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    if not Path(compiler.library()._name).exists():
        pytest.skip("nothing can be kept here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Kept(tmp_path)
    assert kept.load() == kept.file and kept.compiled == 1
    assert kept.load() == kept.file and kept.compiled == 0
    return kept


def is_whole(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() in path.name


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_functions(path):
    """A library that loads and is what its name says."""
    source = path.with_name("other.c")
    source.write_text("int matrix_unit(void) { return 1; }")
    other = source.with_suffix(".so")
    assert not compiler.run_compiler(["cc", "-shared", "-fPIC", str(source), "-o", str(other)])
    key = path.name.split("-")[1]
    path.unlink()
    other.rename(path.with_name(compiler._name(key, other.read_bytes())))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 40960),
        lambda path: os.truncate(path, 0),
        flip,
        pytest.param(
            without_functions,
            marks=pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler, cc"),
        ),
        lambda path: path.chmod(0o664),
        lambda path: path.chmod(0o646),
        pytest.param(
            lambda path: os.chown(path, 12345, 12345),
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
    ids=["truncated", "empty", "flipped", "without functions", "group", "others", "owner"],
)
def test_a_kept_library_that_is_not_as_it_should_be_is_compiled_anew(kept, damage):
    kept.library.with_name("copy").write_bytes(kept.file.read_bytes())
    kept.library.with_name("copy").replace(kept.file)  # this process has mapped the other one
    damage(kept.file)
    assert kept.load() == kept.file and kept.compiled == 1
    assert is_whole(kept.file) and kept.file.stat().st_mode & 0o777 == 0o644
    assert kept.file.stat().st_uid == os.geteuid()
    assert kept.load() == kept.file and kept.compiled == 0


def test_what_lies_in_a_folder_that_others_may_write_to_is_not_executed(kept):
    kept.folder.chmod(0o777)
    before = kept.file.stat()
    assert kept.load().parent != kept.folder and kept.compiled == 1
    assert kept.file.stat() == before
    kept.folder.chmod(0o1777)  # as /tmp is
    assert kept.load() == kept.file and kept.compiled == 0


def test_the_umask_opens_the_folder_to_nobody(kept):
    shutil.rmtree(kept.folder)
    before = os.umask(0)
    try:
        assert kept.load() == kept.file
    finally:
        os.umask(before)
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    assert kept.load() == kept.file and kept.compiled == 1


def test_a_compiler_that_makes_another_library_is_told_in_one_line(kept, monkeypatch):
    kept.file.unlink()
    kept.library.write_bytes(b"nothing")
    monkeypatch.setenv("CC", kept.cc)
    reason = compiler._library.__wrapped__()
    assert "could not be compiled and loaded" in reason and "\n" not in reason
    assert kept.compiled == 1


def test_processes_that_start_at_once_share_an_empty_cache(kept):
    shutil.rmtree(kept.folder)
    code = "import torch; from sparsenet.ops import native\n"
    code += "print(native.unavailable(torch.device('cpu')))"
    environment = {**os.environ, "CC": kept.cc}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == [b"None\n"] * 3
    assert is_whole(kept.file)


def test_the_accelerator_is_refused():
    assert "it is for CPUs" in native.unavailable(torch.device("meta"))
