"""What the documentation shows is what happens: its examples are run, in order, page by page."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "DESIGN.md"])
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)


def blocks(page):
    """Kind and text of each code block."""
    for indent, kind, text in BLOCK.findall(page.read_text()):
        yield kind, textwrap.dedent(text) if indent else text


def shape_of(line):
    """A line without what differs from machine to machine and run to run: its numbers.

    What a network costs differs nowhere.
    """
    costs = re.findall(r"[\d,]+ (?:parameters|MACs)", line)
    return " ".join([re.sub(r"-?\d[\d.,]*(e-?\d+)?", "#", line).strip(), *costs])


def assert_shown(shown, printed):
    """Every line of *shown* was printed, in this order; ``...`` stands for any lines."""
    lines = iter([shape_of(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() not in ("", "...", "…"):
            assert shape_of(line) in lines, f"not printed: {line!r}; printed was\n{printed}"


def commands(text):
    """Each command of a console block with the output that is shown for it."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run(arguments, folder):
    tools = Path(sys.executable).parent
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def typed(command, folder, call):
    """What *command* prints; the program runs in this process, which has loaded it."""
    name, *arguments = shlex.split(command)
    if name != "sparsenet" or not {"|", "||", ">", "&&"}.isdisjoint(arguments):
        return run(["bash", "-c", command], folder)
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out + outcome.err


def examples(page):
    return [kind for kind, _ in blocks(page) if kind in ("python", "console")]


@pytest.mark.parametrize("page", [*filter(examples, PAGES)], ids=lambda page: page.stem)
def test_examples_do_what_they_show(page, call, tmp_path):
    printed = ""
    for kind, text in blocks(page):
        if kind == "python" and text.startswith(">>>"):
            (tmp_path / "session.txt").write_text(text)
            run([sys.executable, "-m", "doctest", "session.txt"], tmp_path)
        elif kind == "python":
            printed = run([sys.executable, "-c", text], tmp_path)
            comments = re.findall(r"print\(.*\)  # (.*)$", text, re.M)
            assert_shown("\n".join(comments), printed)
        elif kind == "text":
            assert_shown(text, printed)
        elif kind == "console":
            for command, shown in commands(text):
                assert_shown(shown, typed(command, tmp_path, call))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_name_are_there(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_promise_has_tests_that_are_there():
    promises = (ROOT / "docs" / "reliability.md").read_text().split("\n## ")[1:]
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for promise in promises:
        names = re.findall(r"^- `(test_\w+)`$", promise, re.M)
        assert len(names) >= 3, promise
        for name in names:
            assert f"def {name}(" in sources, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_fit_a_page(page):
    """Prose wraps, but a table's row or a command that is too wide cannot."""
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            assert len(re.sub(r"\]\([^)]*\)", "]", line)) <= 160, line
