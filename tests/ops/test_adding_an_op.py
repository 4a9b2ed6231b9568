"""The recipe of docs/kernels.md, followed in a copy of the sources that holds no other op."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = re.compile(r"^`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
# an editable install finds its own package before any path
RUN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
import pixelgen_kernels.registry, pytest
assert pixelgen_kernels.__file__.startswith(sys.argv[1]), pixelgen_kernels.__file__
assert pixelgen_kernels.OP_NAMES == ("squared_relu",), pixelgen_kernels.OP_NAMES
kernels = pixelgen_kernels.registry.ops()["squared_relu"].call
assert kernels.fwd.native is not None and kernels.bwd.native is not None
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_an_op_is_added_by_the_recipe(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, which the build fetches for itself")
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja, which the build fetches for itself")
    recipe = RECIPE.findall((ROOT / "docs" / "kernels.md").read_text())
    assert [Path(name).suffix for name, _ in recipe] == [".py", ".cpp"]
    others = shutil.ignore_patterns("_C*", "__pycache__", "*.pyi")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    for part in ("csrc", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=others)
    package = tmp_path / "kernels" / "pixelgen_kernels"
    for path in [*(tmp_path / "csrc" / "ops").iterdir(), *(package / "ops").glob("[!_]*.py")]:
        path.unlink()
    for name, text in recipe:
        (tmp_path / name).write_text(text)

    definitions = {
        "PIXELGEN_CUDA": "OFF",
        "SKBUILD_PROJECT_VERSION": "0",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(package),
    }
    options = [f"-D{key}={value}" for key, value in definitions.items()]
    build = tmp_path / "build"
    for command in (["-S", tmp_path, "-B", build, "-G", "Ninja", *options], ["--build", build]):
        subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL)

    tests = [str(ROOT / "tests" / "ops" / name) for name in ("test_ops.py", "test_malformed_calls.py")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path, *tests, "-q", "-n", "0", "-p", "no:cacheprovider"],
        env={**os.environ, "PYTHONPATH": str(package.parent), "GOMP_SPINCOUNT": "1000"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
