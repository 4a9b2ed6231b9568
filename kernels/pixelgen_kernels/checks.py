"""Argument checks, used as `checks.shape(...)`: their messages name op, argument, limit and value.

The checks run at every call of every op: what is right passes with few reads of a tensor's attributes, which
are slow, and texts are made only for what is wrong.
"""

from typing import Any

import torch
from torch import Tensor

from pixelgen_kernels.native import _C, FLOAT_DTYPES

MAX_WIDTH = 8192
_MAX_FLOAT32 = torch.finfo(torch.float32).max


def stats_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of statistics and accumulation: float64 when any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def floats(op: str, **tensors: Any) -> None:
    """Raises TypeError for anything that is not a floating tensor, ValueError for tensors on several devices.

    Optional arguments that were left out (None) are for the caller to filter.
    """
    if _have_memory() and _C.are_floats("", *tensors.values()):
        return
    device: torch.device | None = None
    first = ""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        strided(op, name, value)
        if device is None:
            device, first = value.device, name
        elif value.device != device:
            raise ValueError(f"{op}: {name} must be on the device of {first} ({device}), got {value.device}")


def strided(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for sparse, mkldnn and nested tensors, which have no strides."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{op}: {name} must be a strided tensor, got {got}")


def ndim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raises ValueError unless `tensor` has one dimension per letter, for example "B, T, C"."""
    if tensor.ndim != len(letters.split(",")):
        raise ValueError(f"{op}: {name} must have shape ({letters}), got {tuple(tensor.shape)}")


def shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raises ValueError unless `tensor` has exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape ({letters}) = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def _have_memory() -> bool:
    """Whether tensors may be read where they lie: in a graph and under a dispatch mode they may be fake."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def are_rows(shapes: str, *tensors: Any) -> bool:
    """Whether `rows` passes, and shapes are such as "BTC BC|BTC? =": see csrc/bindings.cpp.

    A quick yes, before checks that find out what is wrong; no where tensors may have no memory.
    """
    return _have_memory() and _C.are_rows(shapes, *tensors)


def rows(op: str, **tensors: Any) -> None:
    """`floats`, and ValueError unless the last dimensions are contiguous."""
    if are_rows("", *tensors.values()):
        return
    floats(op, **tensors)
    dense_rows(op, **tensors)


def dense_rows(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless the last dimension is contiguous; the others may be strided. Skips None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} must be contiguous in its last dimension, got strides {tuple(tensor.stride())}"
            )


def positive(op: str, name: str, value: float) -> None:
    """Raises TypeError for anything but a number, ValueError unless it is above 0 and fits float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0 < value <= _MAX_FLOAT32:
        expected = "a number that float32 holds" if 0 < value < float("inf") else "a finite number above 0"
        raise ValueError(f"{op}: {name} must be {expected}, got {value}")


def choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def integer(op: str, name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    """Raises TypeError for anything but an int, ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")


def norm_values(op: str, x: Tensor, norm: str, eps: float) -> None:
    """The part of `norm_arguments` that is about values and the width."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x must have 1 <= C <= {MAX_WIDTH} channels, got {tuple(x.shape)}")
    choice(op, "norm", norm, ("rms", "layer"))
    positive(op, "eps", eps)


def norm_arguments(
    op: str,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    *,
    modulation_shapes: dict[str, tuple[int, ...]],
) -> None:
    """Checks what the ops that end in a norm with shift and scale share.

    Args:
        op: name of the op.
        x: (..., C), already checked to be a floating tensor.
        shift: of one of `modulation_shapes`, or None.
        scale: as shift, of its shape and dtype; both or neither.
        weight: (C,) or None.
        bias: (C,) in the dtype of weight, or None; needs weight.
        norm: "rms" or "layer".
        eps: above 0.
        modulation_shapes: allowed shapes of shift by their letters, for example {"B, C": (2, 64)}.
    """
    norm_values(op, x, norm, eps)
    named = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    floats(op, x=x, **given)
    dense_rows(op, **given)
    C = x.shape[-1]
    if (shift is None) != (scale is None):
        missing, other = ("shift", "scale") if shift is None else ("scale", "shift")
        raise ValueError(f"{op}: {missing} must be given when {other} is, got None")
    if bias is not None and weight is None:
        raise ValueError(f"{op}: weight must be given when bias is, got None")
    if shift is not None and scale is not None:
        if shift.shape not in modulation_shapes.values():
            allowed = " or ".join(f"({letters}) = {shape}" for letters, shape in modulation_shapes.items())
            raise ValueError(f"{op}: shift must have shape {allowed}, got {tuple(shift.shape)}")
        shape(op, "scale", scale, shift.shape, "the shape of shift")
        if scale.dtype != shift.dtype:
            raise TypeError(f"{op}: scale must have the dtype of shift, {shift.dtype}, got {scale.dtype}")
    if weight is not None:
        shape(op, "weight", weight, (C,), "C,")
        if bias is not None:
            shape(op, "bias", bias, (C,), "C,")
            if bias.dtype != weight.dtype:
                raise TypeError(f"{op}: bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
