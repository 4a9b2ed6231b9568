"""The compiled module, connected to Torch."""

import ctypes
import functools
import warnings
from typing import Any

import torch  # before _C: both then share Torch's OpenMP runtime and its thread pool

try:
    from pixelgen_kernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"pixelgen_kernels: the compiled module pixelgen_kernels._C could not be loaded ({error}); "
        "run `pip install .` (or `pip install -e .`) in the repository root, with a C++17 compiler installed"
    ) from error

__all__ = ["FLOAT_DTYPES", "_C", "build_info", "check_cuda", "has_cuda"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _connect() -> None:
    """Gives _C the table by which Torch shows its tensors (DLPack's exchange table, major version 1).

    Raises:
        ImportError: this Torch has no such table, or one of another major version.
    """
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        raise ImportError(
            f"pixelgen_kernels: torch {torch.__version__} has no torch.Tensor.__dlpack_c_exchange_api__, by "
            "which the compiled kernels read tensors; install torch 2.11 or newer"
        )
    try:
        _C.connect(table, torch.get_num_threads, torch.OutOfMemoryError)
    except ImportError as error:
        raise ImportError(f"pixelgen_kernels: torch {torch.__version__} does not fit: {error}") from None


_connect()


def build_info() -> dict[str, Any]:
    """What the compiled module holds.

    Returns:
        version: of the package; compiler: of the C++ code; cpu_isas: instruction sets it was compiled for;
        cpu_isa: the one in use on this processor; openmp: whether CPU ops run on several threads;
        cuda: whether CUDA kernels were built (a driver and a device may still be missing); cuda_version: of
        nvcc, or None; cuda_archs: what they were built for, "sm_90" for devices of compute capability 9.0,
        "compute_120" for PTX, which the driver compiles for 12.0 and newer.
    """
    return _C.build_info()


def has_cuda() -> bool:
    """Whether CUDA kernels were built (a driver and a device may still be missing)."""
    return build_info()["cuda"]


@functools.cache
def check_cuda() -> None:
    """Warns, once in a process, where CUDA kernels were not built or cannot run on the current device."""
    built = build_info()
    if built["cuda"]:
        problem = _misfit(built, _driver_version(), torch.cuda.get_device_capability())
    else:
        problem = (
            "this build has no CUDA kernels: on a GPU all ops but those in Triton run as eager references; "
            "install the CUDA toolkit, then run `PIXELGEN_CUDA=ON pip install .`"
        )
    if problem is not None:
        warnings.warn(f"pixelgen_kernels: {problem} in the repository root", RuntimeWarning, stacklevel=2)


def _driver_version() -> int:
    """The newest version of CUDA that the driver knows, 13000 for 13.0."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _misfit(built: dict[str, Any], driver: int, device: tuple[int, int]) -> str | None:
    """Why the CUDA kernels of `built` cannot run on a device of this compute capability, and what to do."""
    major, minor = map(int, built["cuda_version"].split(".")[:2])
    archs = ", ".join(built["cuda_archs"])
    what = f"its CUDA kernels were built by nvcc {major}.{minor} for {archs}"
    known = f"CUDA {driver // 1000}.{driver % 1000 // 10}"
    if driver // 1000 < major:
        return (
            f"{what} and fail, as the driver knows {known} at most; update the driver, or set CUDA_HOME to a "
            "toolkit that is no newer and run `PIXELGEN_CUDA=ON pip install .`"
        )
    # Within a major version any driver runs machine code (sm), but none compiles PTX (compute) that is newer.
    reads_ptx = driver >= 1000 * major + 10 * minor
    for kind, name in (arch.split("_") for arch in built["cuda_archs"]):
        code = divmod(int(name.rstrip("af")), 10)
        is_newer = device >= code
        is_kin = device == code or (device[0] == code[0] and not name.endswith("a"))
        if is_newer and (is_kin if kind == "sm" else reads_ptx):
            return None
    return (
        f"{what}, none of which runs on an sm_{device[0]}{device[1]} with a driver that knows {known}; "
        "on this machine run `PIXELGEN_CUDA=ON PIXELGEN_CUDA_ARCHS=native pip install .`"
    )
