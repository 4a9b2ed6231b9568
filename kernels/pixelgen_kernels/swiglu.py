"""SwiGLU on a packed projection: the first half of the channels, through SiLU, gates the second half.

    y = a * sigmoid(a) * b        (a, b) = the halves of x     (arXiv 2002.05202)

Arithmetic in fp32 (fp64 for fp64), one rounding at the end.
"""

from itertools import pairwise

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_dense_rows,
    check_float_tensors,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)
from pixelgen_kernels.native import _C, address, dtype_tag, launch

__all__ = ["swiglu", "swiglu_bwd_ref", "swiglu_ref"]


def swiglu_ref(x: Tensor) -> Tensor:
    """Plain PyTorch definition of `swiglu`."""
    a, b = x.to(stats_dtype(x)).chunk(2, -1)
    return (a * a.sigmoid() * b).to(x.dtype)


def swiglu_bwd_ref(grad_y: Tensor, x: Tensor) -> Tensor:
    """With s = sigmoid(a): grad_a = grad_y * b * s * (1 + a (1 - s)), grad_b = grad_y * a * s, packed."""
    dtype = stats_dtype(x)
    a, b = x.to(dtype).chunk(2, -1)
    g, s = grad_y.to(dtype), a.sigmoid()
    return torch.cat((g * b * s * (1 + a * (1 - s)), g * a * s), -1).to(x.dtype)


@torch.library.custom_op("pixelgen::swiglu_fwd", mutates_args=())
def _fwd(x: Tensor) -> Tensor:
    return swiglu_ref(x).contiguous()


@torch.library.custom_op("pixelgen::swiglu_bwd", mutates_args=())
def _bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    return swiglu_bwd_ref(grad_y, x).contiguous()


def _leading_collapse(x: Tensor) -> bool:
    """Whether the dimensions of x before the last two are evenly spaced: x is an (outer, inner, C) view."""
    leading = [(x.shape[dim], x.stride(dim)) for dim in range(x.ndim - 2) if x.shape[dim] > 1]
    return all(a[1] == b[0] * b[1] for a, b in pairwise(leading))


def _three_dims(x: Tensor) -> Tensor:
    """X, whose leading dimensions collapse and which is not empty, as (outer, inner, C); a view."""
    if x.ndim == 3:
        return x
    inner = x.shape[-2] if x.ndim > 1 else 1
    return x.view(-1, inner, x.shape[-1])


@_fwd.register_kernel("cpu")
def _(x: Tensor) -> Tensor:
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if y.numel() > 0:
        rows = _three_dims(x)
        _C.swiglu_fwd(
            x=address(x),
            y=address(y),
            num_outer=rows.shape[0],
            num_inner=rows.shape[1],
            F=y.shape[-1],
            x_outer_stride=rows.stride(0),
            x_inner_stride=rows.stride(1),
            dtype=dtype_tag(x),
            **launch(x),
        )
    return y


@_bwd.register_kernel("cpu")
def _(grad_y: Tensor, x: Tensor) -> Tensor:
    grad_x = x.new_empty(x.shape)
    if grad_x.numel() == 0:
        return grad_x
    if not (grad_y.stride(-1) == 1 and _leading_collapse(grad_y)):
        grad_y = grad_y.contiguous()  # a gradient that was expanded from fewer numbers
    rows, grad_rows = _three_dims(x), _three_dims(grad_y)
    _C.swiglu_bwd(
        grad_y=address(grad_y),
        x=address(x),
        grad_x=address(grad_x),
        num_outer=rows.shape[0],
        num_inner=rows.shape[1],
        F=grad_y.shape[-1],
        grad_y_outer_stride=grad_rows.stride(0),
        grad_y_inner_stride=grad_rows.stride(1),
        x_outer_stride=rows.stride(0),
        x_inner_stride=rows.stride(1),
        dtype=dtype_tag(x),
        **launch(x),
    )
    return grad_x


# The Triton modules are imported when first needed: a machine without a GPU may have no triton.
@_fwd.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    from pixelgen_kernels.triton_kernels.swiglu import launch_swiglu_fwd

    with torch.cuda.device_of(x):
        return launch_swiglu_fwd(x)


@_bwd.register_kernel("cuda")
def _(grad_y: Tensor, x: Tensor) -> Tensor:
    from pixelgen_kernels.triton_kernels.swiglu import launch_swiglu_bwd

    with torch.cuda.device_of(x):
        return launch_swiglu_bwd(grad_y, x)


@_fwd.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_bwd.register_fake
def _(grad_y, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return _bwd(grad_y, *ctx.saved_tensors)


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "swiglu")


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of the channels times the second half (arXiv 2002.05202).

    Args:
        x: (..., 2 F), at least one dimension, F >= 1, any floating dtype. The last dimension is contiguous;
            up to three dimensions may have any other strides, of more than three all but the last two must
            collapse into one.

    Returns:
        (..., F) in the dtype of x, dense.

    Raises:
        TypeError: x is not a tensor of a floating dtype.
        ValueError: the shape or the strides are not as above.
    """
    check_float_tensors("swiglu", x=x)
    shape = x.shape
    if not shape or shape[-1] == 0 or shape[-1] % 2:
        raise ValueError(f"swiglu: x must have shape (..., 2 F) with F >= 1, got {tuple(x.shape)}")
    check_dense_rows("swiglu", x=x)
    if len(shape) > 3 and x.numel() and not _leading_collapse(x):
        raise ValueError(
            f"swiglu: x must be viewable with all but the last two dimensions as one, "
            f"got shape {tuple(x.shape)} with strides {tuple(x.stride())}"
        )
    return _differentiable_fwd(x)
