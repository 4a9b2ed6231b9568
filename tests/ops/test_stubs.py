"""The stubs by which a type checker knows the ops: names are found at run time, which it cannot follow.

    python tests/ops/test_stubs.py

writes them anew after an op was added.
"""

import ast
from pathlib import Path

import pixelgen_kernels
import pytest
from pixelgen_kernels import registry

PACKAGE = Path(pixelgen_kernels.__file__).parent
HEAD = "# Written by `python tests/ops/test_stubs.py`, which is also the test that they are up to date.\n"


def stubs() -> dict[str, str]:
    """File name -> text."""
    modules = {name: op.fused.__module__ for name, op in sorted(registry.ops().items())}
    by_module = sorted((module, name) for name, module in modules.items())
    exports = [f"from {module} import {name} as {name}" for module, name in by_module]
    members = [f"    {name} = staticmethod({module}.{name})" for name, module in modules.items()]
    imports = [f"import {module}" for module in sorted(set(modules.values()))]
    return {
        "__init__.pyi": "\n".join(
            [
                HEAD,
                "from pixelgen_kernels.native import build_info as build_info",
                *exports,
                "from pixelgen_kernels.select import OP_NAMES as OP_NAMES",
                "from pixelgen_kernels.select import Ops as Ops",
                "from pixelgen_kernels.select import select as select",
                "",
            ]
        ),
        "select.pyi": "\n".join(
            [
                HEAD,
                "from typing import Literal",
                "",
                *imports,
                "",
                "OP_NAMES: tuple[str, ...]",
                "",
                "class Ops:",
                *members,
                "",
                'def select(kernels: Literal["auto", "eager"]) -> Ops: ...',
                "",
            ]
        ),
    }


@pytest.mark.parametrize("name", ["__init__.pyi", "select.pyi"])
def test_stubs_are_up_to_date(name: str) -> None:
    """But for its layout, which is the formatter's."""
    written, right = (ast.dump(ast.parse(text)) for text in ((PACKAGE / name).read_text(), stubs()[name]))
    assert written == right, "run: python tests/ops/test_stubs.py"


if __name__ == "__main__":
    for name, text in stubs().items():
        (PACKAGE / name).write_text(text)
