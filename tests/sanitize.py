"""Runs tests of the ops with the C++ CPU code under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [arguments of pytest]

Builds into build/sanitize (needs cmake, ninja, g++ and pybind11); without arguments it runs the tests of the
ops and the malformed calls. A control comes first: a call that writes beyond its output must be reported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "packages" / "pixelgen_kernels"
# what is compiled by the test (torch.compile, Triton, the CUDA emulation) is not the code in question
# and sums are not in vectors in this build, so that they round more than the tests named last allow
SELECTION = [
    "-k",
    "not compiles and not opcheck and not interpreted and not ptx and not autocast and not stages_of_vgg "
    "and not nearly_equal_features and not upstream_gradients and not (lpips_distance and bfloat16-float32)",
]

# An editable install finds its own package before any path.
START = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
import pixelgen_kernels
if not pixelgen_kernels.__file__.startswith(sys.argv[1]):
    sys.exit(f"sanitize: the tests would run {pixelgen_kernels.__file__}")
"""
CONTROL = """
import torch
from pixelgen_kernels.native import _C
x, y = torch.ones(4, 64), torch.ones(4, 32)
y.untyped_storage().resize_(256)  # behind the back of y, whose last rows have no memory now
_C.swiglu_fwd(x, y)
"""
# in this process: others would not import what it prepares
TESTS = 'import pytest\nsys.exit(pytest.main(["-n", "0", *sys.argv[2:]]))\n'


def build() -> None:
    """Compiles the module and puts it beside a copy of the Python sources."""
    import pybind11

    options = {
        "PIXELGEN_SANITIZE": "address,undefined",
        "PIXELGEN_CUDA": "OFF",
        "CMAKE_BUILD_TYPE": "Debug",  # asserts stay, and pybind11 does not strip the module
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": PACKAGE,
        "SKBUILD_PROJECT_VERSION": "0",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    shutil.copytree(
        ROOT / "kernels" / "pixelgen_kernels",
        PACKAGE,
        ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"),
        dirs_exist_ok=True,
    )
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *defines], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["cmake", "--build", BUILD], check=True)


def library(name: str) -> str:
    """Path of a library of the compiler."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(code: str, *arguments: str, **options: bool) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a Python process that has the sanitizers' runtime."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(ROOT)]),
        # Python itself is not instrumented; libstdc++ so that exceptions of Torch are seen from the start
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python and Torch keep memory until the end; a test asks for more than there is
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GOMP_SPINCOUNT": "1000",
    }
    command = [sys.executable, "-c", START + code, str(PACKAGE), *arguments]
    return subprocess.run(command, env=env, text=True, cwd=ROOT, **options)  # type: ignore[call-overload]


def main() -> int:
    build()
    control = run(CONTROL, capture_output=True)
    if control.returncode == 0 or "heap-buffer-overflow" not in control.stderr:
        print(f"sanitize: the control was not reported\n{control.stderr}", file=sys.stderr)
        return 1
    print("sanitize: the control was reported: heap-buffer-overflow")
    files = [str(path) for path in sorted((Path(__file__).parent / "ops").glob("test_*.py"))]
    return run(TESTS, *(sys.argv[1:] or [*files, *SELECTION, "-q", "-p", "no:cacheprovider"])).returncode


if __name__ == "__main__":
    sys.exit(main())
