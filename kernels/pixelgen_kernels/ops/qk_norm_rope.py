"""From a packed qkv projection to what attention reads: RMSNorm of q and k, rotary positions, heads in front.

    q = rotate(rms_norm(q) * q_weight)      k = rotate(rms_norm(k) * k_weight)      v = v
    rms_norm(u) = u / sqrt(mean(u^2) + eps) over the D channels of a head           (arXiv 1910.07467)
    rotate: channels (2i, 2i+1) = (a, b) -> (a cos_i - b sin_i, a sin_i + b cos_i)  (arXiv 2104.09864, eq. 34)

Arithmetic in fp32 (fp64 for fp64), one rounding at the end.
"""

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import ROWS, Draw, Inputs, ModelShape, per_model
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register
from pixelgen_kernels.registry import Op

MAX_HEAD_DIM = 256


def _rotate(u: Tensor, cos: Tensor, sin: Tensor, num_prefix_tokens: int) -> Tensor:
    """Rotates the adjacent pairs of u (B, N, T, D) but for the first tokens. With -sin it is the inverse."""
    prefix, image = u[:, :, :num_prefix_tokens], u[:, :, num_prefix_tokens:]
    a, b = image[..., 0::2], image[..., 1::2]
    cos, sin = cos.to(u.dtype), sin.to(u.dtype)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((prefix, rotated), 2)


def _heads_in_front(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, 3 N D) to three views (B, N, T, D)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _rstd(u: Tensor, eps: float) -> Tensor:
    return (u.square().mean(-1, keepdim=True) + eps).rsqrt()


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    num_heads: int,
    num_prefix_tokens: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `qk_norm_rope`; like it, not differentiable in cos and sin."""
    dtype = stats_dtype(qkv)
    *q_and_k, v = _heads_in_front(qkv, num_heads)
    outputs = []
    for packed, weight in zip(q_and_k, (q_weight, k_weight), strict=True):
        u = packed.to(dtype)
        u = u * _rstd(u, eps) * weight.to(dtype)
        if cos is not None and sin is not None:
            u = _rotate(u, cos.detach(), sin.detach(), num_prefix_tokens)
        outputs.append(u.to(qkv.dtype).contiguous())
    return outputs[0], outputs[1], v.clone(memory_format=torch.contiguous_format)


def qk_norm_rope_bwd_ref(
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
    """(grad_qkv (B, T, 3 N D), grad_q_weight (D,), grad_k_weight (D,)), each in the dtype of its input.

    With n = u * rstd and g the incoming gradient rotated back: grad_weight = sum over B, N, T of g * n,
    h = g * weight and grad_u = rstd * (h - n * mean(h * n)). Incoming gradients that are None are zeros.
    """
    dtype = stats_dtype(qkv)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_views = _heads_in_front(grad_qkv, num_heads)
    packed_views = _heads_in_front(qkv, num_heads)
    grad_weights = []
    for index, (grad, weight) in enumerate(((grad_q, q_weight), (grad_k, k_weight))):
        u = packed_views[index].to(dtype)
        g = torch.zeros_like(u) if grad is None else grad.to(dtype)
        if cos is not None and sin is not None:
            g = _rotate(g, cos, -sin, num_prefix_tokens)
        rstd = _rstd(u, eps)
        n = u * rstd
        grad_weights.append((g * n).sum((0, 1, 2)).to(weight.dtype))
        h = g * weight.to(dtype)
        grad_views[index].copy_((h - n * (h * n).mean(-1, keepdim=True)) * rstd)
    if grad_v is None:
        grad_views[2].zero_()
    else:
        grad_views[2].copy_(grad_v)
    return grad_qkv, grad_weights[0], grad_weights[1]


def _empty(qkv, q_weight, k_weight, cos, sin, num_heads, num_prefix_tokens, eps):
    B, T, channels = qkv.shape
    q = qkv.new_empty(B, num_heads, T, channels // (3 * num_heads))
    return q, torch.empty_like(q), torch.empty_like(q)


def _with_dense_channels(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()


_qk_norm_rope = register(
    "qk_norm_rope",
    qk_norm_rope_ref,
    qk_norm_rope_bwd_ref,
    empty=_empty,
    outputs=("q", "k", "v"),
    gradients={name: name for name in ("qkv", "q_weight", "k_weight")},
    triton="qk_norm_rope_triton",
    readable=_with_dense_channels,
)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    num_heads: int,
    num_prefix_tokens: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed qkv projection, normalise q and k, rotate them, and bring the heads in front.

    q, k = rotate(u / sqrt(mean(u^2) + eps) * weight), where rotate turns channels (2i, 2i+1) by the angle
    whose cosine and sine are given (arXiv 2104.09864, eq. 34). Gradients for qkv, q_weight and k_weight.

    Args:
        qkv: (B, T, 3 N D), packed as (3, N, D), any floating dtype; last dimension contiguous.
        q_weight: (D,), any floating dtype, shared by the heads.
        k_weight: (D,), likewise.
        cos: (T - num_prefix_tokens, D/2) of any floating dtype, float32 for accuracy, or None for no
            rotation.
        sin: as cos. Both or neither.
        num_heads: N; D = channels / (3 N) is 1 to 256, and even where there is a rotation.
        num_prefix_tokens: that many tokens at the front, in-context tokens, are not rotated.
        eps: added to the mean square, above 0.

    Returns:
        (q, k, v), each (B, N, T, D) in the dtype of qkv, dense.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, stride, device or value is not as above.
    """
    op = "qk_norm_rope"
    if not checks.are_rows("BTC D D RP? =?", qkv, q_weight, k_weight, cos, sin):
        tables = {} if cos is None or sin is None else {"cos": cos, "sin": sin}
        checks.floats(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight, **tables)
        checks.ndim(op, "qkv", qkv, "B, T, 3 N D")
        checks.dense_rows(op, qkv=qkv)
    checks.integer(op, "num_heads", num_heads, 1)
    checks.positive(op, "eps", eps)
    _, T, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    if channels != 3 * num_heads * head_dim or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: qkv must have shape (B, T, 3 N D) with N = {num_heads} and 1 <= D <= {MAX_HEAD_DIM}, "
            f"got {tuple(qkv.shape)}"
        )
    checks.shape(op, "q_weight", q_weight, (head_dim,), "D,")
    checks.shape(op, "k_weight", k_weight, (head_dim,), "D,")
    checks.integer(op, "num_prefix_tokens", num_prefix_tokens, 0, T)
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{op}: {missing} must be given when {given} is, got None")
    if cos is not None and sin is not None:
        if head_dim % 2:
            raise ValueError(f"{op}: qkv must have an even head dimension to be rotated, got D = {head_dim}")
        shape = (T - num_prefix_tokens, head_dim // 2)
        checks.shape(op, "cos", cos, shape, "T - num_prefix_tokens, D/2")
        checks.shape(op, "sin", sin, shape, "T - num_prefix_tokens, D/2")
        if cos.requires_grad or sin.requires_grad:
            cos, sin = cos.detach(), sin.detach()
    return _qk_norm_rope(qkv, q_weight, k_weight, cos, sin, num_heads, num_prefix_tokens, eps)


def _inputs(draw: Draw, shape: tuple[int, ...], *, rotated: bool = True) -> Inputs:
    B, T, N, D, prefix = shape
    inputs = {
        "qkv": draw(B, T, 3 * N * D),
        "q_weight": draw.weight(D),
        "k_weight": draw.weight(D),
        "num_heads": N,
    }
    if rotated and D % 2 == 0:
        angle = 3 * draw.values(T - prefix, D // 2)
        dtype = draw.other or torch.float32
        inputs |= {
            "cos": draw.place(angle.cos(), dtype),
            "sin": draw.place(angle.sin(), dtype),
            "num_prefix_tokens": prefix,
        }
    return inputs


def _in_a_block(B: int, model: ModelShape) -> tuple[str, tuple[int, ...], Inputs]:
    """In-context tokens first."""
    D = model.C // model.N
    return f"B={B} T={model.T} N={model.N} D={D}", (B, model.T, model.N, D, model.prefix), {}


Op(
    fused=qk_norm_rope,
    eager=qk_norm_rope_ref,
    call=_qk_norm_rope,
    differentiable=("qkv", "q_weight", "k_weight"),
    inputs=_inputs,
    # B, T, N, D, in-context tokens; D = 16 and 64 have kernels of their own
    shapes=(
        (1, 1, 1, 2, 0),
        (3, 7, 3, 5, 3),
        (2, 7, 3, 6, 3),
        (1, 68, 16, 72, 4),
        (2, 3, 1, 4, 3),
        (3, 20, 4, 16, 4),
        (1, 9, 3, 64, 0),
        (0, 4, 2, 8, 0),
    ),
    small=(2, 3, 2, 4, 1),
    layouts=ROWS,
    options={"rotated": (True, False)},
    benchmarks=per_model(_in_a_block),
    idle={"qkv": 1 / 3},  # v
)
