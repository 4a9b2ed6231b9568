"""The seam between two halves of a block: gated residual, then the next half's norm, shift and scale.

    residual = x + gate * y
    normed = rms_norm_modulate(residual, shift, scale, weight, bias)      (AdaLN, arXiv 2212.09748)

Arithmetic in fp32 (fp64 for fp64 `x`). The residual is rounded to the dtype of `x` before it is normalised,
so the op equals the two steps done one after the other.
"""

from typing import Any, Literal

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
from pixelgen_kernels._norm_rows import empty_grads, grad_rows, norm_arguments, num_chunks, rows_per_chunk
from pixelgen_kernels.native import _C, address, dtype_tag, has_cuda
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate_bwd_ref, rms_norm_modulate_fwd_ref

__all__ = [
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_bwd_ref",
    "gate_residual_norm_modulate_fwd_ref",
    "gate_residual_norm_modulate_ref",
]


def _per_row(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C) or (B, T, C) -> a shape that broadcasts with (B, T, C)."""
    return (gate.unsqueeze(1) if gate.ndim == 2 else gate).to(dtype)


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
    residual = (x.to(dtype) + _per_row(gate, dtype) * y.to(dtype)).to(x.dtype).contiguous()
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
    grad_residual: Tensor,
    grad_normed: Tensor,
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

    With g = grad_residual + the norm's gradient of its input: grad_x = g, grad_y = gate * g and grad_gate = y
    * g, summed over the tokens that share it.
    """
    dtype = stats_dtype(residual)
    # the residual in fp32, so that the norm's part of g is not rounded before it is added
    grad, *others = rms_norm_modulate_bwd_ref(
        grad_normed, residual.to(dtype), shift, scale, weight, bias, mean, rstd, norm
    )
    grad = grad + grad_residual.to(dtype)
    grad_y = (_per_row(gate, dtype) * grad).to(y.dtype)
    grad_gate = y.to(dtype) * grad
    grad_gate = (grad_gate.sum(1) if gate.ndim == 2 else grad_gate).to(gate.dtype)
    return grad.to(residual.dtype), grad_y, grad_gate, others[0], others[1], others[2], others[3]


def _empty_outputs(x: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised residual, normed, mean and rstd."""
    stats = stats_dtype(x)
    rows = x.shape[:-1]
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(rows if norm == "layer" else 0, dtype=stats)
    return residual, normed, mean, x.new_empty(rows, dtype=stats)


def _fwd_by_reference(
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
    outputs = gate_residual_norm_modulate_fwd_ref(x, y, gate, shift, scale, weight, bias, norm, eps)
    residual, normed, mean, rstd = (output.contiguous() for output in outputs)
    return residual, normed, mean, rstd


def _bwd_by_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """None stands for a gradient of zeros: of an output that the loss does not depend on."""
    grad_residual, grad_normed = grad_rows(grad_residual, residual), grad_rows(grad_normed, residual)
    grads = gate_residual_norm_modulate_bwd_ref(
        grad_residual, grad_normed, y, gate, shift, scale, weight, bias, residual, mean, rstd, norm
    )
    # an op cannot return None: what has no gradient is an empty tensor
    dense = [residual.new_empty(0) if grad is None else grad.contiguous() for grad in grads]
    return dense[0], dense[1], dense[2], dense[3], dense[4], dense[5], dense[6]


_fwd = torch.library.custom_op(
    "pixelgen::gate_residual_norm_modulate_fwd", _fwd_by_reference, mutates_args=()
)
_bwd = torch.library.custom_op(
    "pixelgen::gate_residual_norm_modulate_bwd", _bwd_by_reference, mutates_args=()
)


def _branch_arguments(y: Tensor, gate: Tensor) -> dict[str, Any]:
    """What forward and backward both pass on of the gated branch."""
    y_strides, gate_strides = y.stride(), gate.stride()
    return {
        "y": address(y),
        "gate": address(gate),
        "y_image_stride": y_strides[0],
        "y_row_stride": y_strides[1],
        "gate_image_stride": gate_strides[0],
        "gate_row_stride": gate_strides[1],
        "y_dtype": dtype_tag(y),
        "gate_dtype": dtype_tag(gate),
        "gate_per_token": gate.dim() == 3,
    }


def _compiled_fwd(
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
    if x.is_cuda and x.dtype == torch.float64:  # not worth compiled code on a GPU
        return _fwd_by_reference(x, y, gate, shift, scale, weight, bias, norm, eps)
    residual, normed, mean, rstd = _empty_outputs(x, norm)
    if x.numel() > 0:
        _C.gate_residual_norm_modulate_fwd(
            residual=address(residual),
            normed=address(normed),
            eps=eps,
            **_branch_arguments(y, gate),
            **norm_arguments(x, shift, scale, weight, bias, mean, rstd, norm),
        )
    return residual, normed, mean, rstd


def _compiled_bwd(
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
) -> tuple[Tensor, ...]:
    if residual.is_cuda and residual.dtype == torch.float64:
        return _bwd_by_reference(
            grad_residual, grad_normed, y, gate, shift, scale, weight, bias, residual, mean, rstd, norm
        )
    grads = empty_grads(residual, residual, y, gate, shift, scale, weight, bias)
    if residual.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_x, grad_y, grad_gate, grad_shift, grad_scale, grad_weight, grad_bias = grads
    grad_residual, grad_normed = grad_rows(grad_residual, residual), grad_rows(grad_normed, residual)
    norm_sums = 2 if weight is not None or (scale is not None and scale.dim() == 2) else 0
    gate_sums = 1 if gate.dim() == 2 else 0
    sum_bytes = (norm_sums + gate_sums) * rstd.itemsize
    chunk = rows_per_chunk(residual, sum_bytes, residual.itemsize + y.itemsize)
    # one buffer: those of the norm, then those of the gate
    norm_size = norm_sums * num_chunks(residual, chunk) * residual.shape[2]
    partials = rstd.new_empty((norm_sums + gate_sums) * num_chunks(residual, chunk) * residual.shape[2])
    _C.gate_residual_norm_modulate_bwd(
        grad_residual=address(grad_residual),
        grad_residual_image_stride=grad_residual.stride(0),
        grad_residual_row_stride=grad_residual.stride(1),
        grad_normed=address(grad_normed),
        grad_normed_image_stride=grad_normed.stride(0),
        grad_normed_row_stride=grad_normed.stride(1),
        grad_x=address(grad_x),
        grad_y=address(grad_y),
        grad_gate=address(grad_gate),
        grad_shift=address(grad_shift),
        grad_scale=address(grad_scale),
        grad_weight=address(grad_weight),
        grad_bias=address(grad_bias),
        partials=address(partials) if norm_sums else 0,
        gate_partials=address(partials) + norm_size * rstd.itemsize if gate_sums else 0,
        rows_per_chunk=chunk,
        **_branch_arguments(y, gate),
        **norm_arguments(residual, shift, scale, weight, bias, mean, rstd, norm),
    )
    return tuple(grads)


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _fwd.register_kernel(_device, _compiled_fwd)
    _bwd.register_kernel(_device, _compiled_bwd)


@_fwd.register_fake
def _(x, y, gate, shift, scale, weight, bias, norm, eps):
    return _empty_outputs(x, norm)


@_bwd.register_fake
def _(grad_residual, grad_normed, y, gate, shift, scale, weight, bias, residual, mean, rstd, norm):
    return tuple(empty_grads(residual, residual, y, gate, shift, scale, weight, bias))


def _setup_context(ctx, inputs, output):
    _, y, gate, shift, scale, weight, bias, ctx.norm, _ = inputs
    residual, _, mean, rstd = output
    ctx.save_for_backward(y, gate, shift, scale, weight, bias, residual, mean, rstd)
    ctx.set_materialize_grads(False)  # an output that is not used has no gradient to read


def _backward(ctx, grad_residual, grad_normed, grad_mean, grad_rstd):
    saved = ctx.saved_tensors
    grad_x, grad_y, grad_gate, *grads = _bwd(grad_residual, grad_normed, *saved, ctx.norm)
    others = [None if p is None else grad for p, grad in zip(saved[2:6], grads, strict=True)]
    return grad_x, grad_y, grad_gate, *others, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "gate_residual_norm_modulate")


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
    check_float_tensors(op, x=x, y=y, gate=gate)
    check_ndim(op, "x", x, "B, T, C")
    check_shape(op, "y", y, x.shape, "B, T, C")
    B, T, C = x.shape
    if tuple(gate.shape) not in ((B, C), (B, T, C)):
        raise ValueError(
            f"{op}: gate must have shape (B, C) = ({B}, {C}) or (B, T, C) = ({B}, {T}, {C}), "
            f"got {tuple(gate.shape)}"
        )
    check_dense_rows(op, x=x, y=y, gate=gate)
    shapes = {"B, C": (B, C), "B, T, C": (B, T, C)}
    check_norm_arguments(op, x, shift, scale, weight, bias, norm, eps, modulation_shapes=shapes)
    residual, normed, _, _ = _differentiable_fwd(x, y, gate, shift, scale, weight, bias, norm, eps)
    return residual, normed
