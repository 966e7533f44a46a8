"""Runs commands of the program, one after the other, in a process that has the plug-in.

``python npu_commands.py < COMMANDS`` reads a JSON list of commands, each a list of what the
plug-in's autocast does (``npu_backend.autocast``) and the arguments. It prints a JSON list of what
each command gave, printed and did on the device.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest.mock import Mock

from sparsenet import cli, conclusion, train
from sparsenet.ops import measured

npu_backend = sys.modules["npu_backend"]  # which PyTorch has loaded by itself
measured.ROUNDS = (0, 0)  # the one that warms up counts
train.LOOK_EVERY = 0.0  # after each step, so that a run can be stopped within an epoch


def told(counter):
    return [[str(dtype), shape, count] for (dtype, shape), count in counter.items()]


def run(autocast, *arguments):
    npu_backend.forget()
    npu_backend.autocast = autocast
    if [*Path().glob("*/samples.png")]:
        conclusion.pictures = Mock()  # those of one run are enough, and take longer than training
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(arguments)
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "ran": dict(npu_backend.ran),
        "to_device": told(npu_backend.to_device),
        "to_host": told(npu_backend.to_host),
    }


print(json.dumps([run(*each) for each in json.load(sys.stdin)]))
