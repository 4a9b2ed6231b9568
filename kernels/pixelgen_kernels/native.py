"""The compiled module, and what every op needs to call it: dtype tags, addresses, where to run."""

from typing import Any

import torch  # before _C: both then share Torch's OpenMP runtime and its thread pool
from torch import Tensor

try:
    from pixelgen_kernels import _C
except ImportError as error:
    raise ImportError(
        f"pixelgen_kernels: the compiled module pixelgen_kernels._C could not be loaded ({error}); "
        "run `pip install .` (or `pip install -e .`) in the repository root, with a C++17 compiler installed"
    ) from error

__all__ = [
    "FLOAT_DTYPES",
    "_C",
    "address",
    "build_info",
    "dtype_tag",
    "has_cuda",
    "launch",
]

# The order is that of `enum class DType` in csrc/common.h.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TAGS = {dtype: tag for tag, dtype in enumerate(FLOAT_DTYPES)}


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
    return _C.has_cuda


def dtype_tag(tensor: Tensor | None) -> int:
    """The compiled module's number for the dtype of `tensor`; 0 for None."""
    return 0 if tensor is None else _TAGS[tensor.dtype]


def address(tensor: Tensor | None) -> int:
    """Address of the first element on its device; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def launch(tensor: Tensor) -> dict[str, int]:
    """Keyword arguments that say where a compiled function runs: device and current stream of the tensor."""
    if tensor.is_cuda:
        device = tensor.get_device()
        return {"device": device, "stream": torch.cuda.current_stream(device).cuda_stream, "num_threads": 0}
    return {"device": -1, "stream": 0, "num_threads": torch.get_num_threads()}
