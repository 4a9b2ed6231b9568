"""What several ops share, above all argument checks: their messages name op, argument, limit and value.

The checks run at every call of every op: what is right passes with few reads of a tensor's attributes, which
are slow, and texts are made only for what is wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pixelgen_kernels.native import FLOAT_DTYPES

MAX_WIDTH = 8192
_MAX_FLOAT32 = torch.finfo(torch.float32).max


def stats_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of statistics and accumulation: float64 when any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def check_float_tensors(op: str, **tensors: Any) -> None:
    """Raises TypeError for anything that is not a floating tensor, ValueError for tensors on several devices.

    Optional arguments that were left out (None) are for the caller to filter.
    """
    device: torch.device | None = None
    first = ""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        check_strided(op, name, value)
        if device is None:
            device, first = value.device, name
        elif value.device != device:
            raise ValueError(f"{op}: {name} must be on the device of {first} ({device}), got {value.device}")


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for sparse, mkldnn and nested tensors, which have no strides."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{op}: {name} must be a strided tensor, got {got}")


def check_ndim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raises ValueError unless `tensor` has one dimension per letter, for example "B, T, C"."""
    if tensor.ndim != len(letters.split(",")):
        raise ValueError(f"{op}: {name} must have shape ({letters}), got {tuple(tensor.shape)}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raises ValueError unless `tensor` has exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape ({letters}) = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_dense_rows(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless the last dimension is contiguous; the others may be strided. Skips None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} must be contiguous in its last dimension, got strides {tuple(tensor.stride())}"
            )


def check_positive(op: str, name: str, value: float) -> None:
    """Raises TypeError for anything but a number, ValueError unless it is above 0 and fits float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0 < value <= _MAX_FLOAT32:
        expected = "a number that float32 holds" if 0 < value < float("inf") else "a finite number above 0"
        raise ValueError(f"{op}: {name} must be {expected}, got {value}")


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_int(op: str, name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    """Raises TypeError for anything but an int, ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")


def check_norm_arguments(
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
    C = x.shape[-1]
    if not 1 <= C <= MAX_WIDTH:
        raise ValueError(f"{op}: x must have 1 <= C <= {MAX_WIDTH} channels, got {tuple(x.shape)}")
    check_choice(op, "norm", norm, ("rms", "layer"))
    check_positive(op, "eps", eps)
    device = x.device
    for name, tensor in (("shift", shift), ("scale", scale), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype not in FLOAT_DTYPES
            or tensor.device != device
            or tensor.layout is not torch.strided
            or tensor.is_nested
        ):
            check_float_tensors(op, x=x, **{name: tensor})
        if tensor.ndim and tensor.stride(-1) != 1:
            check_dense_rows(op, **{name: tensor})
    if (shift is None) != (scale is None):
        missing, other = ("shift", "scale") if shift is None else ("scale", "shift")
        raise ValueError(f"{op}: {missing} must be given when {other} is, got None")
    if bias is not None and weight is None:
        raise ValueError(f"{op}: weight must be given when bias is, got None")
    if shift is not None and scale is not None:
        if shift.shape not in modulation_shapes.values():
            allowed = " or ".join(f"({letters}) = {shape}" for letters, shape in modulation_shapes.items())
            raise ValueError(f"{op}: shift must have shape {allowed}, got {tuple(shift.shape)}")
        check_shape(op, "scale", scale, shift.shape, "the shape of shift")
        if scale.dtype != shift.dtype:
            raise TypeError(f"{op}: scale must have the dtype of shift, {shift.dtype}, got {scale.dtype}")
    if weight is not None:
        check_shape(op, "weight", weight, (C,), "C,")
        if bias is not None:
            check_shape(op, "bias", bias, (C,), "C,")
            if bias.dtype != weight.dtype:
                raise TypeError(f"{op}: bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")


def copy_like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` in the dtype and memory layout of `torch.empty_like(tensor)`, which a fake can tell."""
    return torch.empty_like(tensor).copy_(values)


def refuse_double_backward(bwd: Any, op: str) -> None:
    """Gives a backward op an autograd formula that raises, so that second derivatives are never wrong."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{op}: double backward is not supported; pixelgen_kernels.select('eager') has it")

    bwd.register_autograd(backward)


def register_autograd(
    fwd: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Gives an op its autograd formula, and returns what its public function calls.

    The op is differentiable itself, and compiled code calls it. But where a gradient is wanted it reads its
    own schema at every call, which takes as long as all the rest of the overhead. What is returned records
    the same formula without that.
    """
    fwd.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        output = fwd(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(fwd._name, (torch.autograd.Function,), members)

    op = fwd._name.removesuffix("_fwd")

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return fwd(*args)
        # a formula for the backward pass alone would give tangents of zero
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{op}: torch.func and forward-mode derivatives are not supported; "
                f"pixelgen_kernels.select('eager') has them"
            )
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return function.apply(*args)
        return fwd(*args)

    return call
