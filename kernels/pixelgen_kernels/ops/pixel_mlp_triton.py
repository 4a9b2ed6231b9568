"""Residual, norm, modulation and MLP of pixels in Triton. See `pixelgen_kernels.pixel_mlp` for the equations.

Bound by bytes: forward reads x, y and four kinds of the modulation and writes out. A program loads the
weights once, then goes through a few tiles of pixels. The products are of fp32 values on tensor cores, each
as three of TF32 (https://arxiv.org/abs/2203.03341), which is as exact as fp32; the hidden values stay in
registers.

Backward makes everything again from the inputs, with hidden values in rows and pixels in columns: the weights
are then spread over the warps and not held by each. The gradients of the weights stay in registers until the
last tile of a program; what the programs have found is added up afterwards, always in one order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.fused import dense, rows
from pixelgen_kernels.ops.pixel_mlp import pixel_mlp_bwd_ref, pixel_mlp_fwd_ref
from pixelgen_kernels.ops.pixel_modulate_triton import (
    grid_and_strides,
    load,
    offsets_of,
    store,
    sum_of_pixels,
    sum_partials,
    tiles_of_a_program,
)

# Pixels of a tile: with 16 channels and 64 hidden values backward has 255 registers a thread and spills none.
_FWD_PIXELS, _BWD_PIXELS, _BWD_PIXELS_IF_WIDE = 64, 32, 16
# Padded d F: twice 16 * 64 takes the wide tile, beyond this the weights do not fit into shared memory.
_WIDE, _MAX_WEIGHTS = 1024, 4096


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _kinds(ptr, packed, mask, D: tl.constexpr, NUM_KINDS: tl.constexpr):
    """Factors of the attention, of the norm's output and of the MLP, then what is added to each."""
    if NUM_KINDS == 4:
        attn = 1 + load(ptr, packed, mask)
        attn_offset = load(ptr, packed + D, mask)
        mlp = 1 + load(ptr, packed + 2 * D, mask)
        mlp_offset = load(ptr, packed + 3 * D, mask)
        norm_offset = tl.zeros_like(attn)
        norm = norm_offset + 1
    else:
        attn = load(ptr, packed + 2 * D, mask)
        norm_offset = load(ptr, packed + 3 * D, mask)
        norm = 1 + load(ptr, packed + 4 * D, mask)
        mlp = load(ptr, packed + 5 * D, mask)
        attn_offset = tl.zeros_like(attn)
        mlp_offset = attn_offset
    return attn, norm, mlp, attn_offset, norm_offset, mlp_offset


@triton.jit
def _load_matrix(ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[rows, columns] of a dense (ROWS, COLUMNS), or of the transpose of a dense (COLUMNS, ROWS)."""
    offsets = columns * ROWS + rows if TRANSPOSED else rows * COLUMNS + columns
    return load(ptr, offsets, (rows < ROWS) & (columns < COLUMNS))


@triton.jit
def _pixel_mlp_fwd_kernel(
    x_ptr,  # (R, Q, D), as y
    y_ptr,
    modulation_ptr,  # (R, Q, NUM_KINDS D)
    norm_weight_ptr,  # (D,)
    fc1_weight_ptr,  # (F, D)
    fc1_bias_ptr,  # (F,)
    fc2_weight_ptr,  # (D, F)
    fc2_bias_ptr,  # (D,)
    out_ptr,  # (R, Q, D), dense
    num_pixels,  # R Q
    x_row_stride,  # strides in units of STRIDE_UNIT values
    x_pixel_stride,
    y_row_stride,
    y_pixel_stride,
    modulation_row_stride,
    modulation_pixel_stride,
    Q: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    EPS: tl.constexpr,
    NUM_KINDS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)[None, :]
    hidden_cols = tl.arange(0, BLOCK_F)[None, :]
    weight = load(norm_weight_ptr, cols, cols < D)
    bias1 = load(fc1_bias_ptr, hidden_cols, hidden_cols < F)
    bias2 = load(fc2_bias_ptr, cols, cols < D)
    w1_t = _load_matrix(fc1_weight_ptr, tl.arange(0, BLOCK_D)[:, None], hidden_cols, D, F, True)
    w2_t = _load_matrix(fc2_weight_ptr, tl.arange(0, BLOCK_F)[:, None], cols, F, D, True)
    for i in range(TILES):
        pixels = (tl.program_id(0).to(INDEX) * TILES + i) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask = (pixels < num_pixels)[:, None] & (cols < D)  # [BLOCK_P, BLOCK_D]
        x = load(x_ptr, offsets_of(pixels, x_row_stride, x_pixel_stride, Q, STRIDE_UNIT) + cols, mask)
        y = load(y_ptr, offsets_of(pixels, y_row_stride, y_pixel_stride, Q, STRIDE_UNIT) + cols, mask)
        packed = offsets_of(pixels, modulation_row_stride, modulation_pixel_stride, Q, STRIDE_UNIT) + cols
        attn, norm, mlp, attn_offset, norm_offset, mlp_offset = _kinds(
            modulation_ptr, packed, mask, D, NUM_KINDS
        )
        r = x + attn * y + attn_offset
        rstd = tl.rsqrt(tl.sum(r * r, 1) * (1 / D) + EPS)[:, None]
        u = r * rstd * weight * norm + norm_offset
        a = _product(u, w1_t) + bias1  # [BLOCK_P, BLOCK_F]
        hidden = a * (0.5 + 0.5 * tl.erf(a * 0.7071067811865476))
        o = _product(hidden, w2_t) + bias2
        store(out_ptr, pixels[:, None] * D + cols, r + mlp * o + mlp_offset, mask)


@triton.jit
def _pixel_mlp_bwd_kernel(
    grad_out_ptr,  # (R, Q, D)
    x_ptr,  # (R, Q, D), as y
    y_ptr,
    modulation_ptr,  # (R, Q, NUM_KINDS D)
    norm_weight_ptr,  # (D,)
    fc1_weight_ptr,  # (F, D)
    fc1_bias_ptr,  # (F,)
    fc2_weight_ptr,  # (D, F)
    fc2_bias_ptr,  # (D,)
    grad_x_ptr,  # (R, Q, D), as grad_y; dense, as what follows
    grad_y_ptr,
    grad_modulation_ptr,  # (R, Q, NUM_KINDS D), maybe that of modulation
    partials_ptr,  # (programs, D + F D + F + D F + D), in the order of the weights
    num_pixels,  # R Q
    grad_out_row_stride,  # strides in units of STRIDE_UNIT values
    grad_out_pixel_stride,
    x_row_stride,
    x_pixel_stride,
    y_row_stride,
    y_pixel_stride,
    modulation_row_stride,
    modulation_pixel_stride,
    Q: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    EPS: tl.constexpr,
    NUM_KINDS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    FILL: tl.constexpr,  # whether the kinds that are not read get zeros
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)[None, :]
    hidden = tl.arange(0, BLOCK_F)[:, None]
    weight = load(norm_weight_ptr, cols, cols < D)
    bias1 = load(fc1_bias_ptr, hidden, hidden < F)
    bias2 = load(fc2_bias_ptr, cols, cols < D)
    w1 = _load_matrix(fc1_weight_ptr, hidden, cols, F, D, False)
    w2_t = _load_matrix(fc2_weight_ptr, hidden, cols, F, D, True)
    grad_weight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    grad_w1 = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    grad_bias1 = tl.zeros((BLOCK_F, 1), tl.float32)
    grad_w2_t = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    grad_bias2 = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for i in range(TILES):
        pixels = (tl.program_id(0).to(INDEX) * TILES + i) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask = (pixels < num_pixels)[:, None] & (cols < D)  # [BLOCK_P, BLOCK_D]
        upstream = offsets_of(pixels, grad_out_row_stride, grad_out_pixel_stride, Q, STRIDE_UNIT) + cols
        g = load(grad_out_ptr, upstream, mask)
        x = load(x_ptr, offsets_of(pixels, x_row_stride, x_pixel_stride, Q, STRIDE_UNIT) + cols, mask)
        y = load(y_ptr, offsets_of(pixels, y_row_stride, y_pixel_stride, Q, STRIDE_UNIT) + cols, mask)
        packed = offsets_of(pixels, modulation_row_stride, modulation_pixel_stride, Q, STRIDE_UNIT) + cols
        attn, norm, mlp, attn_offset, norm_offset, _ = _kinds(modulation_ptr, packed, mask, D, NUM_KINDS)
        tl.debug_barrier()  # the gradient may be written over what another thread reads
        r = x + attn * y + attn_offset
        rstd = tl.rsqrt(tl.sum(r * r, 1) * (1 / D) + EPS)[:, None]
        n = r * rstd
        u = n * weight * norm + norm_offset
        a = _product(w1, tl.trans(u)) + bias1  # [BLOCK_F, BLOCK_P]
        cdf = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        slope = cdf + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
        a *= cdf
        o = _product(tl.trans(a), w2_t) + bias2
        # now, and not with the others: o would take registers until then
        packed = pixels[:, None] * (NUM_KINDS * D) + cols
        if NUM_KINDS == 4:
            store(grad_modulation_ptr, packed + 2 * D, g * o, mask)
            store(grad_modulation_ptr, packed + 3 * D, g, mask)
        else:
            store(grad_modulation_ptr, packed + 5 * D, g * o, mask)
        h = mlp * g
        grad_w2_t += _product(a, h)
        grad_bias2 += h

        grad_a = _product(w2_t, tl.trans(h)) * slope
        grad_w1 += _product(grad_a, u)
        grad_bias1 += tl.sum(grad_a, 1)[:, None]
        grad_u = _product(tl.trans(grad_a), w1)
        grad_scaled = grad_u * norm  # of n * weight
        grad_weight += grad_scaled * n
        grad_n = grad_scaled * weight
        mean = (tl.sum(grad_n * n, 1) * (1 / D))[:, None]
        grad_r = g + rstd * (grad_n - n * mean)

        dense = pixels[:, None] * D + cols
        store(grad_x_ptr, dense, grad_r, mask)
        store(grad_y_ptr, dense, grad_r * attn, mask)
        if NUM_KINDS == 4:
            store(grad_modulation_ptr, packed, grad_r * y, mask)
            store(grad_modulation_ptr, packed + D, grad_r, mask)
        else:
            if FILL:
                store(grad_modulation_ptr, packed, tl.zeros_like(g), mask)
                store(grad_modulation_ptr, packed + D, tl.zeros_like(g), mask)
            store(grad_modulation_ptr, packed + 2 * D, grad_r * y, mask)
            store(grad_modulation_ptr, packed + 3 * D, grad_u, mask)
            store(grad_modulation_ptr, packed + 4 * D, grad_u * n * weight, mask)

    partials = partials_ptr + tl.program_id(0).to(tl.int64) * (2 * F * D + F + 2 * D)
    is_weight = (hidden < F) & (cols < D)
    tl.store(partials + cols, sum_of_pixels(grad_weight), mask=cols < D)
    partials += D
    tl.store(partials + hidden * D + cols, grad_w1, mask=is_weight)
    partials += F * D
    tl.store(partials + hidden, grad_bias1, mask=hidden < F)
    partials += F
    tl.store(partials + cols * F + hidden, grad_w2_t, mask=is_weight)
    partials += D * F
    tl.store(partials + cols, sum_of_pixels(grad_bias2), mask=cols < D)


def _is_for_reference(x: Tensor, fc1_weight: Tensor) -> bool:
    """float64, which is not worth kernels of its own, and pixels wider than in any published model."""
    return x.dtype == torch.float64 or _block(x.shape[2]) * _block(fc1_weight.shape[0]) > _MAX_WEIGHTS


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))  # 16 is the least that tl.dot takes


def _grid_and_constants(
    block_p: int, eps: float, modulation: Tensor, fc1_weight: Tensor, *tensors: Tensor
) -> tuple[int, list[int], dict[str, Any]]:
    """Number of programs, strides of `tensors` and modulation in units, and constants."""
    num_tiles, strides, constants = grid_and_strides(block_p, *tensors, modulation)
    (F, D), tiles = fc1_weight.shape, tiles_of_a_program(num_tiles)
    constants |= {
        "F": F,
        "EPS": eps,
        "NUM_KINDS": modulation.shape[2] // D,
        "TILES": tiles,
        "BLOCK_F": _block(F),
    }
    return triton.cdiv(num_tiles, tiles), strides, constants


def launch_pixel_mlp_fwd(
    x: Tensor,
    y: Tensor,
    modulation: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> Tensor:
    """out (R, Q, d), dense, from x (R, Q, d), which is not empty."""
    weights = norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    if _is_for_reference(x, fc1_weight):
        return pixel_mlp_fwd_ref(x, y, modulation, *weights, eps).contiguous()
    out = dense(x)
    programs, strides, constants = _grid_and_constants(_FWD_PIXELS, eps, modulation, fc1_weight, x, y)
    _pixel_mlp_fwd_kernel[(programs,)](
        *(x, y, modulation, *(weight.contiguous() for weight in weights), out),
        x.shape[0] * x.shape[1],
        *strides,
        **constants,
    )
    return out


def launch_pixel_mlp_bwd(
    grad_out: Tensor,
    x: Tensor,
    y: Tensor,
    modulation: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
    outputs: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors of forward, dense; into `outputs`, only the kinds that forward reads.

    There the gradient of the modulation may be the modulation itself. x is not empty.
    """
    weights = norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    gradients = outputs or tuple(map(dense, (x, y, modulation, *weights)))
    if _is_for_reference(x, fc1_weight):
        unread = modulation.shape[2] - 4 * x.shape[2] if outputs else 0
        made = pixel_mlp_bwd_ref(grad_out, x, y, modulation, *weights, eps)
        for i, (gradient, value) in enumerate(zip(gradients, made, strict=True)):
            begin = unread if i == 2 else 0
            gradient[..., begin:].copy_(value[..., begin:])
        return gradients
    grad_out = rows(grad_out)
    is_wide = _block(x.shape[2]) * _block(fc1_weight.shape[0]) > _WIDE
    programs, strides, constants = _grid_and_constants(
        _BWD_PIXELS_IF_WIDE if is_wide else _BWD_PIXELS, eps, modulation, fc1_weight, grad_out, x, y
    )
    partials = x.new_empty(programs, sum(weight.numel() for weight in weights), dtype=torch.float32)
    _pixel_mlp_bwd_kernel[(programs,)](
        *(grad_out, x, y, modulation, *(weight.contiguous() for weight in weights)),
        *(*gradients[:3], partials),
        x.shape[0] * x.shape[1],
        *strides,
        FILL=outputs is None,
        **constants,
    )
    sum_partials(partials, gradients[3:])
    return gradients
