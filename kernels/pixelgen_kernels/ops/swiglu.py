"""SwiGLU on a packed projection: the first half of the channels, through SiLU, gates the second half.

    y = a * sigmoid(a) * b        (a, b) = the halves of x     (arXiv 2002.05202)

Arithmetic in fp32 (fp64 for fp64), one rounding at the end.
"""

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import ROWS, Draw, Inputs, ModelShape, per_model
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register, rows_collapse
from pixelgen_kernels.registry import Op


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


def _empty(x: Tensor) -> Tensor:
    *leading, channels = x.shape
    return x.new_empty(*leading, channels // 2)


_swiglu = register("swiglu", swiglu_ref, swiglu_bwd_ref, empty=_empty, outputs=("y",), triton="swiglu_triton")


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
    checks.rows("swiglu", x=x)
    shape = x.shape
    if not shape or shape[-1] == 0 or shape[-1] % 2:
        raise ValueError(f"swiglu: x must have shape (..., 2 F) with F >= 1, got {tuple(x.shape)}")
    if len(shape) > 3 and x.numel() and not rows_collapse(x, 2):
        raise ValueError(
            f"swiglu: x must be viewable with all but the last two dimensions as one, "
            f"got shape {tuple(x.shape)} with strides {tuple(x.stride())}"
        )
    return _swiglu(x)


def _inputs(draw: Draw, shape: tuple[int, ...]) -> Inputs:
    return {"x": draw(*shape)}


def _in_a_block(B: int, model: ModelShape) -> tuple[str, tuple[int, ...], Inputs]:
    """On the packed projection of width 2 F, F = 2/3 of 4 C."""
    F = 8 * model.C // 3
    return f"B={B} T={model.T} F={F}", (B, model.T, 2 * F), {}


Op(
    fused=swiglu,
    eager=swiglu_ref,
    call=_swiglu,
    differentiable=("x",),
    inputs=_inputs,
    shapes=((1, 1, 2), (3, 7, 26), (2,), (2, 5, 600), (2, 256, 4096), (2, 3, 5, 6), (0, 4, 8)),
    small=(2, 3, 8),
    layouts=ROWS,
    benchmarks=per_model(_in_a_block),
)
