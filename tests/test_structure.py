"""The floors of the house: imports go down only, and what each part may load."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sparsenet"
# From the ground up. A room may import rooms on lower floors, and those before it on its own.
FLOORS = [
    line.split()
    for line in """
    texts validation topology extras results events files yaml_files downloads addresses schedule
    architecture graph device memory environment capture
    ops
    ranks changes stage model
    data optim
    weights zoo adoption timm
    config presets arithmetic
    checkpoints run trained start composition
    preparation state step evaluation
    summary pictures records conclusion
    explain train predict serving export report check tracking
    display signals flags commands library hub
    cli __main__
    """.strip().splitlines()
]
ORDER = {
    room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, runtime_only=True):
    """Names of the rooms that a file imports, those for type checking only left out."""
    tree = ast.parse(path.read_text())
    if runtime_only:
        tree.body = [
            n
            for n in tree.body
            if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
        ]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "sparsenet"
        ):
            parts = node.module.split(".")[1:]
            yield from (
                [parts[0]] if parts else [a.name for a in node.names if a.name != "__version__"]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("sparsenet."))


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "__init__"], ids=lambda p: p.stem)
def test_imports_go_down_only(path):
    here = room(path)
    for imported in imports(path):
        assert imported == here or ORDER[imported] < ORDER[here], f"{here} imports {imported}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room(p) not in ("cli", "display", "commands")],
    ids=lambda p: p.stem,
)
def test_only_the_command_line_prints_or_exits(path):
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {"print", "sys.exit", "exit"} & {ast.unparse(call) for call in calls}


@pytest.mark.parametrize(
    "path", [PACKAGE / "topology.py", PACKAGE / "architecture.py"], ids=lambda p: p.stem
)
def test_structure_needs_no_torch(path):
    assert "import torch" not in path.read_text()


def test_building_a_model_needs_the_core_only():
    """Packages beyond the core dependencies are extras, which are imported when first used."""
    core = {"torch", "numpy", "safetensors", "jinja2", "msgspec", "sparsenet", "__future__"}
    import sys

    standard = sys.stdlib_module_names
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in core | standard, f"{path.name} imports {name}"


def test_the_tested_versions_are_within_what_is_declared():
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "sparsenet":
            assert pinned[requirement.name] in requirement.specifier
