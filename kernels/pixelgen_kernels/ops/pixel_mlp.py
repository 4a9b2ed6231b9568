"""The second half of a pixel block, pixel by pixel: residual, norm, modulation, MLP, residual.

    r = x + gate_attn * y                                        y: the output of the attention
    u = r / sqrt(mean(r^2) + eps) * norm_weight * (1 + scale) + shift
    out = r + gate_mlp * (fc2 gelu(fc1 u))                       d -> F -> d, exact (erf) GELU

with a modulation of its own for every pixel (pixel-wise AdaLN, PixelDiT, arXiv 2511.20645), read where the
projection has left it, (pixel, kind, channel). Its post-modulation variant has four kinds:

    r = x + y * (1 + scale_attn) + shift_attn
    u = r / sqrt(mean(r^2) + eps) * norm_weight
    out = r + (fc2 gelu(fc1 u)) * (1 + scale) + shift

Neither r nor u nor the F hidden values of a pixel are ever written to memory; backward computes them again.

Arithmetic in fp32 (fp64 for fp64 `x`), one rounding at the end.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pixelgen_kernels import checks
from pixelgen_kernels.cases import ROWS, Benchmark, Draw, Inputs, pixel_paths
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import below_autograd, dense, register
from pixelgen_kernels.handover import Handover
from pixelgen_kernels.ops.pixel_modulate import MAX_PIXEL_WIDTH
from pixelgen_kernels.registry import Op

MAX_HIDDEN = 256


def _kinds(modulation: Tensor, d: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Factor and offset of the attention, of the norm's output and of the MLP; None where there is none."""
    kinds = modulation.to(dtype).split(d, -1)
    if len(kinds) == 6:
        _, _, gate_attn, shift, scale, gate_mlp = kinds
        return gate_attn, None, 1 + scale, shift, gate_mlp, None
    scale_attn, shift_attn, scale, shift = kinds
    return 1 + scale_attn, shift_attn, None, None, 1 + scale, shift


def _plus(x: Tensor, offset: Tensor | None) -> Tensor:
    return x if offset is None else x + offset


def pixel_mlp_fwd_ref(
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
    """The definition."""
    dtype = stats_dtype(x)
    attn, attn_offset, norm, norm_offset, mlp, mlp_offset = _kinds(modulation, x.shape[-1], dtype)
    assert attn is not None and mlp is not None
    r = _plus(x.to(dtype) + attn * y.to(dtype), attn_offset)
    u = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    u = _plus(u if norm is None else u * norm, norm_offset)
    hidden = F.gelu(F.linear(u, fc1_weight.to(dtype), fc1_bias.to(dtype)))
    o = F.linear(hidden, fc2_weight.to(dtype), fc2_bias.to(dtype))
    return _plus(r + mlp * o, mlp_offset).to(x.dtype)


def pixel_mlp_ref(
    x: Tensor,
    y: Tensor,
    modulation: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-6,
    handover: Handover | None = None,
) -> Tensor:
    """Plain PyTorch definition of `pixel_mlp`, differentiable any number of times."""
    return pixel_mlp_fwd_ref(x, y, modulation, norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps)


def pixel_mlp_bwd_ref(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all tensors of forward, in their order; of the kinds that are not read: 0.

    With a = fc1 u, o = fc2 gelu(a), h = gate_mlp * grad_out and gelu'(a) = Phi(a) + a phi(a): grad_a = (fc2^T
    h) * gelu'(a), grad_u = fc1^T grad_a; through the norm as in `pixel_modulate`; the gradient of r is that
    plus grad_out, and those of x, y and gate_attn follow from it.
    """
    dtype, d = stats_dtype(x), x.shape[-1]
    g, w1, w2 = grad_out.to(dtype), fc1_weight.to(dtype), fc2_weight.to(dtype)
    attn, attn_offset, norm, norm_offset, mlp, _ = _kinds(modulation, d, dtype)
    assert attn is not None and mlp is not None
    branch, weight = y.to(dtype), norm_weight.to(dtype)
    r = _plus(x.to(dtype) + attn * branch, attn_offset)
    rstd = torch.rsqrt(r.square().mean(-1, keepdim=True) + eps)
    n = r * rstd
    u = _plus(n * weight if norm is None else n * weight * norm, norm_offset)
    a = F.linear(u, w1, fc1_bias.to(dtype))
    hidden = F.gelu(a)
    o = F.linear(hidden, w2, fc2_bias.to(dtype))

    h = mlp * g
    slope = 0.5 * (1 + torch.erf(a * math.sqrt(0.5))) + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    grad_a = (h @ w2) * slope
    grad_u = grad_a @ w1
    grad_scaled = grad_u if norm is None else grad_u * norm  # of n * weight
    grad_n = grad_scaled * weight
    grad_r = g + rstd * (grad_n - n * (grad_n * n).mean(-1, keepdim=True))

    if norm is None:
        kinds = [grad_r * branch, grad_r, g * o, g]
    else:
        zeros = torch.zeros_like(g)
        kinds = [zeros, zeros, grad_r * branch, grad_u, grad_u * n * weight, g * o]
    rows = (0, 1)
    gradients = (
        (grad_r, x),
        (grad_r * attn, y),
        (torch.cat(kinds, -1), modulation),
        ((grad_scaled * n).sum(rows), norm_weight),
        (torch.einsum("rqf,rqd->fd", grad_a, u), fc1_weight),
        (grad_a.sum(rows), fc1_bias),
        (torch.einsum("rqd,rqf->df", h, hidden), fc2_weight),
        (h.sum(rows), fc2_bias),
    )
    return tuple(gradient.to(of.dtype, copy=True) for gradient, of in gradients)  # type: ignore[return-value]


def _empty(x, y, modulation, norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_pixel_mlp: Any = register(
    "pixel_mlp",
    pixel_mlp_fwd_ref,
    pixel_mlp_bwd_ref,
    empty=_empty,
    outputs=("out",),
    triton="pixel_mlp_triton",
)


@register_flop_formula(torch.ops.pixelgen.pixel_mlp_fwd)
def _flops(x, y, modulation, norm_weight, fc1_weight, *others: Any, **named: Any) -> int:
    """Of the two products, for PyTorch's counter."""
    return 4 * math.prod(x) * fc1_weight[0]


@register_flop_formula(torch.ops.pixelgen.pixel_mlp_bwd)
def _bwd_flops(grad_out, x, y, modulation, norm_weight, fc1_weight, *others: Any, **named: Any) -> int:
    """Those of their gradients; what is computed again does not count, as elsewhere."""
    return 8 * math.prod(x) * fc1_weight[0]


class _HandedOver(torch.autograd.Function):
    """`pixel_mlp` that writes the gradient of the modulation over the modulation."""

    @staticmethod
    def forward(ctx: Any, handover: Handover, carrier: Tensor, *args: Any) -> Tensor:
        *tensors, ctx.eps = args
        ctx.save_for_backward(*tensors)
        ctx.handover = handover
        with below_autograd():
            return _pixel_mlp.fwd.call(*args)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, y, modulation, *weights = ctx.saved_tensors
        ctx.handover.spend()
        grad_x, grad_y, grad_weights = dense(x), dense(y), list(map(dense, weights))
        with below_autograd():
            outputs = grad_x, grad_y, modulation, *grad_weights
            _pixel_mlp.bwd.into(outputs, grad_out, x, y, modulation, *weights, ctx.eps)
        return None, modulation, grad_x, grad_y, None, *grad_weights, None


def pixel_mlp(
    x: Tensor,
    y: Tensor,
    modulation: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-6,
    handover: Handover | None = None,
) -> Tensor:
    """Add the gated attention of a pixel block, then its whole MLP branch (arXiv 2511.20645).

    r = x + gate_attn * y;  out = r + gate_mlp * mlp(norm(r) * norm_weight * (1 + scale) + shift), where mlp
    is fc2 after an exact GELU after fc1. With four kinds of modulation: r = x + y * (1 + scale_attn) +
    shift_attn and out = r + mlp(norm(r) * norm_weight) * (1 + scale) + shift.

    Args:
        x: (R, Q, d) pixels grouped by patch: R patches of Q pixels, any floating dtype, 1 <= d <= 64. This, y
            and the modulation may be strided, their last dimension contiguous.
        y: (R, Q, d) output of the attention, any floating dtype.
        modulation: (R, Q, 6 d): shift, scale, gate of the attention, then of the MLP, of which the last four
            are read; or (R, Q, 4 d): scale, shift of the attention, then of the MLP. Any floating dtype.
        norm_weight: (d,), this and the others of any floating dtype.
        fc1_weight: (F, d), dense, 1 <= F <= 256.
        fc1_bias: (F,).
        fc2_weight: (d, F), dense.
        fc2_bias: (d,).
        eps: added to the mean square, above 0.
        handover: shared with the call of `pixel_modulate` that reads the rest of this modulation; with four
            kinds there is no such call. The gradient is then written over it, see `Handover`.

    Returns:
        out, shape and dtype of x, dense.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype.
        ValueError: a shape, stride, device or value is not as above.
        RuntimeError: the handover has been used already; in a second backward pass with one.
    """
    op = "pixel_mlp"
    weights = norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    if not checks.are_rows("RQD RQD RQM D FD F DF D", x, y, modulation, *weights):
        named = dict(
            zip(("norm_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), weights, strict=True)
        )
        checks.rows(op, x=x, y=y, modulation=modulation, **named)
        checks.ndim(op, "x", x, "R, Q, d")
        checks.ndim(op, "modulation", modulation, "R, Q, 6 d or 4 d")
        checks.shape(op, "y", y, tuple(x.shape), "R, Q, d")
        checks.ndim(op, "fc1_weight", fc1_weight, "F, d")
        hidden, d = fc1_weight.shape[0], x.shape[-1]
        checks.shape(op, "norm_weight", norm_weight, (d,), "d,")
        checks.shape(op, "fc1_weight", fc1_weight, (hidden, d), "F, d")
        checks.shape(op, "fc1_bias", fc1_bias, (hidden,), "F,")
        checks.shape(op, "fc2_weight", fc2_weight, (d, hidden), "d, F")
        checks.shape(op, "fc2_bias", fc2_bias, (d,), "d,")
    checks.positive(op, "eps", eps)
    R, Q, d = x.shape
    checks.integer(op, "the width d of x", d, 1, MAX_PIXEL_WIDTH)
    checks.integer(op, "the hidden width F of fc1_weight", fc1_weight.shape[0], 1, MAX_HIDDEN)
    if modulation.shape not in ((R, Q, 6 * d), (R, Q, 4 * d)):
        raise ValueError(
            f"{op}: modulation must have shape (R, Q, 6 d) = ({R}, {Q}, {6 * d}) or (R, Q, 4 d) = ({R}, {Q}, "
            f"{4 * d}), got {tuple(modulation.shape)}"
        )
    for name, matrix in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        if not matrix.is_contiguous():
            raise ValueError(f"{op}: {name} must be dense, got strides {tuple(matrix.stride())}")
    if handover is not None and handover.takes(x, modulation):
        handover.begin(op, is_last=True)
        if modulation.shape[-1] == 4 * d:
            handover.carrier = modulation
        if handover.carrier is not None:
            return _HandedOver.apply(handover, handover.carrier, x, y, modulation.detach(), *weights, eps)
    return _pixel_mlp(x, y, modulation, *weights, eps)


def _inputs(draw: Draw, shape: tuple[int, ...], kinds: int = 6) -> Inputs:
    R, Q, d, hidden = shape
    weights = draw.weights or torch.float32

    def matrix(rows: int, columns: int) -> Tensor:
        return draw.place(draw.values(rows, columns) / math.sqrt(columns), weights, "dense")

    return {
        "x": draw(R, Q, d),
        "y": draw.with_other(R, Q, d),
        "modulation": draw.with_other(R, Q, kinds * d),
        "norm_weight": draw.weight(d),
        "fc1_weight": matrix(hidden, d),
        "fc1_bias": draw.place(draw.values(hidden), weights, "dense"),
        "fc2_weight": matrix(d, hidden),
        "fc2_bias": draw.place(draw.values(d), weights, "dense"),
        "eps": 1e-5,
    }


def _in_a_block(R: int, Q: int, d: int) -> Benchmark:
    return Benchmark(label=f"PixelDiT-XL patches={R} Q={Q} d={d}", shape=(R, Q, d, 4 * d))


Op(
    fused=pixel_mlp,
    eager=pixel_mlp_ref,
    call=_pixel_mlp,
    differentiable=(
        *("x", "y", "modulation", "norm_weight"),
        *("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    ),
    inputs=_inputs,
    shapes=(
        (1, 1, 1, 1),
        (3, 7, 13, 29),
        (2, 16, 8, 32),
        (3, 57, 16, 64),
        (1, 3, 64, 256),
        (0, 4, 8, 32),
        (2, 0, 8, 32),
    ),
    small=(2, 3, 4, 6),
    layouts=ROWS,
    options={"kinds": (6, 4)},
    benchmarks=pixel_paths(_in_a_block),
    idle={"modulation": 2 / 6},
)
