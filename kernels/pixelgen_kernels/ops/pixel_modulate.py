"""The norm in front of a pixel block's attention, with a shift and a scale of its own for every pixel.

    normed = x * rstd * weight * (1 + scale) + shift         rstd = 1 / sqrt(mean(x^2) + eps)

over the d channels of a pixel (pixel-wise AdaLN, PixelDiT, arXiv 2511.20645). The d values of a pixel are
few and its modulation is 6 d, so bytes are all that counts: shift and scale are read where the projection has
left them, (pixel, kind, channel), and their gradients are written there. The gate and the residual of the
attention are added by the op that reads its output: `pixel_mlp`.

Arithmetic in fp32 (fp64 for fp64 `x`), one rounding at the end.
"""

from typing import Any

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import ROWS, Benchmark, Draw, Inputs, pixel_paths
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import below_autograd, dense, register
from pixelgen_kernels.handover import Handover
from pixelgen_kernels.registry import Op

NUM_KINDS = 6  # shift, scale, gate of the attention, then of the MLP
MAX_PIXEL_WIDTH = 64


def pixel_modulate_fwd_ref(x: Tensor, modulation: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    dtype = stats_dtype(x)
    shift, scale, *_ = modulation.to(dtype).chunk(NUM_KINDS, -1)
    n = x.to(dtype)
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    return (n * weight.to(dtype) * (1 + scale) + shift).to(x.dtype)


def pixel_modulate_ref(
    x: Tensor, modulation: Tensor, weight: Tensor, *, eps: float = 1e-6, handover: Handover | None = None
) -> Tensor:
    """Plain PyTorch definition of `pixel_modulate`, differentiable any number of times."""
    return pixel_modulate_fwd_ref(x, modulation, weight, eps)


def pixel_modulate_bwd_ref(
    grad_normed: Tensor, x: Tensor, modulation: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, modulation (of the kinds that are not read: 0) and weight.

    With n = x * rstd and h = grad_normed * (1 + scale): grad_shift = grad_normed, grad_scale = grad_normed *
    n * weight, grad_weight = sum over pixels of h * n, grad_n = h * weight and grad_x = rstd * (grad_n - n *
    mean(grad_n * n)).
    """
    dtype = stats_dtype(x)
    scale = modulation.to(dtype).chunk(NUM_KINDS, -1)[1]
    g, w, n = grad_normed.to(dtype), weight.to(dtype), x.to(dtype)
    rstd = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    n = n * rstd
    others = g.new_zeros(*g.shape[:-1], (NUM_KINDS - 2) * g.shape[-1])
    grad_modulation = torch.cat((g, g * n * w, others), -1).to(modulation.dtype)
    h = g * (1 + scale)
    grad_weight = (h * n).sum((0, 1)).to(weight.dtype)
    grad_n = h * w
    grad_x = rstd * (grad_n - n * (grad_n * n).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), grad_modulation, grad_weight


def _empty(x, modulation, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_pixel_modulate: Any = register(
    "pixel_modulate",
    pixel_modulate_fwd_ref,
    pixel_modulate_bwd_ref,
    empty=_empty,
    outputs=("normed",),
    triton="pixel_modulate_triton",
)


class _HandedOver(torch.autograd.Function):
    """`pixel_modulate` whose gradient of the modulation is written beside that of `pixel_mlp`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, modulation: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        with below_autograd():
            normed = _pixel_modulate.fwd.call(x, modulation, weight, eps)
        return normed, Handover.carrier_of(modulation)

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, packed: Tensor | None) -> tuple[Tensor | None, ...]:
        # packed: the modulation's own memory, where gradients stand in the place of what pixel_mlp has read
        x, weight = ctx.saved_tensors
        if packed is None:
            raise RuntimeError(
                "pixel_modulate: what was handed over must be used by pixel_mlp in the same loss"
            )
        if grad_normed is None:
            grad_normed = torch.zeros_like(x)
        grad_x, grad_weight = dense(x), dense(weight)
        with below_autograd():
            arguments = grad_normed, x, packed, weight, ctx.eps
            _pixel_modulate.bwd.into((grad_x, packed, grad_weight), *arguments)
        return grad_x, packed, grad_weight, None


def pixel_modulate(
    x: Tensor, modulation: Tensor, weight: Tensor, *, eps: float = 1e-6, handover: Handover | None = None
) -> Tensor:
    """RMSNorm over the channels of a pixel, then the pixel's own shift and scale (arXiv 2511.20645).

    normed = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift.

    Args:
        x: (R, Q, d) pixels grouped by patch: R patches of Q pixels, any floating dtype, 1 <= d <= 64. This
            and the modulation may be strided, their last dimension contiguous.
        modulation: (R, Q, 6 d), any floating dtype: shift, scale, gate of the attention, then of the MLP. A
            projection (R, Q 6 d) is viewed so at no cost. Shift and scale of the attention are read here.
        weight: (d,), any floating dtype.
        eps: added to the mean square, above 0.
        handover: shared with the call of `pixel_mlp` that reads the rest of this modulation: both gradients
            are then written over it, see `Handover`. By default this op's gradient is a tensor of its own.

    Returns:
        normed, shape and dtype of x, dense: also (R, Q d), the input of a projection.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype.
        ValueError: a shape, stride, device or value is not as above.
        RuntimeError: the handover has been used already.
    """
    op = "pixel_modulate"
    if not checks.are_rows("RQD RQM D", x, modulation, weight):
        checks.rows(op, x=x, modulation=modulation, weight=weight)
        checks.ndim(op, "x", x, "R, Q, d")
    checks.positive(op, "eps", eps)
    R, Q, d = x.shape
    checks.integer(op, "the width d of x", d, 1, MAX_PIXEL_WIDTH)
    checks.shape(op, "modulation", modulation, (R, Q, NUM_KINDS * d), "R, Q, 6 d")
    checks.shape(op, "weight", weight, (d,), "d,")
    if handover is not None and handover.takes(x, modulation):
        handover.begin(op)
        normed, handover.carrier = _HandedOver.apply(x, modulation, weight, eps)
        return normed
    return _pixel_modulate(x, modulation, weight, eps)


def _inputs(draw: Draw, shape: tuple[int, ...]) -> Inputs:
    R, Q, d = shape
    return {
        "x": draw(R, Q, d),
        "modulation": draw.with_other(R, Q, NUM_KINDS * d),
        "weight": draw.weight(d),
        "eps": 1e-5,
    }


def _in_a_block(R: int, Q: int, d: int) -> Benchmark:
    return Benchmark(label=f"PixelDiT-XL patches={R} Q={Q} d={d}", shape=(R, Q, d))


Op(
    fused=pixel_modulate,
    eager=pixel_modulate_ref,
    call=_pixel_modulate,
    differentiable=("x", "modulation", "weight"),
    inputs=_inputs,
    shapes=((1, 1, 1), (3, 7, 13), (2, 16, 8), (5, 9, 16), (1, 3, 64), (0, 4, 8), (2, 0, 8)),
    small=(2, 3, 4),
    layouts=ROWS,
    benchmarks=pixel_paths(_in_a_block),
    idle={"modulation": 4 / 6},
)
