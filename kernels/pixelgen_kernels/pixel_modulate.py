"""PixelDiT's per-pixel AdaLN (arXiv 2511.20645): gated residual, norm, shift, scale, compaction's layout.

    residual = x + gate * y                                                   where y and gate are given, else
    x modulated = norm(residual) * weight * (1 + scale) + shift                 (B, T, PP, C), returned as (B,
    T, PP * C)

Every pixel has its own shift, scale and gate; T patches of PP pixels. Arithmetic in fp32 (fp64 for fp64 `x`);
the residual is rounded to the dtype of `x` before it is normalised.
"""

from typing import Literal

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_dense_rows,
    check_float_tensors,
    check_ndim,
    check_norm_arguments,
    check_shape,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate_bwd_ref, rms_norm_modulate_fwd_ref

__all__ = ["pixel_modulate", "pixel_modulate_bwd_ref", "pixel_modulate_fwd_ref", "pixel_modulate_ref"]


def pixel_modulate_fwd_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference that also returns the statistics: (residual, modulated, mean, rstd).

    Without y and gate, residual is (0,).
    """
    residual = x.new_empty(0)
    rows = x
    if y is not None and gate is not None:
        dtype = stats_dtype(x)
        residual = (x.to(dtype) + gate.to(dtype) * y.to(dtype)).to(x.dtype).contiguous()
        rows = residual
    modulated, mean, rstd = rms_norm_modulate_fwd_ref(
        rows.flatten(1, 2), shift.flatten(1, 2), scale.flatten(1, 2), weight, None, norm, eps
    )
    return residual, modulated.reshape(*x.shape[:2], x.shape[2] * x.shape[3]), mean, rstd


def pixel_modulate_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `pixel_modulate`."""
    residual, modulated, _, _ = pixel_modulate_fwd_ref(x, shift, scale, weight, y, gate, norm, eps)
    return modulated if y is None else (residual, modulated)


def pixel_modulate_bwd_ref(
    grad_residual: Tensor,
    grad_modulated: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, shift, scale, weight, y and gate; None for what is None. `rows` is what was normalised.

    With g = grad_residual + the norm's gradient of its input: grad_x = g, grad_y = gate * g and grad_gate = y
    * g.
    """
    dtype = stats_dtype(rows)
    # rows in fp32, so that the norm's part of g is not rounded before it is added
    flat, grad_shift, grad_scale, grad_weight, _ = rms_norm_modulate_bwd_ref(
        grad_modulated.reshape(rows.shape).flatten(1, 2),
        rows.to(dtype).flatten(1, 2),
        shift.flatten(1, 2),
        scale.flatten(1, 2),
        weight,
        None,
        mean,
        rstd,
        norm,
    )
    assert grad_shift is not None and grad_scale is not None
    grad_shift, grad_scale = grad_shift.reshape(rows.shape), grad_scale.reshape(rows.shape)
    grad = flat.reshape(rows.shape)
    if y is None or gate is None:
        return grad.to(rows.dtype), grad_shift, grad_scale, grad_weight, None, None
    grad = grad + grad_residual.to(dtype)
    grad_y, grad_gate = (gate.to(dtype) * grad).to(y.dtype), (y.to(dtype) * grad).to(gate.dtype)
    return grad.to(rows.dtype), grad_shift, grad_scale, grad_weight, grad_y, grad_gate


@torch.library.custom_op("pixelgen::pixel_modulate_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = pixel_modulate_fwd_ref(x, shift, scale, weight, y, gate, norm, eps)
    residual, modulated, mean, rstd = (output.contiguous() for output in outputs)
    return residual, modulated, mean, rstd


@torch.library.custom_op("pixelgen::pixel_modulate_bwd", mutates_args=())
def _bwd(
    grad_residual: Tensor,
    grad_modulated: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = pixel_modulate_bwd_ref(
        grad_residual, grad_modulated, shift, scale, weight, y, gate, rows, mean, rstd, norm
    )
    # an op cannot return None: what has no gradient is an empty tensor
    dense = [rows.new_empty(0) if grad is None else grad.contiguous() for grad in grads]
    return dense[0], dense[1], dense[2], dense[3], dense[4], dense[5]


@_fwd.register_fake
def _(x, shift, scale, weight, y, gate, norm, eps):
    B, T, PP, C = x.shape
    stats = stats_dtype(x)
    return (
        x.new_empty(0 if y is None else x.shape),
        x.new_empty(B, T, PP * C),
        x.new_empty((B, T * PP) if norm == "layer" else (0,), dtype=stats),
        x.new_empty((B, T * PP), dtype=stats),
    )


@_bwd.register_fake
def _(grad_residual, grad_modulated, shift, scale, weight, y, gate, rows, mean, rstd, norm):
    inputs = (rows, shift, scale, weight, y, gate)
    return tuple(rows.new_empty(0) if i is None else i.new_empty(i.shape) for i in inputs)


def _setup_context(ctx, inputs, output):
    x, shift, scale, weight, y, gate, ctx.norm, _ = inputs
    residual, _, mean, rstd = output
    ctx.save_for_backward(shift, scale, weight, y, gate, x if y is None else residual, mean, rstd)


def _backward(ctx, grad_residual, grad_modulated, grad_mean, grad_rstd):
    grads = _bwd(grad_residual, grad_modulated, *ctx.saved_tensors, ctx.norm)
    optional = ctx.saved_tensors[2:5]
    others = [None if p is None else grad for p, grad in zip(optional, grads[3:], strict=True)]
    return *grads[:3], *others, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "pixel_modulate")


def pixel_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Modulate every pixel by its own shift and scale (PixelDiT, arXiv 2511.20645).

    residual = x + gate * y;  modulated = norm(residual) * weight * (1 + scale) + shift.

    Args:
        x: (B, T, PP, C), T patches of PP pixels, any floating dtype, 1 <= C <= 8192. This and all other
            tensors may be strided chunks (of a packed (B, T, PP, 6 C)) whose last dimension is contiguous.
        shift: (B, T, PP, C), any floating dtype.
        scale: as shift, of the same dtype.
        weight: (C,) of any floating dtype, or None for 1.
        y: (B, T, PP, C) output of a branch, any floating dtype, or None.
        gate: (B, T, PP, C), any floating dtype, or None. Both y and gate or neither.
        norm: "rms" (no mean is subtracted) or "layer".
        eps: added to the mean square (rms) or the variance (layer), above 0.

    Returns:
        modulated (B, T, PP * C) in the dtype of x, dense; with y and gate (residual, modulated), where
        residual is (B, T, PP, C) in the dtype of x, dense.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not as above.
        ValueError: a shape, stride, device or value is not as above.
    """
    op = "pixel_modulate"
    check_float_tensors(op, x=x, shift=shift, scale=scale)
    check_ndim(op, "x", x, "B, T, PP, C")
    check_dense_rows(op, x=x)
    shapes: dict[str, tuple[int, ...]] = {"B, T, PP, C": tuple(x.shape)}
    check_norm_arguments(op, x, shift, scale, weight, None, norm, eps, modulation_shapes=shapes)
    if (y is None) != (gate is None):
        missing, given = ("y", "gate") if y is None else ("gate", "y")
        raise ValueError(f"{op}: {missing} must be given when {given} is, got None")
    if y is not None and gate is not None:
        check_float_tensors(op, x=x, y=y, gate=gate)
        check_shape(op, "y", y, x.shape, "B, T, PP, C")
        check_shape(op, "gate", gate, x.shape, "B, T, PP, C")
        check_dense_rows(op, y=y, gate=gate)
    residual, modulated, _, _ = _differentiable_fwd(x, shift, scale, weight, y, gate, norm, eps)
    return modulated if y is None else (residual, modulated)
