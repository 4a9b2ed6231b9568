"""QK-norm and RoPE on a packed projection in Triton. See `pixelgen_kernels.qk_norm_rope` for the equations.

Bound by bytes: forward reads qkv once and writes q, k and v; backward reads their gradients, q and k, and
writes grad_qkv; it makes the statistics again. A program owns a few tokens and a few heads. Row addresses,
angles and weights are made once and serve all of its heads; the tiles [tokens, channels] of a head are loaded
together, before the first is used. Programs that run side by side own neighbouring heads of the same tokens:
the sectors in which two heads meet are read and completed in L2.

The channels of a pair lie in one thread, so that exchanging them moves no data.

A tile is as wide as the next power of two: where D = 72, 56 of 128 columns are idle. Forward at XL/16 with 64
images is then 32 million warp instructions and backward 51 million; in the time of a copy of as many bytes an
H200 (132 x 4 schedulers, 4.3 TB/s) issues 60 and 80 million. (A tile of 64 beside one of 8 idles nothing, but
Triton then exchanges tiles through shared memory to add up the squares of a row.)
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.checks import stats_dtype

_TILE = 1024  # values of a tile: 8 for each of the 128 threads, one 128-bit load in bf16
# Heads of a program. More mean fewer reads of angles and fewer partial sums, but fewer programs to balance.
_FWD_HEADS, _BWD_HEADS = 4, 8
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 2048, 4, 16


@triton.jit
def _load_angles(ptr, rows, mask, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines or sines (any, PAIRS) of these rows, dense."""
    pairs = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + rows * PAIRS + pairs, mask=mask & (pairs < PAIRS), other=0.0)


@triton.jit
def _rotate(u, cos, sin, turns):
    """Turns the pairs of the rows that `turns` names; with -sin it is the inverse."""
    a, b = tl.split(tl.reshape(u, (u.shape[0], u.shape[1] // 2, 2)))
    turned_a = tl.where(turns, a * cos - b * sin, a)
    turned_b = tl.where(turns, a * sin + b * cos, b)
    return tl.reshape(tl.join(turned_a, turned_b), u.shape)


@triton.jit
def _norm(u, weight, D: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of every row."""
    rstd = tl.rsqrt(tl.sum(u * u, 1) * (1 / D) + EPS)
    return u * rstd[:, None] * weight


@triton.jit
def _norm_bwd(g, u, weight, D: tl.constexpr, EPS: tl.constexpr):
    """(gradient of u, what every row adds to the gradient of weight) from that of the norm."""
    rstd = tl.rsqrt(tl.sum(u * u, 1) * (1 / D) + EPS)[:, None]
    n = u * rstd
    h = g * weight
    mean = (tl.sum(h * n, 1) * (1 / D))[:, None]
    return (h - n * mean) * rstd, g * n


@triton.jit
def _qk_norm_rope_fwd_kernel(
    qkv_ptr,  # (B, T, 3, N, D)
    q_weight_ptr,  # (D,), as k_weight
    k_weight_ptr,
    cos_ptr,  # (T - num_prefix_tokens, D / 2), as sin
    sin_ptr,
    q_ptr,  # (B, N, T, D), as k and v
    k_ptr,
    v_ptr,
    num_tokens,  # B T
    T,
    qkv_batch_stride,  # in units of STRIDE_UNIT values
    qkv_token_stride,
    num_prefix_tokens,
    N: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROTATE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
):
    groups: tl.constexpr = N // HEADS
    first_head = (tl.program_id(0) % groups * HEADS).to(tl.int64)
    tokens = (tl.program_id(0) // groups).to(INDEX) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    image, position = (tokens // T).to(tl.int64), (tokens % T).to(tl.int64)
    is_token = (tokens < num_tokens)[:, None]
    cols = tl.arange(0, BLOCK_D)
    mask = is_token & (cols < D)[None, :]  # [BLOCK_T, BLOCK_D]
    packed = (image * qkv_batch_stride + position * qkv_token_stride) * STRIDE_UNIT
    packed_tile = qkv_ptr + packed[:, None] + cols[None, :]
    out_tile = ((image * N * T + position) * D)[:, None] + cols[None, :]
    third: tl.constexpr = N * D  # q, k and v of a token are this far apart

    q_weight = tl.load(q_weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)[None, :]
    k_weight = tl.load(k_weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)[None, :]
    if ROTATE:
        angle_rows = (position - num_prefix_tokens)[:, None]
        turns = angle_rows >= 0
        cos = _load_angles(cos_ptr, angle_rows, is_token & turns, D // 2, BLOCK_D // 2).to(DTYPE)
        sin = _load_angles(sin_ptr, angle_rows, is_token & turns, D // 2, BLOCK_D // 2).to(DTYPE)
    for i in range(HEADS):
        head = first_head + i
        head_tile = packed_tile + head * D
        q = tl.load(head_tile, mask=mask, other=0.0).to(DTYPE)
        k = tl.load(head_tile + third, mask=mask, other=0.0).to(DTYPE)
        v = tl.load(head_tile + 2 * third, mask=mask, other=0.0)
        out = out_tile + head * T * D
        tl.store(v_ptr + out, v, mask=mask)
        q = _norm(q, q_weight, D, EPS)
        if ROTATE:
            q = _rotate(q, cos, sin, turns)
        tl.store(q_ptr + out, q.to(q_ptr.dtype.element_ty), mask=mask)
        k = _norm(k, k_weight, D, EPS)
        if ROTATE:
            k = _rotate(k, cos, sin, turns)
        tl.store(k_ptr + out, k.to(k_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    grad_q_ptr,  # (B, N, T, D), as grad_k and grad_v; any strides
    grad_k_ptr,
    grad_v_ptr,
    qkv_ptr,  # (B, T, 3, N, D)
    q_weight_ptr,  # (D,), as k_weight
    k_weight_ptr,
    cos_ptr,  # (T - num_prefix_tokens, D / 2), as sin
    sin_ptr,
    grad_qkv_ptr,  # (B, T, 3, N, D), dense
    partials_ptr,  # (programs, 2, D)
    num_tokens,  # B T
    T,
    grad_q_batch_stride,  # all but those of channels in units of STRIDE_UNIT values
    grad_q_head_stride,
    grad_q_token_stride,
    grad_q_channel_stride,
    grad_k_batch_stride,
    grad_k_head_stride,
    grad_k_token_stride,
    grad_k_channel_stride,
    grad_v_batch_stride,
    grad_v_head_stride,
    grad_v_token_stride,
    grad_v_channel_stride,
    qkv_batch_stride,
    qkv_token_stride,
    num_prefix_tokens,
    N: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROTATE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
):
    groups: tl.constexpr = N // HEADS
    first_head = (tl.program_id(0) % groups * HEADS).to(tl.int64)
    tokens = (tl.program_id(0) // groups).to(INDEX) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    image, position = (tokens // T).to(tl.int64), (tokens % T).to(tl.int64)
    is_token = (tokens < num_tokens)[:, None]
    cols = tl.arange(0, BLOCK_D)
    mask = is_token & (cols < D)[None, :]  # [BLOCK_T, BLOCK_D]
    packed = (image * qkv_batch_stride + position * qkv_token_stride) * STRIDE_UNIT
    grad_q = (image * grad_q_batch_stride + position * grad_q_token_stride) * STRIDE_UNIT
    grad_k = (image * grad_k_batch_stride + position * grad_k_token_stride) * STRIDE_UNIT
    grad_v = (image * grad_v_batch_stride + position * grad_v_token_stride) * STRIDE_UNIT
    packed_tile = qkv_ptr + packed[:, None] + cols[None, :]
    long_cols = cols.to(tl.int64)
    grad_q_tile = grad_q_ptr + grad_q[:, None] + (long_cols * grad_q_channel_stride)[None, :]
    grad_k_tile = grad_k_ptr + grad_k[:, None] + (long_cols * grad_k_channel_stride)[None, :]
    grad_v_tile = grad_v_ptr + grad_v[:, None] + (long_cols * grad_v_channel_stride)[None, :]
    third: tl.constexpr = N * D  # q, k and v of a token are this far apart
    out_tile = grad_qkv_ptr + (tokens.to(tl.int64) * (3 * third))[:, None] + cols[None, :]

    q_weight = tl.load(q_weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)[None, :]
    k_weight = tl.load(k_weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)[None, :]
    if ROTATE:
        angle_rows = (position - num_prefix_tokens)[:, None]
        turns = angle_rows >= 0
        cos = _load_angles(cos_ptr, angle_rows, is_token & turns, D // 2, BLOCK_D // 2).to(DTYPE)
        sin = _load_angles(sin_ptr, angle_rows, is_token & turns, D // 2, BLOCK_D // 2).to(DTYPE)
    sum_q = tl.zeros((BLOCK_T, BLOCK_D), DTYPE)
    sum_k = tl.zeros((BLOCK_T, BLOCK_D), DTYPE)
    for i in range(HEADS):
        head = first_head + i
        packed_head = packed_tile + head * D
        grad_q_head = grad_q_tile + head * grad_q_head_stride * STRIDE_UNIT
        grad_k_head = grad_k_tile + head * grad_k_head_stride * STRIDE_UNIT
        grad_v_head = grad_v_tile + head * grad_v_head_stride * STRIDE_UNIT
        q = tl.load(packed_head, mask=mask, other=0.0).to(DTYPE)
        g_q = tl.load(grad_q_head, mask=mask, other=0.0).to(DTYPE)
        k = tl.load(packed_head + third, mask=mask, other=0.0).to(DTYPE)
        g_k = tl.load(grad_k_head, mask=mask, other=0.0).to(DTYPE)
        g_v = tl.load(grad_v_head, mask=mask, other=0.0)
        out = out_tile + head * D
        tl.store(out + 2 * third, g_v, mask=mask)
        if ROTATE:
            g_q = _rotate(g_q, cos, -sin, turns)
        q, to_weight = _norm_bwd(g_q, q, q_weight, D, EPS)
        sum_q += to_weight
        tl.store(out, q.to(grad_qkv_ptr.dtype.element_ty), mask=mask)
        if ROTATE:
            g_k = _rotate(g_k, cos, -sin, turns)
        k, to_weight = _norm_bwd(g_k, k, k_weight, D, EPS)
        sum_k += to_weight
        tl.store(out + third, k.to(grad_qkv_ptr.dtype.element_ty), mask=mask)

    partials = partials_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + cols
    tl.store(partials, tl.sum(sum_q, 0), mask=cols < D)
    tl.store(partials + D, tl.sum(sum_k, 0), mask=cols < D)


@triton.jit
def _qk_norm_rope_bwd_sum_kernel(
    partials_ptr,  # (num_partials, 2, D)
    grad_q_weight_ptr,  # (D,), as grad_k_weight
    grad_k_weight_ptr,
    num_partials,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS] of 2 D
    total = tl.zeros((ROWS, COLUMNS), partials_ptr.dtype.element_ty)
    first = 0
    while first < num_partials:  # `range` of an argument is beyond the interpreter of Triton 3.6
        rows = first + tl.arange(0, ROWS)
        mask = (rows < num_partials)[:, None] & (cols < 2 * D)[None, :]
        tile = partials_ptr + rows.to(tl.int64)[:, None] * (2 * D) + cols[None, :]
        total += tl.load(tile, mask=mask, other=0.0)
        first += ROWS
    sums = tl.sum(total, 0)
    tl.store(grad_q_weight_ptr + cols, sums.to(grad_q_weight_ptr.dtype.element_ty), mask=cols < D)
    tl.store(
        grad_k_weight_ptr + cols - D,
        sums.to(grad_k_weight_ptr.dtype.element_ty),
        mask=(cols >= D) & (cols < 2 * D),
    )


def _grid_and_constants(
    qkv: Tensor, N: int, max_heads: int, cos: Tensor | None, eps: float, strides: tuple[int, ...]
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the constants of a launch with these strides."""
    num_tokens = qkv.shape[0] * qkv.shape[1]
    D = qkv.shape[2] // (3 * N)
    block_d = triton.next_power_of_2(D)
    block_t = _TILE // (2 if qkv.dtype == torch.float64 else 1) // block_d
    heads = max(count for count in range(1, max_heads + 1) if N % count == 0)
    constants = {
        "N": N,  # as constants, N and D are part of the addresses in the instructions, and Triton can tell
        "D": D,  # that rows of 72 values keep 128-bit accesses aligned; with the unit, of strides too
        "STRIDE_UNIT": math.gcd(16, *strides),
        "EPS": eps,  # an argument would be rounded to fp32
        "ROTATE": cos is not None,
        "INDEX": tl.int32 if num_tokens + block_t < 2**31 else tl.int64,
        "DTYPE": tl.float64 if qkv.dtype == torch.float64 else tl.float32,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "HEADS": heads,
        "enable_fp_fusion": True,  # Triton's default changes between versions
    }
    return triton.cdiv(num_tokens, block_t) * (N // heads), constants


def _dense(*tables: Tensor | None) -> list[Tensor | None]:
    """Weights and angles as the kernels read them; they are small beside qkv."""
    return [None if table is None else table.contiguous() for table in tables]


def launch_qk_norm_rope_fwd(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, T, D) from qkv (B, T, 3 N D), which is not empty."""
    B, T, channels = qkv.shape
    q, k, v = (qkv.new_empty(B, num_heads, T, channels // (3 * num_heads)) for _ in range(3))
    strides = qkv.stride()[:2]
    programs, constants = _grid_and_constants(qkv, num_heads, _FWD_HEADS, cos, eps, strides)
    _qk_norm_rope_fwd_kernel[(programs,)](
        qkv,
        *_dense(q_weight, k_weight, cos, sin),
        *(q, k, v),
        B * T,
        T,
        *(stride // constants["STRIDE_UNIT"] for stride in strides),
        num_prefix_tokens,
        **constants,
    )
    return q, k, v


def launch_qk_norm_rope_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_qkv (B, T, 3 N D), dense, and grad_q_weight and grad_k_weight (D,).

    Upstream gradients have any strides; those that are None are zeros. qkv is not empty.
    """
    (B, T, _), D = qkv.shape, q_weight.shape[0]
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_q_weight, grad_k_weight = q_weight.new_empty(D), k_weight.new_empty(D)
    shape = (B, num_heads, T, D)
    grads = [qkv.new_zeros(D).expand(shape) if grad is None else grad for grad in (grad_q, grad_k, grad_v)]
    strides = (*(stride for grad in grads for stride in grad.stride()[:3]), *qkv.stride()[:2])
    programs, constants = _grid_and_constants(qkv, num_heads, _BWD_HEADS, cos, eps, strides)
    unit = constants["STRIDE_UNIT"]
    in_units = [(*(stride // unit for stride in grad.stride()[:3]), grad.stride(3)) for grad in grads]
    partials = qkv.new_empty(programs, 2, D, dtype=stats_dtype(qkv))
    _qk_norm_rope_bwd_kernel[(programs,)](
        *grads,
        qkv,
        *_dense(q_weight, k_weight, cos, sin),
        grad_qkv,
        partials,
        B * T,
        T,
        *(stride for strides in in_units for stride in strides),
        *(stride // unit for stride in qkv.stride()[:2]),
        num_prefix_tokens,
        **constants,
    )
    _qk_norm_rope_bwd_sum_kernel[(triton.cdiv(2 * D, _SUM_COLUMNS),)](
        partials,
        grad_q_weight,
        grad_k_weight,
        programs,
        D=D,
        ROWS=_SUM_ROWS,
        COLUMNS=_SUM_COLUMNS,
        num_warps=_SUM_WARPS,
    )
    return grad_qkv, grad_q_weight, grad_k_weight
