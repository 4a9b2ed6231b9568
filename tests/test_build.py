"""What was built, what CMake refuses, and that the CUDA sources compile without spills."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pixelgen_kernels
import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = sorted((ROOT / "csrc" / "ops").glob("*.cu"))
ARCHITECTURES = os.environ.get("PIXELGEN_TEST_ARCHITECTURES", "sm_90").split(",")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def configure(build: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs CMake's configure step, which compiles none of our sources."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, which the build fetches for itself")
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake, which the build fetches for itself")
    command = [cmake, "-S", str(ROOT), "-B", str(build), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += ["-DPYBIND11_FINDPYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-D{name}={value}" for name, value in settings.items()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def write_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_build_info() -> None:
    info = pixelgen_kernels.build_info()
    assert info["version"] == metadata.version("pixelgen")
    assert re.fullmatch(r"\w+ \d+\.\d+.*", info["compiler"])
    assert info["openmp"] is True
    assert info["cpu_isa"] in info["cpu_isas"] and info["cpu_isas"][0] == "baseline"
    assert bool(info["cuda_archs"]) == info["cuda"] == (info["cuda_version"] is not None)


def test_torch_and_kernels_share_one_openmp_runtime() -> None:
    """Two runtimes would be two thread pools that spin against each other."""
    script = (
        "import pixelgen_kernels\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({path for path in maps if 'libgomp' in path}))\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_missing_module_says_how_to_install() -> None:
    script = "import sys; sys.modules['pixelgen_kernels._C'] = None; import pixelgen_kernels"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError: pixelgen_kernels: the compiled module" in done.stderr
    assert "pip install ." in done.stderr


def test_wrong_cuda_setting_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, PIXELGEN_CUDA="MAYBE")
    assert done.returncode != 0
    assert "PIXELGEN_CUDA must be OFF, ON or AUTO, got 'MAYBE'" in done.stderr


@pytest.mark.parametrize(("choice", "ok"), [("ON", False), ("AUTO", True), ("no", True)])
def test_broken_nvcc(tmp_path: Path, choice: str, ok: bool) -> None:
    """ON is an error that shows what nvcc said, AUTO a warning, OFF silence."""
    nvcc = write_program(tmp_path / "cuda" / "bin" / "nvcc", "echo no licence for this compiler >&2; exit 3")
    done = configure(tmp_path / "build", PIXELGEN_CUDA=choice, PIXELGEN_NVCC=str(nvcc))
    assert (done.returncode == 0) is ok, done.stderr
    told = "no licence for this compiler" in done.stderr
    assert told is (choice != "no")
    if choice == "ON":
        assert "CUDA_HOME" in done.stderr and "PIXELGEN_CUDA=OFF" in done.stderr
    if choice == "AUTO":
        assert "Building without CUDA kernels" in done.stderr


def compile_to_cubin(nvcc: str, source: Path, arch: str) -> list[str]:
    """Compiles one source; returns complaints."""
    command = [nvcc, "-O3", "-std=c++17", f"-arch={arch}", "-cubin", "--resource-usage", "-o", "/dev/null"]
    for flags in re.findall(r"^// flags: (.*)", source.read_text(), re.MULTILINE):  # as CMake reads them
        command += flags.split()
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        return [f"{source.name} {arch}: {output}"]
    spills = re.findall(r"properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores", output)
    assert spills, f"{source.name} {arch}: nvcc printed no resource usage:\n{output}"
    return [f"{source.name} {arch}: {name} spills {count} bytes" for name, count in spills if count != "0"]


@pytest.mark.slow
def test_cuda_sources_compile_without_spills() -> None:
    """For one architecture; the build compiles them for all, but does not look at what nvcc reports.

    Others, a few minutes each: ``PIXELGEN_TEST_ARCHITECTURES=sm_80,sm_90,sm_100 pytest --timeout 3600
    tests/test_build.py -k spills``.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    jobs = [(nvcc, source, arch) for source in CUDA_SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        complaints = [text for texts in pool.map(lambda job: compile_to_cubin(*job), jobs) for text in texts]
    assert not complaints, "\n".join(complaints)
