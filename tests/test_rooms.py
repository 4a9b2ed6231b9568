"""Who may know whom: imports go from higher floors to lower ones, never round in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pixelgen_kernels
import pytest

import pixelgen

PACKAGE = Path(pixelgen.__file__).parent
MAX_LINES = 400
MAX_AT_TOP = 14

# From low to high. A module belongs to the longest name here that it begins with; the options of rooms
# above config, which joins them, to OPTIONS. It may import what is on lower floors, and of its own
# floor only what has the same name.
OPTIONS = "*.options"
GROWING = {"data.options", "losses.options"}  # have those of their rooms' sources and terms
FLOORS = [
    ["errors"],
    # models.families: names of families, for the options; it loads none of them
    ["files", "flow", "options", "models.families"],
    [OPTIONS],
    ["conditions"],
    ["models", "encoders"],
    ["data", "losses"],
    ["config"],
    ["training.checkpoint.read"],  # knows files alone, so that sampling need not know training
    ["sampling"],
    ["planning"],
    ["training"],
    ["evaluation"],
    ["__init__", "train", "sample", "evaluate", "ablate", "data.prepare"],
]
ENTRY_POINTS = {"__init__", "train", "sample", "evaluate", "ablate"}  # at the top of the package


def imported(source: str, modules: set[str]) -> set[str]:
    """Those of ``modules`` that a source imports anywhere in it, but for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            # what is imported from a package may be a module or a name in its __init__
            full = {name.name: f"{node.module}.{name.name}" for name in node.names}
            found.update(path if path in modules else str(node.module) for path in full.values())
        children = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = iter(node.orelse)
        for child in children:
            visit(child)

    visit(ast.parse(source))
    return found & modules


def module_name(path: Path) -> str:
    """The whole name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def short(module: str) -> str:
    """Without the package's name, which itself is ``__init__``."""
    return module.removeprefix("pixelgen").removeprefix(".") or "__init__"


def arrows() -> set[tuple[str, str]]:
    """Module and module that it imports."""
    sources = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
    return {
        (short(module), short(other))
        for module, source in sources.items()
        for other in imported(source, set(sources))
        if other != module
    }


def place(module: str) -> tuple[int, str]:
    """Floor and name there of a module."""
    known = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    if module.endswith(OPTIONS[1:]) and module not in GROWING:
        return known[OPTIONS], OPTIONS
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    name = next((name for name in names if name in known), None)
    assert name is not None, f"{module} has no place in FLOORS"
    return known[name], name


def goes_down(arrow: tuple[str, str]) -> bool:
    """Whether an import is allowed by FLOORS."""
    (floor, name), (other_floor, other_name) = map(place, arrow)
    return floor > other_floor or name == other_name


def circle(found: set[tuple[str, str]]) -> list[str]:
    """Modules that import one another in turn; empty where there are none."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for module, other in found:
        sorter.add(module, other)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_one_of_a_higher_floor():
    assert not [" imports ".join(arrow) for arrow in sorted(arrows()) if not goes_down(arrow)]


def test_no_circle_among_modules():
    assert not circle(arrows())


def test_every_place_is_someones():
    modules = {place(short(module_name(path)))[1] for path in PACKAGE.rglob("*.py")}
    assert modules == {name for floor in FLOORS for name in floor}


def test_the_top_of_the_package_is_read_at_a_glance():
    names = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names >= ENTRY_POINTS
    assert len(names - ENTRY_POINTS) <= MAX_AT_TOP, sorted(names - ENTRY_POINTS)


def test_no_file_is_long():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, long


def test_kernels_stand_alone():
    files = list(Path(pixelgen_kernels.__file__).parent.rglob("*.py"))
    names = {
        name.name if isinstance(node, ast.Import) else str(node.module)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    packages = {name.partition(".")[0] for name in names}
    assert {"torch", "pixelgen_kernels"} <= packages and "pixelgen" not in packages


SOURCE = """
from typing import TYPE_CHECKING
import typing
import pixelgen.flow as f
from pixelgen import errors
from pixelgen.config import load, nothing
if TYPE_CHECKING:
    from pixelgen.train import main
else:
    from pixelgen import sample
if typing.TYPE_CHECKING:
    import pixelgen.files
def inside():
    class Inner:
        from pixelgen.options import Options
    from pixelgen_kernels import Ops
"""


def test_imports_are_found_wherever_they_stand():
    modules = {module_name(path) for path in PACKAGE.rglob("*.py")}
    found = {short(module) for module in imported(SOURCE, modules)}
    assert found == {"flow", "errors", "config", "config.load", "sample", "options"}


@pytest.mark.parametrize(
    ("module", "other", "allowed"),
    [
        ("training.log", "sampling.images", True),
        ("sampling.pipeline", "training.checkpoint.read", True),
        ("sampling.pipeline", "training.checkpoint.write", False),
        ("data.sources.hf", "sampling.images", False),
        ("data.loader", "data.crop", True),
        ("data.loader", "losses.gate", False),  # of one floor
        ("data.loader", "config.load", False),
        ("data.prepare.command", "config.load", True),
        ("config.load", "training.options", True),
        ("config.load", "training.optim", False),
        ("models.options", "data.options", False),
        ("options", "models.options", False),
        ("errors", "files", False),
    ],
)
def test_floors(module, other, allowed):
    assert goes_down((module, other)) is allowed


def test_a_circle_is_found():
    assert set(circle({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")})) == {"a", "b", "c"}
    assert circle({("a", "b"), ("b", "c"), ("a", "c")}) == []
