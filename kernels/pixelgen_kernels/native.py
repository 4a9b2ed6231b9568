"""The compiled module, connected to Torch."""

from typing import Any

import torch  # before _C: both then share Torch's OpenMP runtime and its thread pool

try:
    from pixelgen_kernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"pixelgen_kernels: the compiled module pixelgen_kernels._C could not be loaded ({error}); "
        "run `pip install .` (or `pip install -e .`) in the repository root, with a C++17 compiler installed"
    ) from error

__all__ = ["FLOAT_DTYPES", "_C", "build_info", "has_cuda"]

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
        nvcc, or None; cuda_archs: devices they were built for, the last one as PTX.
    """
    return _C.build_info()


def has_cuda() -> bool:
    """Whether CUDA kernels were built (a driver and a device may still be missing)."""
    return build_info()["cuda"]
