"""SwiGLU on a packed projection in Triton. See `pixelgen_kernels.swiglu` for the equation.

Bound by bytes: forward reads 2 F and writes F values a row, backward reads 3 F and writes 2 F. One program
per tile of rows and columns, every value is read once. Accesses have 128 bits where F is a multiple of 16,
as in B/16 (2048) and XL/16 (3072); in L/16 (2730) the halves of a row are not aligned.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # values of a tile per operand: 16 for each of the 128 threads, two 128-bit loads in bf16
_MAX_BLOCK_F = 1024


@triton.jit
def _swiglu_fwd_kernel(
    x_ptr,  # (outer, inner, 2 F)
    y_ptr,  # (outer * inner, F), dense
    num_rows,
    inner,
    F,
    x_outer_stride,
    x_inner_stride,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask = (rows < num_rows)[:, None] & (cols < F)[None, :]  # [BLOCK_ROWS, BLOCK_F]
    x_rows = (rows // inner) * x_outer_stride + (rows % inner) * x_inner_stride
    x_tile = x_ptr + x_rows[:, None] + cols[None, :]
    a = tl.load(x_tile, mask=mask, other=0.0).to(DTYPE)
    b = tl.load(x_tile + F, mask=mask, other=0.0).to(DTYPE)
    y = a * tl.sigmoid(a) * b
    tl.store(y_ptr + (rows * F)[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    grad_y_ptr,  # (outer, inner, F)
    x_ptr,  # (outer, inner, 2 F)
    grad_x_ptr,  # (outer * inner, 2 F), dense
    num_rows,
    inner,
    F,
    grad_y_outer_stride,
    grad_y_inner_stride,
    grad_y_col_stride,
    x_outer_stride,
    x_inner_stride,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask = (rows < num_rows)[:, None] & (cols < F)[None, :]  # [BLOCK_ROWS, BLOCK_F]
    x_rows = (rows // inner) * x_outer_stride + (rows % inner) * x_inner_stride
    x_tile = x_ptr + x_rows[:, None] + cols[None, :]
    a = tl.load(x_tile, mask=mask, other=0.0).to(DTYPE)
    b = tl.load(x_tile + F, mask=mask, other=0.0).to(DTYPE)
    grad_rows = (rows // inner) * grad_y_outer_stride + (rows % inner) * grad_y_inner_stride
    grad_tile = grad_y_ptr + grad_rows[:, None] + (cols.to(tl.int64) * grad_y_col_stride)[None, :]
    g = tl.load(grad_tile, mask=mask, other=0.0).to(DTYPE)
    s = tl.sigmoid(a)
    grad_a = g * b * s * (1 + a * (1 - s))
    grad_b = g * a * s
    out_tile = grad_x_ptr + (rows * (2 * F))[:, None] + cols[None, :]
    tl.store(out_tile, grad_a.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(out_tile + F, grad_b.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _as_three_dims(x: Tensor) -> Tensor:
    """(outer, inner, C) view of (..., C)."""
    return x.flatten(0, -3) if x.ndim > 3 else x.view((1,) * (3 - x.ndim) + tuple(x.shape))


def _grid_and_arguments(packed: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """Grid, sizes (num_rows, inner, F) and constants of a launch."""
    num_rows, inner, F = packed.shape[0] * packed.shape[1], packed.shape[1], packed.shape[2] // 2
    block_f = min(triton.next_power_of_2(F), _MAX_BLOCK_F)
    block_rows = max(1, _TILE // block_f)
    options = {
        "DTYPE": tl.float64 if packed.dtype == torch.float64 else tl.float32,
        "BLOCK_ROWS": block_rows,
        "BLOCK_F": block_f,
        "enable_fp_fusion": True,  # Triton's default changes between versions
    }
    return (triton.cdiv(num_rows, block_rows), triton.cdiv(F, block_f)), (num_rows, inner, F), options


def launch_swiglu_fwd(x: Tensor) -> Tensor:
    """y (..., F) from x (..., 2 F), which is not empty."""
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    packed = _as_three_dims(x)
    grid, sizes, options = _grid_and_arguments(packed)
    _swiglu_fwd_kernel[grid](packed, y, *sizes, *packed.stride()[:2], **options)
    return y


def launch_swiglu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    """grad_x (..., 2 F) from grad_y (..., F), of any strides (autograd may expand it), and x, not empty."""
    grad_x = x.new_empty(x.shape)
    packed = _as_three_dims(x)
    grid, sizes, options = _grid_and_arguments(packed)
    grad = grad_y.reshape(*packed.shape[:2], -1)
    strides = (*grad.stride(), *packed.stride()[:2])
    _swiglu_bwd_kernel[grid](grad, packed, grad_x, *sizes, *strides, **options)
    return grad_x
