"""What is built and for what, warnings of a build that does not fit, and that no kernel uses local memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pixelgen_kernels
import pytest
import torch
from packaging.requirements import Requirement
from pixelgen_kernels import native, registry

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


def test_without_triton_and_without_a_gpu() -> None:
    """Ops on the CPU need no Triton, and do not look at the CUDA build."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, pixelgen_kernels\n"
        "pixelgen_kernels.swiglu(torch.ones(2, 4, requires_grad=True)).sum().backward()\n"
        "print(pixelgen_kernels.native.check_cuda.cache_info().misses)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_every_compiled_op_is_registered_for_cuda() -> None:
    """Also where no CUDA kernels were built: else its reference would run without a warning."""
    for op in registry.ops().values():
        for kernel in (op.call.fwd, op.call.bwd):
            if kernel is not None and kernel.native is not None:
                name = f"pixelgen::{kernel.name}"
                assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


@pytest.fixture
def first_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """The warnings when two ops run on CUDA for the first and second time; here on tensors of the CPU."""
    kernels = [registry.ops()[name].call.fwd for name in ("philox_uniform", "philox_normal")]

    def use(built: dict[str, Any], driver: int = 0, device: tuple[int, int] = (0, 0)) -> list[str]:
        monkeypatch.setattr(native, "build_info", lambda: built)
        monkeypatch.setattr(native, "_driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: device)
        for kernel in kernels:
            monkeypatch.setattr(kernel, "_without_triton", kernel._first_on_cuda)
        native.check_cuda.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for kernel in kernels * 2:
                kernel.on_cuda(torch.zeros(2, dtype=torch.int64), 0, 0, 4, 0)
        for kernel in kernels:
            assert kernel._without_triton == (kernel.compiled if built["cuda"] else kernel.by_reference)
        return [str(warning.message) for warning in caught]

    yield use
    native.check_cuda.cache_clear()


def test_a_build_without_cuda_warns_once(first_use: Callable[..., list[str]]) -> None:
    (text,) = first_use({"cuda": False})
    assert "this build has no CUDA kernels" in text and "PIXELGEN_CUDA=ON pip install ." in text


@pytest.mark.parametrize(
    ("driver", "device", "told"),
    [
        (12080, (9, 0), "by nvcc 13.1 for sm_80, sm_100a, sm_110f, compute_120 and fail, as the driver"),
        (13000, (8, 9), None),  # older than nvcc, and runs sm_80
        (13000, (10, 0), None),
        (13000, (10, 3), "on an sm_103"),  # sm_100a is for one device
        (13000, (11, 0), None),
        (13000, (12, 0), "on an sm_120 with a driver that knows CUDA 13.0"),  # not PTX of nvcc 13.1
        (13010, (12, 0), None),
        (14000, (12, 1), None),
        (13010, (9, 0), "on an sm_90"),
        (13010, (7, 5), "on an sm_75"),
    ],
)
def test_a_build_that_does_not_fit_warns_once(
    first_use: Callable[..., list[str]], driver: int, device: tuple[int, int], told: str | None
) -> None:
    archs = ["sm_80", "sm_100a", "sm_110f", "compute_120"]
    texts = first_use({"cuda": True, "cuda_version": "13.1.80", "cuda_archs": archs}, driver, device)
    assert len(texts) == (told is not None)
    assert all(told in text and "pip install ." in text for text in texts if told)


def test_what_is_optional_and_where() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["flash"], *extras["flash2"], *extras["bench"]]
    found = {requirement.name: requirement for requirement in map(Requirement, needed)}
    linux = {"platform_system": "Linux", "platform_machine": "x86_64"}
    for name in ("triton", "flash-attn-4", "flash-attn", "liger-kernel"):  # there are none for macOS
        marker = found[name].marker
        assert marker is not None and marker.evaluate(linux), name
        assert not marker.evaluate({"platform_system": "Darwin", "platform_machine": "arm64"}), name
    # of which there are pre-releases only: pip takes them where the specifier names one
    assert found["flash-attn-4"].specifier.contains("4.0.0b36")


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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("native", "PIXELGEN_CUDA_ARCHS=native, but nvidia-smi shows no GPU"),
        ("90;8.6", "has no architecture '8.6'; allowed are AUTO, native, all, or a list of"),
        ("80a", "has no architecture '80a'; allowed are"),
    ],
)
def test_wrong_cuda_architectures_are_refused(tmp_path: Path, setting: str, message: str) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    # as where the driver does not run: not an architecture of version 53.5
    smi = write_program(tmp_path / "nvidia-smi", "echo 'Failed to initialize NVML: version 53.5'; exit 18")
    tools = {"PIXELGEN_NVCC": nvcc, "PIXELGEN_NVIDIA_SMI": str(smi)}
    done = configure(tmp_path / "build", PIXELGEN_CUDA="ON", PIXELGEN_CUDA_ARCHS=setting, **tools)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_cuda_architectures(tmp_path: Path) -> None:
    """The setting and the GPUs choose what is compiled, and `build_info` will say the same."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    each = [arch for arch in ("sm_80", "sm_90", "sm_100", "sm_120") if arch in known.split()]
    every = [*each, each[-1].replace("sm", "compute")]
    smi = tmp_path / "nvidia-smi"
    tools = {"PIXELGEN_NVCC": nvcc, "PIXELGEN_NVIDIA_SMI": str(smi), "PIXELGEN_CUDA": "ON"}
    for setting, gpus, expected in [
        ("AUTO", "printf '8.9\\n9.0\\n8.9\\n'", ["sm_89", "sm_90"]),
        ("AUTO", "exit 9", every),
        ("AUTO", "echo 3.5", every),  # which nvcc does not know
        ("all", "echo 9.0", every),
        ("80, 90a", "echo 9.0", ["sm_80", "sm_90a"]),
    ]:
        write_program(smi, gpus)
        build = tmp_path / "build"  # one for all: only the first run looks for the compilers
        done = configure(build, PIXELGEN_CUDA_ARCHS=setting, CMAKE_EXPORT_COMPILE_COMMANDS="ON", **tools)
        assert done.returncode == 0, done.stderr
        entries = json.loads((build / "compile_commands.json").read_text())
        commands = {Path(entry["file"]).name: entry["command"] for entry in entries}
        codes = re.findall(r"arch=\w+,code=\[?(\w+)\]?", commands["patchify.cu"])
        assert sorted(codes) == sorted(expected), (setting, gpus)
        assert f'PIXELGEN_CUDA_ARCHS=\\"{",".join(expected)}\\"' in commands["bindings.cpp"]
        assert " -lineinfo " in commands["patchify.cu"]


def compile_to_cubin(nvcc: str, source: Path, arch: str) -> list[str]:
    """Compiles one source; returns complaints."""
    command = [nvcc, "-O3", "-std=c++17", f"-arch={arch}", "-cubin", "--resource-usage", "-o", "/dev/null"]
    for flags in re.findall(r"^// flags: (.*)", source.read_text(), re.MULTILINE):  # as CMake reads them
        command += flags.split()
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        return [f"{source.name} {arch}: {output}"]
    used = re.findall(r"properties for (\w+)\s+(\d+ bytes stack frame, \d+ bytes spill stores)", output)
    assert used, f"{source.name} {arch}: nvcc printed no resource usage:\n{output}"
    none = "0 bytes stack frame, 0 bytes spill stores"
    return [f"{source.name} {arch}: {name} has {memory}" for name, memory in used if memory != none]


@pytest.mark.slow
def test_cuda_sources_use_no_local_memory() -> None:
    """Neither spills nor stack, for one architecture; the build does not look at what nvcc reports.

    Others, a few minutes each: ``PIXELGEN_TEST_ARCHITECTURES=sm_80,sm_90,sm_100 pytest -m slow --timeout 3600
    tests/test_build.py -k local_memory``.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    jobs = [(nvcc, source, arch) for source in CUDA_SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        complaints = [text for texts in pool.map(lambda job: compile_to_cubin(*job), jobs) for text in texts]
    assert not complaints, "\n".join(complaints)
