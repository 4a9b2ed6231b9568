"""The seam between two halves of a block: gated residual, then the next half's norm, shift and scale.

    residual = x + gate * y
    normed = rms_norm_modulate(residual, shift, scale, weight, bias)      (AdaLN, arXiv 2212.09748)

Arithmetic in fp32 (fp64 for fp64 `x`). The residual is rounded to the dtype of `x` before it is normalised,
so the op equals the two steps done one after the other.
"""

from typing import Literal

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import ROWS, Draw, Inputs, per_model
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register
from pixelgen_kernels.ops.rms_norm_modulate import (
    NORM_OPTIONS,
    empty_statistics,
    in_a_block,
    norm_inputs,
    per_row,
    rms_norm_modulate_bwd_ref,
    rms_norm_modulate_fwd_ref,
)
from pixelgen_kernels.registry import Op


def gate_residual_norm_modulate_fwd_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference that also returns the statistics of the residual: (residual, normed, mean, rstd)."""
    dtype = stats_dtype(x)
    residual = (x.to(dtype) + per_row(gate, dtype) * y.to(dtype)).to(x.dtype).contiguous()
    return residual, *rms_norm_modulate_fwd_ref(residual, shift, scale, weight, bias, norm, eps)


def gate_residual_norm_modulate_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `gate_residual_norm_modulate`."""
    return gate_residual_norm_modulate_fwd_ref(x, y, gate, shift, scale, weight, bias, norm, eps)[:2]


def gate_residual_norm_modulate_bwd_ref(
    grad_residual: Tensor | None,
    grad_normed: Tensor | None,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, y, gate, shift, scale, weight and bias; None for what is None.

    An upstream gradient of None is one of zeros: the loss does not depend on that output.

    With g = grad_residual + the norm's gradient of its input: grad_x = g, grad_y = gate * g and grad_gate = y
    * g, summed over the tokens that share it.
    """
    dtype = stats_dtype(residual)
    # the residual in fp32, so that the norm's part of g is not rounded before it is added
    grad, *others = rms_norm_modulate_bwd_ref(
        grad_normed, residual.to(dtype), shift, scale, weight, bias, mean, rstd, norm
    )
    if grad_residual is not None:
        grad = grad + grad_residual.to(dtype)
    grad_y = (per_row(gate, dtype) * grad).to(y.dtype)
    grad_gate = y.to(dtype) * grad
    grad_gate = (grad_gate.sum(1) if gate.ndim == 2 else grad_gate).to(gate.dtype)
    return grad.to(residual.dtype), grad_y, grad_gate, others[0], others[1], others[2], others[3]


def _empty(x, y, gate, shift, scale, weight, bias, norm, eps):
    dense = torch.contiguous_format
    residual, normed = torch.empty_like(x, memory_format=dense), torch.empty_like(x, memory_format=dense)
    return residual, normed, *empty_statistics(x, norm)


_gate_residual_norm_modulate = register(
    "gate_residual_norm_modulate",
    gate_residual_norm_modulate_fwd_ref,
    gate_residual_norm_modulate_bwd_ref,
    empty=_empty,
    outputs=("residual", "normed", "mean", "rstd"),
    gradients={"x": "residual"} | {name: name for name in ("y", "gate", "shift", "scale", "weight", "bias")},
)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalise and modulate the sum (AdaLN, arXiv 2212.09748).

    residual = x + gate * y;  normed = (norm(residual) * weight + bias) * (1 + scale) + shift, as
    `rms_norm_modulate`.

    Args:
        x: (B, T, C) residual stream, any floating dtype, 1 <= C <= 8192. This and all other tensors may be
            strided chunks whose last dimension is contiguous.
        y: (B, T, C) output of the branch, any floating dtype.
        gate: (B, C), one for all tokens of a sample, or (B, T, C); any floating dtype.
        shift: (B, C) or (B, T, C), any floating dtype.
        scale: as shift, of the same shape and dtype. Both or neither.
        weight: (C,) of any floating dtype, or None for 1.
        bias: (C,) in the dtype of weight, or None for 0. Needs weight.
        norm: "rms" (no mean is subtracted) or "layer".
        eps: added to the mean square (rms) or the variance (layer), above 0.

    Returns:
        (residual, normed), both (B, T, C) in the dtype of x, dense.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not as above.
        ValueError: a shape, stride, device or value is not as above.
    """
    op = "gate_residual_norm_modulate"
    if checks.are_rows("BTC BTC BC|BTC BC|BTC? = C? =?", x, y, gate, shift, scale, weight, bias):
        checks.norm_values(op, x, norm, eps)
    else:
        checks.rows(op, x=x, y=y, gate=gate)
        checks.ndim(op, "x", x, "B, T, C")
        checks.shape(op, "y", y, x.shape, "B, T, C")
        B, T, C = x.shape
        if gate.shape not in ((B, C), (B, T, C)):
            raise ValueError(
                f"{op}: gate must have shape (B, C) = ({B}, {C}) or (B, T, C) = ({B}, {T}, {C}), "
                f"got {tuple(gate.shape)}"
            )
        shapes = {"B, C": (B, C), "B, T, C": (B, T, C)}
        checks.norm_arguments(op, x, shift, scale, weight, bias, norm, eps, modulation_shapes=shapes)
    residual, normed, _, _ = _gate_residual_norm_modulate(x, y, gate, shift, scale, weight, bias, norm, eps)
    return residual, normed


def _inputs(draw: Draw, shape: tuple[int, ...], gate: str = "per sample", **options: str) -> Inputs:
    inputs = norm_inputs(draw, shape, **options)
    B, _, C = shape
    inputs["y"] = draw.with_other(*shape)
    inputs["gate"] = draw.chunks(6, B, C)[2] if gate == "per sample" else draw.with_other(*shape)
    return inputs


Op(
    fused=gate_residual_norm_modulate,
    eager=gate_residual_norm_modulate_ref,
    call=_gate_residual_norm_modulate,
    differentiable=("x", "y", "gate", "shift", "scale", "weight", "bias"),
    inputs=_inputs,
    shapes=((1, 1, 1), (3, 37, 13), (2, 16, 768), (2, 160, 40), (1, 2, 8192), (0, 4, 8), (2, 0, 8)),
    small=(2, 3, 8),
    layouts=ROWS,
    options={"gate": ("per sample", "per token"), **NORM_OPTIONS},
    benchmarks=per_model(in_a_block),
    idle={"shift": 1.0},
)
