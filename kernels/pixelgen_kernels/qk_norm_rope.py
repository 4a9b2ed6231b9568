"""From a packed qkv projection to what attention reads: RMSNorm of q and k, rotary positions, heads in front.

    q = rotate(rms_norm(q) * q_weight)      k = rotate(rms_norm(k) * k_weight)      v = v
    rms_norm(u) = u / sqrt(mean(u^2) + eps) over the D channels of a head           (arXiv 1910.07467)
    rotate: channels (2i, 2i+1) = (a, b) -> (a cos_i - b sin_i, a sin_i + b cos_i)  (arXiv 2104.09864, eq. 34)

Arithmetic in fp32 (fp64 for fp64), one rounding at the end.
"""

from typing import Any

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_dense_rows,
    check_float_tensors,
    check_int,
    check_ndim,
    check_positive,
    check_shape,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)
from pixelgen_kernels.native import _C, address, dtype_tag, launch

__all__ = ["qk_norm_rope", "qk_norm_rope_bwd_ref", "qk_norm_rope_ref"]

MAX_HEAD_DIM = 256
# Tokens that share one partial sum of the weights' gradients: the order of that sum, and so its bits.
TOKENS_PER_CHUNK = 16


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
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
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
    h = g * weight and grad_u = rstd * (h - n * mean(h * n)).
    """
    dtype = stats_dtype(qkv)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_views = _heads_in_front(grad_qkv, num_heads)
    packed_views = _heads_in_front(qkv, num_heads)
    grad_weights = []
    for index, (grad, weight) in enumerate(((grad_q, q_weight), (grad_k, k_weight))):
        u, g = packed_views[index].to(dtype), grad.to(dtype)
        if cos is not None and sin is not None:
            g = _rotate(g, cos, -sin, num_prefix_tokens)
        rstd = _rstd(u, eps)
        n = u * rstd
        grad_weights.append((g * n).sum((0, 1, 2)).to(weight.dtype))
        h = g * weight.to(dtype)
        grad_views[index].copy_((h - n * (h * n).mean(-1, keepdim=True)) * rstd)
    grad_views[2].copy_(grad_v)
    return grad_qkv, grad_weights[0], grad_weights[1]


@torch.library.custom_op("pixelgen::qk_norm_rope_fwd", mutates_args=())
def _fwd(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return qk_norm_rope_ref(
        qkv, q_weight, k_weight, cos, sin, num_heads=num_heads, num_prefix_tokens=num_prefix_tokens, eps=eps
    )


@torch.library.custom_op("pixelgen::qk_norm_rope_bwd", mutates_args=())
def _bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return qk_norm_rope_bwd_ref(
        grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, num_heads, num_prefix_tokens, eps
    )


def _dense(
    q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weights and angles, small beside qkv, as the compiled code reads them: copied if they are strided."""
    return (
        q_weight.contiguous(),
        k_weight.contiguous(),
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
    )


def _shared_arguments(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> dict[str, Any]:
    """What forward and backward both pass on. Missing tensors have address 0."""
    B, T, channels = qkv.shape
    batch_stride, token_stride, _ = qkv.stride()
    return {
        "qkv": address(qkv),
        "q_weight": address(q_weight),
        "k_weight": address(k_weight),
        "cos": address(cos),
        "sin": address(sin),
        "B": B,
        "T": T,
        "N": num_heads,
        "D": channels // (3 * num_heads),
        "qkv_batch_stride": batch_stride,
        "qkv_token_stride": token_stride,
        "num_prefix_tokens": num_prefix_tokens,
        "qkv_dtype": dtype_tag(qkv),
        "q_weight_dtype": dtype_tag(q_weight),
        "k_weight_dtype": dtype_tag(k_weight),
        "cos_dtype": dtype_tag(cos),
        "sin_dtype": dtype_tag(sin),
        "eps": eps,
        **launch(qkv),
    }


@_fwd.register_kernel("cpu")
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, channels = qkv.shape
    q, k, v = (qkv.new_empty(B, num_heads, T, channels // (3 * num_heads)) for _ in range(3))
    if qkv.numel() > 0:
        tables = _dense(q_weight, k_weight, cos, sin)
        _C.qk_norm_rope_fwd(
            q=address(q),
            k=address(k),
            v=address(v),
            **_shared_arguments(qkv, *tables, num_heads, num_prefix_tokens, eps),
        )
    return q, k, v


@_bwd.register_kernel("cpu")
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_q_weight, grad_k_weight = q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)
    if qkv.numel() == 0:
        return grad_qkv, grad_q_weight.zero_(), grad_k_weight.zero_()
    grads = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    strides: dict[str, int] = {}
    for name, grad in grads.items():
        if grad.stride(-1) != 1:
            grads[name] = grad = grad.contiguous()  # a gradient that was expanded from fewer numbers
        batch, head, token, _ = grad.stride()
        strides |= {
            f"{name}_batch_stride": batch,
            f"{name}_head_stride": head,
            f"{name}_token_stride": token,
        }
    chunks = -(-qkv.shape[0] * qkv.shape[1] // TOKENS_PER_CHUNK)
    partials = qkv.new_empty(chunks, 2, grad_q.shape[-1], dtype=stats_dtype(qkv))
    tables = _dense(q_weight, k_weight, cos, sin)
    _C.qk_norm_rope_bwd(
        **{name: address(grad) for name, grad in grads.items()},
        **strides,
        grad_qkv=address(grad_qkv),
        grad_q_weight=address(grad_q_weight),
        grad_k_weight=address(grad_k_weight),
        partials=address(partials),
        tokens_per_chunk=TOKENS_PER_CHUNK,
        **_shared_arguments(qkv, *tables, num_heads, num_prefix_tokens, eps),
    )
    return grad_qkv, grad_q_weight, grad_k_weight


# The Triton module is imported when first needed: a machine without a GPU may have no triton.
@_fwd.register_kernel("cuda")
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from pixelgen_kernels.triton_kernels.qk_norm_rope import launch_qk_norm_rope_fwd

    tables = _dense(q_weight, k_weight, cos, sin)
    with torch.cuda.device_of(qkv):
        return launch_qk_norm_rope_fwd(qkv, *tables, num_heads, num_prefix_tokens, eps)


@_bwd.register_kernel("cuda")
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_prefix_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from pixelgen_kernels.triton_kernels.qk_norm_rope import launch_qk_norm_rope_bwd

    tables = _dense(q_weight, k_weight, cos, sin)
    with torch.cuda.device_of(qkv):
        return launch_qk_norm_rope_bwd(
            grad_q, grad_k, grad_v, qkv, *tables, num_heads, num_prefix_tokens, eps
        )


@_fwd.register_fake
def _(qkv, q_weight, k_weight, cos, sin, num_heads, num_prefix_tokens, eps):
    B, T, packed = qkv.shape
    shape = (B, num_heads, T, packed // (3 * num_heads))
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


@_bwd.register_fake
def _(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, num_heads, num_prefix_tokens, eps):
    return qkv.new_empty(qkv.shape), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _setup_context(ctx, inputs, output):
    qkv, q_weight, k_weight, cos, sin, *ctx.rest = inputs
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)


def _backward(ctx, grad_q, grad_k, grad_v):
    grads = _bwd(grad_q, grad_k, grad_v, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None, None, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "qk_norm_rope")


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
    if cos is None or sin is None:
        check_float_tensors(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    else:
        check_float_tensors(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    check_ndim(op, "qkv", qkv, "B, T, 3 N D")
    check_dense_rows(op, qkv=qkv)
    check_int(op, "num_heads", num_heads, 1)
    check_positive(op, "eps", eps)
    _, T, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    if channels != 3 * num_heads * head_dim or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: qkv must have shape (B, T, 3 N D) with N = {num_heads} and 1 <= D <= {MAX_HEAD_DIM}, "
            f"got {tuple(qkv.shape)}"
        )
    check_shape(op, "q_weight", q_weight, (head_dim,), "D,")
    check_shape(op, "k_weight", k_weight, (head_dim,), "D,")
    check_int(op, "num_prefix_tokens", num_prefix_tokens, 0, T)
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{op}: {missing} must be given when {given} is, got None")
    if cos is not None and sin is not None:
        if head_dim % 2:
            raise ValueError(f"{op}: qkv must have an even head dimension to be rotated, got D = {head_dim}")
        shape = (T - num_prefix_tokens, head_dim // 2)
        check_shape(op, "cos", cos, shape, "T - num_prefix_tokens, D/2")
        check_shape(op, "sin", sin, shape, "T - num_prefix_tokens, D/2")
        if cos.requires_grad or sin.requires_grad:
            cos, sin = cos.detach(), sin.detach()
    return _differentiable_fwd(qkv, q_weight, k_weight, cos, sin, num_heads, num_prefix_tokens, eps)
