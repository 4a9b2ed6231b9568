"""The CUDA sources, compiled for the CPU by g++ and run by cuda_emulation.cpp in place of a GPU.

`build` makes a module like `pixelgen_kernels._C`; `Emulator.active` then sends the ops through it, with
tensors that lie on the CPU.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from op_testing import OPS, poisoned
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CACHE = HERE.parents[1] / "build" / "cuda_emulation"
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}

_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-w"]
_COMMON += ["-DPIXELGEN_HAS_CUDA", "-DPIXELGEN_CUDA_EMULATION"]
# aggregates stay whole, so that an access of 16 bytes is seen as one
_WATCHED = ["-fsanitize=thread", "-fsanitize=alignment", "-fno-tree-sra", "-ffp-contract=off"]
_DEFINES = {
    "PIXELGEN_VERSION": '"emulated"',
    "PIXELGEN_COMPILER": '"g++"',
    "PIXELGEN_CUDA_VERSION": '"emulated"',
    "PIXELGEN_CUDA_ARCHS": '"cpu"',
    "PIXELGEN_CPU_ISAS": '"baseline"',
}


def missing() -> str | None:
    """What this machine lacks to build the module, or None."""
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler: {_compiler()} is not on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is not installed"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(csrc: Path = CSRC, folder: Path = CACHE) -> Path:
    """Compiles a module like `pixelgen_kernels._C` from `csrc`, a folder laid out as csrc/ is.

    What is in `folder` is used again as long as the sources are the same.
    """
    cuda = sorted((csrc / "ops").glob("*.cu"), key=lambda path: -path.stat().st_size)
    # as CMake writes it; of the CPU's functions there are none
    names = " ".join(f"X({path.stem})" for path in sorted(cuda))
    text = f"#define PIXELGEN_CPU_FILES(X)\n#define PIXELGEN_CUDA_FILES(X) {names}\n"
    sources = [*cuda, csrc / "bindings.cpp", csrc / "dispatch.cpp"]
    return _link(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", sources, csrc, folder, text)


def build_faults(folder: Path = CACHE) -> Path:
    """Compiles a library of kernels with faults."""
    return _link("faults.so", [HERE / "faults.cu"], CSRC, folder, "")


def _link(name: str, sources: list[Path], csrc: Path, folder: Path, op_files: str) -> Path:
    """The library of these sources; all processes of the tests wait for the first one to make it."""
    import pybind11

    generated = folder / hashlib.sha256(op_files.encode()).hexdigest()[:16]
    includes = [HERE, csrc, generated, Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    # each folder in its own order: a copy of csrc with one changed file is compiled in no time
    headers = [path for part in (csrc, HERE) for path in sorted(part.rglob("*.*h"))]
    shared = op_files.encode() + b"".join(path.read_bytes() for path in headers)
    defines = [f"-D{key}={value}" for key, value in _DEFINES.items()]
    common = [_compiler(), *_COMMON, *defines, *(f"-I{path}" for path in includes)]

    def compiled(source: Path) -> Path:
        if source.suffix == ".cu":
            flags = ["-O1", "-g1", *_WATCHED, "-include", "cuda_emulation.h"]
        elif source.parent == HERE:
            flags = ["-O3", "-g1"]
        else:
            flags = ["-O0"]
        command = [*common, *flags, "-x", "c++", "-c", str(source)]
        options = repr((flags, _COMMON, defines, command[0], source.name, sys.version))
        key = hashlib.sha256(shared + source.read_bytes() + options.encode())
        target = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            _run([*command, "-o"], target)
        return target

    generated.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        (generated / "op_files.h").write_text(op_files)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, [*sources, HERE / "cuda_emulation.cpp"]))
        key = hashlib.sha256(repr([path.name for path in objects]).encode()).hexdigest()[:16]
        library = folder / key / name
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            _run([_compiler(), "-shared", *map(str, objects), "-ldl", "-o"], library)
    return library


def _run(command: list[str], target: Path) -> None:
    """Runs the command with a temporary name for `target`: what is there is whole."""
    partial = target.with_name(f"{target.name}.partial")
    done = subprocess.run([*command, str(partial)], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    partial.replace(target)


class Library:
    """A shared library with the emulation in it, and the switches of the machine that it stands for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.cuda_emulation_add_buffer.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.functions.cuda_emulation_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.functions.cuda_emulation_counts.restype = ctypes.POINTER(ctypes.c_uint64)

    def counts(self) -> dict[str, int]:
        """What ran since the module was loaded."""
        names = ("launches", "blocks", "barriers", "warp_operations", "accesses")
        return dict(zip(names, self.functions.cuda_emulation_counts()[:5], strict=True))

    def set_order(self, order: Literal["ascending", "descending", "shuffled"], seed: int = 0) -> None:
        """The order in which blocks, warps and the lanes of a warp run."""
        self.functions.cuda_emulation_set_order(ORDERS[order], seed)

    def allow(self, tensor: Tensor) -> None:
        """Kernels may touch the tensor from its first to its last element."""
        if tensor.numel() > 0:
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in sizes)
            self.functions.cuda_emulation_add_buffer(tensor.data_ptr(), extent * tensor.element_size())

    def forget(self) -> None:
        """No tensor may be touched any longer."""
        self.functions.cuda_emulation_forget_buffers()

    def with_place(self, message: str) -> str:
        """The message with the offset of an instruction as file and line."""
        found = re.search(r"@(\d+)", message)
        if found is None or shutil.which("addr2line") is None:
            return message
        # the return address is that of the next instruction
        command = ["addr2line", "-e", str(self.path), "-s", hex(int(found[1]) - 1)]
        place = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return message.replace(found[0], f"at {place}")


class Emulator(Library):
    """The compiled module, and the way to send the ops through it."""

    def __init__(self, path: Path) -> None:
        # a name of its own: pybind11 gives one module per name
        spec = importlib.util.spec_from_file_location(f"emulated_{path.parent.name}._C", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        super().__init__(path)

        # the arguments are those of `pixelgen_kernels._C.connect`
        self.module.connect(torch.Tensor.__dlpack_c_exchange_api__, lambda: 1, torch.OutOfMemoryError)

    def native(self, name: str) -> Callable[..., None] | None:
        """The function of that name, or None where the CUDA sources have none."""
        function = getattr(self.module, name, None)
        if function is None:
            return None

        def call(*args: Any) -> None:
            for arg in args:
                if isinstance(arg, Tensor):
                    self.allow(arg)
            try:
                function(*args)
            except RuntimeError as error:
                raise RuntimeError(self.with_place(str(error))) from None
            finally:
                self.forget()

        return call

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Ops run as on a GPU. Fresh tensors hold NaN, so that what a kernel leaves out shows."""
        kernels = [kernel for op in OPS.values() for kernel in (op.call.fwd, op.call.bwd) if kernel]
        was = [kernel.native for kernel in kernels]
        try:
            for kernel in kernels:
                kernel.native = self.native(kernel.name)
            with poisoned():
                yield
        finally:
            for kernel, native in zip(kernels, was, strict=True):
                kernel.native = native
