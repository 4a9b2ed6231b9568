"""Norm and modulation of pixels in Triton. See `pixelgen_kernels.pixel_modulate` for the equation.

Bound by bytes: of the 6 d values of a pixel's modulation forward reads 2 d and backward writes as many. One
program per tile of pixels in forward, per few tiles in backward, whose share of the gradient of the weight
stays in registers until the last one.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.fused import dense, rows
from pixelgen_kernels.ops.pixel_modulate import pixel_modulate_bwd_ref, pixel_modulate_fwd_ref

_BLOCK_P = 64  # pixels of a tile: with 16 channels 8 values for each of the 128 threads, 128 bits in bf16
_MAX_PROGRAMS = 2048  # of those that add up gradients of weights; 15 for each multiprocessor of an H200
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 512, 16, 16


@triton.jit
def load(ptr, offsets, mask):
    """In fp32."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, offsets, values, mask):
    """In the dtype of the memory."""
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def offsets_of(pixels, row_stride, pixel_stride, Q: tl.constexpr, STRIDE_UNIT: tl.constexpr):
    """[pixels, 1]: where these pixels of a tensor (R, Q, any) begin; the strides are in units."""
    return ((pixels // Q * row_stride + pixels % Q * pixel_stride) * STRIDE_UNIT)[:, None]


@triton.jit
def sum_of_pixels(values):
    """[1, columns] of [pixels, columns]: the sums of few sums, which rounds less than one long one."""
    groups = tl.reshape(values, (8, values.shape[0] // 8, values.shape[1]))
    return tl.sum(tl.sum(groups, 0), 0)[None, :]


@triton.jit
def _pixel_modulate_fwd_kernel(
    x_ptr,  # (R, Q, D)
    modulation_ptr,  # (R, Q, 6 D)
    weight_ptr,  # (D,)
    normed_ptr,  # (R, Q, D), dense
    num_pixels,  # R Q
    x_row_stride,  # strides in units of STRIDE_UNIT values
    x_pixel_stride,
    modulation_row_stride,
    modulation_pixel_stride,
    Q: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pixels = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (pixels < num_pixels)[:, None] & (cols < D)  # [BLOCK_P, BLOCK_D]
    x = load(x_ptr, offsets_of(pixels, x_row_stride, x_pixel_stride, Q, STRIDE_UNIT) + cols, mask)
    packed = offsets_of(pixels, modulation_row_stride, modulation_pixel_stride, Q, STRIDE_UNIT) + cols
    shift = load(modulation_ptr, packed, mask)
    scale = load(modulation_ptr, packed + D, mask)
    weight = load(weight_ptr, cols, cols < D)
    rstd = tl.rsqrt(tl.sum(x * x, 1) * (1 / D) + EPS)[:, None]
    store(normed_ptr, pixels[:, None] * D + cols, x * rstd * weight * (1 + scale) + shift, mask)


@triton.jit
def _pixel_modulate_bwd_kernel(
    grad_normed_ptr,  # (R, Q, D)
    x_ptr,  # (R, Q, D)
    modulation_ptr,  # (R, Q, 6 D)
    weight_ptr,  # (D,)
    grad_x_ptr,  # (R, Q, D), dense
    grad_modulation_ptr,  # (R, Q, 6 D), dense, maybe that of modulation
    partials_ptr,  # (programs, D)
    num_pixels,  # R Q
    grad_normed_row_stride,  # strides in units of STRIDE_UNIT values
    grad_normed_pixel_stride,
    x_row_stride,
    x_pixel_stride,
    modulation_row_stride,
    modulation_pixel_stride,
    Q: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    FILL: tl.constexpr,  # whether the kinds that are not read get zeros
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)[None, :]
    weight = load(weight_ptr, cols, cols < D)
    grad_weight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for i in range(TILES):
        pixels = (tl.program_id(0).to(INDEX) * TILES + i) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask = (pixels < num_pixels)[:, None] & (cols < D)  # [BLOCK_P, BLOCK_D]
        upstream = offsets_of(pixels, grad_normed_row_stride, grad_normed_pixel_stride, Q, STRIDE_UNIT)
        packed = offsets_of(pixels, modulation_row_stride, modulation_pixel_stride, Q, STRIDE_UNIT)
        g = load(grad_normed_ptr, upstream + cols, mask)
        n = load(x_ptr, offsets_of(pixels, x_row_stride, x_pixel_stride, Q, STRIDE_UNIT) + cols, mask)
        scale = load(modulation_ptr, packed + D + cols, mask)
        tl.debug_barrier()  # the gradient may be written over what another thread reads
        rstd = tl.rsqrt(tl.sum(n * n, 1) * (1 / D) + EPS)[:, None]
        n *= rstd
        h = g * (1 + scale)
        grad_weight += h * n
        grad_n = h * weight
        mean = (tl.sum(grad_n * n, 1) * (1 / D))[:, None]
        store(grad_x_ptr, pixels[:, None] * D + cols, rstd * (grad_n - n * mean), mask)
        packed = pixels[:, None] * (6 * D) + cols
        store(grad_modulation_ptr, packed, g, mask)
        store(grad_modulation_ptr, packed + D, g * n * weight, mask)
        if FILL:
            for kind in tl.static_range(2, 6):
                store(grad_modulation_ptr, packed + kind * D, tl.zeros_like(g), mask)
    tl.store(partials_ptr + tl.program_id(0) * D + cols, sum_of_pixels(grad_weight), mask=cols < D)


@triton.jit
def _sum_kernel(
    partials_ptr,  # (num_partials, size), rows of `stride` values
    sums_ptr,  # (size,)
    num_partials,
    stride,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0
    while first < num_partials:  # `range` of an argument is beyond the interpreter of Triton 3.6
        partials = first + tl.arange(0, ROWS)[:, None]
        mask = (partials < num_partials) & (cols < size)
        total += tl.load(partials_ptr + partials.to(tl.int64) * stride + cols, mask=mask, other=0.0)
        first += ROWS
    store(sums_ptr, cols, tl.sum(total, 0)[None, :], cols < size)


def sum_partials(partials: Tensor, sums: tuple[Tensor, ...]) -> None:
    """Adds up what every program has found, always in one order.

    Args:
        partials: (programs, n) float32.
        sums: dense tensors of n values together, in the order of the columns; they are written.
    """
    begin = 0
    for out in sums:
        size = out.numel()
        _sum_kernel[(triton.cdiv(size, _SUM_COLUMNS),)](
            partials[:, begin:],
            out,
            *(*partials.shape, size),
            ROWS=_SUM_ROWS,
            COLUMNS=_SUM_COLUMNS,
            num_warps=_SUM_WARPS,
        )
        begin += size


def grid_and_strides(block_p: int, x: Tensor, *others: Tensor) -> tuple[int, list[int], dict[str, Any]]:
    """Number of tiles of block_p pixels, strides (row, pixel) of these tensors (R, Q, any), and constants."""
    R, Q, D = x.shape
    num_tiles = triton.cdiv(R * Q, block_p)
    strides = [stride for tensor in (x, *others) for stride in tensor.stride()[:2]]
    unit = math.gcd(16, *strides)
    constants = {
        "Q": Q,  # as constants, Q and D are part of the addresses, and Triton can tell that rows of 16 values
        "D": D,  # keep 128-bit accesses aligned; with the unit, of strides too
        "STRIDE_UNIT": unit,
        "INDEX": tl.int32 if _reach(x, *others, tiles=num_tiles, block_p=block_p) < 2**31 else tl.int64,
        "BLOCK_P": block_p,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "enable_fp_fusion": True,  # Triton's default changes between versions
    }
    return num_tiles, [stride // unit for stride in strides], constants


def _reach(*tensors: Tensor, tiles: int, block_p: int) -> int:
    """No number that is made on the way to an address is above this; masked pixels are counted too."""
    programs_share = tiles + tiles_of_a_program(tiles)
    R = tensors[0].shape[0] + programs_share * block_p // tensors[0].shape[1]
    strided = max(R * tensor.stride(0) + tensor.shape[1] * tensor.stride(1) for tensor in tensors)
    return max(strided, programs_share * block_p * max(tensor.shape[2] for tensor in tensors))


def tiles_of_a_program(num_tiles: int) -> int:
    """By the shape alone: by the device, gradients would differ in their last bits between two of them."""
    return triton.cdiv(num_tiles, _MAX_PROGRAMS)


def launch_pixel_modulate_fwd(x: Tensor, modulation: Tensor, weight: Tensor, eps: float) -> Tensor:
    """normed (R, Q, d), dense, from x (R, Q, d), which is not empty, and modulation (R, Q, 6 d)."""
    if x.dtype == torch.float64:  # not worth kernels of its own
        return pixel_modulate_fwd_ref(x, modulation, weight, eps).contiguous()
    normed = dense(x)
    tiles, strides, constants = grid_and_strides(_BLOCK_P, x, modulation)
    num_pixels = x.shape[0] * x.shape[1]
    _pixel_modulate_fwd_kernel[(tiles,)](
        x, modulation, weight.contiguous(), normed, num_pixels, *strides, EPS=eps, **constants
    )
    return normed


def launch_pixel_modulate_bwd(
    grad_normed: Tensor,
    x: Tensor,
    modulation: Tensor,
    weight: Tensor,
    eps: float,
    outputs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, modulation and weight, dense; into `outputs`, shift and scale alone are written.

    There the gradient of the modulation may be the modulation itself. x is not empty.
    """
    if x.dtype == torch.float64:
        assert outputs is None, "float64 is not handed over"
        gradients = pixel_modulate_bwd_ref(grad_normed, x, modulation, weight, eps)
        return tuple(gradient.contiguous() for gradient in gradients)  # type: ignore[return-value]
    grad_x, grad_modulation, grad_weight = outputs or (dense(x), dense(modulation), dense(weight))
    grad_normed = rows(grad_normed)
    num_tiles, strides, constants = grid_and_strides(_BLOCK_P, grad_normed, x, modulation)
    tiles = tiles_of_a_program(num_tiles)
    programs = triton.cdiv(num_tiles, tiles)
    partials = x.new_empty(programs, x.shape[2], dtype=torch.float32)
    _pixel_modulate_bwd_kernel[(programs,)](
        *(grad_normed, x, modulation, weight.contiguous()),
        *(grad_x, grad_modulation, partials),
        x.shape[0] * x.shape[1],
        *strides,
        EPS=eps,
        FILL=outputs is None,
        TILES=tiles,
        **constants,
    )
    sum_partials(partials, (grad_weight,))
    return grad_x, grad_modulation, grad_weight
