"""The package as it is imported."""

import signal
import subprocess
import sys

import pytest

import sparsenet


def in_a_fresh_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_importing_the_package_loads_no_pytorch():
    code = "import sys, sparsenet; print('torch' in sys.modules, sparsenet.__version__)"
    assert in_a_fresh_process(code) == ["False", sparsenet.__version__]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--depht", "3"]])
def test_the_command_line_answers_without_pytorch(arguments):
    code = f"""
import contextlib, io, sys
from sparsenet import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        cli.run({arguments!r})
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    assert in_a_fresh_process(code) == ["False", "False"]


def test_training_and_predicting_load_no_compiler_and_no_scipy(tmp_path):
    training = ["train", "--depth", "7", "--growth_rate", "4", "--max_epoch", "1"]
    training += ["--optimizer", "muon", "--ema", "0.9"]
    commands = [[*training, "--out", "run"], ["predict", "run", "run/samples.png"]]
    code = f"""
import contextlib, io, os, sys
from sparsenet import cli
os.chdir({str(tmp_path)!r})
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [cli.run(command) for command in {commands!r}]
print(*codes, *({{"torch._dynamo", "sympy", "scipy", "sklearn"}} & set(sys.modules)))
"""
    assert in_a_fresh_process(code) == ["0", "0"]


def test_public_names_and_modules_are_there_after_a_bare_import():
    code = """
import sparsenet
import sparsenet.adoption
print(callable(sparsenet.adopt), set(sparsenet.__all__) <= set(dir(sparsenet)))
print(sparsenet.weights.load.__name__, sparsenet.create_model.__name__)
"""
    assert in_a_fresh_process(code) == ["True", "True", "load", "create_model"]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'densenet'"):
        _ = sparsenet.densenet


def test_an_interrupt_while_pytorch_is_loading_prints_no_traceback():
    code = """
import os, signal, sys, threading
from sparsenet.cli import main
sys.argv = ["sparsenet", "models"]
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
