"""Root-mean-square or layer norm, affine or not, followed by the shift and scale of AdaLN, in one pass.

    n = x * rstd             rstd = 1 / sqrt(mean(x^2) + eps)            norm="rms"    (arXiv 1910.07467)
    n = (x - mean) * rstd    rstd = 1 / sqrt(mean((x - mean)^2) + eps)   norm="layer"  (arXiv 1607.06450)
    y = (n * weight + bias) * (1 + scale) + shift                                      (arXiv 2212.09748)

Statistics and arithmetic in fp32 (fp64 for fp64 `x`); one rounding, to the dtype of `x`, at the end.
"""

from typing import Literal

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_dense_rows,
    check_float_tensors,
    check_norm_arguments,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)
from pixelgen_kernels._norm_rows import (
    as_rows,
    empty_grads,
    grad_rows,
    norm_arguments,
    num_chunks,
    rows_collapse,
    rows_per_chunk,
)
from pixelgen_kernels.native import _C, address, has_cuda

__all__ = [
    "rms_norm_modulate",
    "rms_norm_modulate_bwd_ref",
    "rms_norm_modulate_fwd_ref",
    "rms_norm_modulate_ref",
]


def _per_row(modulation: Tensor, x: Tensor) -> Tensor:
    """(B, C) or (B, T, C) -> a shape that broadcasts with x (B, T, C), in the dtype of the arithmetic."""
    modulation = modulation.to(stats_dtype(x))
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def rms_norm_modulate_fwd_ref(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with the statistics: y (..., C), mean (...) or (0,) for the rms norm, rstd (...)."""
    stats = stats_dtype(x)
    n = x.to(stats)
    if norm == "layer":
        mean = n.mean(-1)
        n = n - mean.unsqueeze(-1)
    else:
        mean = x.new_empty(0, dtype=stats)
    rstd = torch.rsqrt(n.square().mean(-1) + eps)
    y = n * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(stats)
    if bias is not None:
        y = y + bias.to(stats)
    if shift is not None and scale is not None:
        y = y * (1 + _per_row(scale, x)) + _per_row(shift, x)
    return y.to(x.dtype), mean, rstd


def rms_norm_modulate_ref(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> Tensor:
    """Plain PyTorch definition of `rms_norm_modulate`, differentiable any number of times."""
    return rms_norm_modulate_fwd_ref(x, shift, scale, weight, bias, norm, eps)[0]


def rms_norm_modulate_bwd_ref(
    grad_y: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, shift, scale, weight and bias from grad_y and the statistics; None for what is None.

    With m = n * weight + bias, grad_m = grad_y * (1 + scale) and grad_n = grad_m * weight:
    grad_x = rstd * (grad_n - n * mean(grad_n * n)), for the layer norm also minus rstd * mean(grad_n).
    """
    stats = stats_dtype(x)
    gy = grad_y.to(stats)
    n = x.to(stats)
    if norm == "layer":
        n = n - mean.unsqueeze(-1)
    n = n * rstd.unsqueeze(-1)

    grad_shift = grad_scale = grad_weight = grad_bias = None
    grad_m = gy
    if shift is not None and scale is not None:
        m = n if weight is None else n * weight.to(stats)
        m = m if bias is None else m + bias.to(stats)
        # copy=True: an op's output may not alias its input
        grad_shift = (gy.sum(1) if shift.dim() == 2 else gy).to(shift.dtype, copy=True)
        grad_scale = ((gy * m).sum(1) if scale.dim() == 2 else gy * m).to(scale.dtype)
        grad_m = gy * (1 + _per_row(scale, x))
    rows = list(range(x.dim() - 1))
    if weight is not None:
        grad_weight = (grad_m * n).sum(rows).to(weight.dtype)
    if bias is not None:
        grad_bias = grad_m.sum(rows).to(bias.dtype)

    grad_n = grad_m if weight is None else grad_m * weight.to(stats)
    grad_x = grad_n - n * (grad_n * n).mean(-1, keepdim=True)
    if norm == "layer":
        grad_x = grad_x - grad_n.mean(-1, keepdim=True)
    grad_x = (grad_x * rstd.unsqueeze(-1)).to(x.dtype)
    return grad_x, grad_shift, grad_scale, grad_weight, grad_bias


def _empty_outputs(x: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, mean and rstd."""
    stats = stats_dtype(x)
    rows = x.shape[:-1]
    mean = x.new_empty(rows if norm == "layer" else 0, dtype=stats)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, x.new_empty(rows, dtype=stats)


def _fwd_by_reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = rms_norm_modulate_fwd_ref(x, shift, scale, weight, bias, norm, eps)
    return y.contiguous(), mean.contiguous(), rstd.contiguous()


def _bwd_by_reference(
    grad_y: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = rms_norm_modulate_bwd_ref(grad_y, x, shift, scale, weight, bias, mean, rstd, norm)
    grad_x, grad_shift, grad_scale, grad_weight, grad_bias = (
        x.new_empty(0) if grad is None else grad.contiguous() for grad in grads
    )
    return grad_x, grad_shift, grad_scale, grad_weight, grad_bias


_fwd = torch.library.custom_op("pixelgen::rms_norm_modulate_fwd", _fwd_by_reference, mutates_args=())
_bwd = torch.library.custom_op("pixelgen::rms_norm_modulate_bwd", _bwd_by_reference, mutates_args=())


def _compiled_fwd(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda and x.dtype == torch.float64:  # not worth compiled code on a GPU
        return _fwd_by_reference(x, shift, scale, weight, bias, norm, eps)
    y, mean, rstd = _empty_outputs(x, norm)
    if x.numel() > 0:
        arguments = norm_arguments(as_rows(x, scale), shift, scale, weight, bias, mean, rstd, norm)
        _C.rms_norm_modulate_fwd(y=address(y), eps=eps, **arguments)
    return y, mean, rstd


def _compiled_bwd(
    grad_y: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, ...]:
    if x.is_cuda and x.dtype == torch.float64:
        return _bwd_by_reference(grad_y, x, shift, scale, weight, bias, mean, rstd, norm)
    grads = empty_grads(x, x, shift, scale, weight, bias)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_x, grad_shift, grad_scale, grad_weight, grad_bias = grads
    rows = as_rows(x, scale)
    grad = grad_rows(grad_y, rows)
    has_sums = weight is not None or (scale is not None and scale.dim() == 2)
    chunk = rows_per_chunk(rows, 2 * rstd.itemsize * has_sums, x.itemsize)
    partials = rstd.new_empty(num_chunks(rows, chunk), 2, rows.shape[2]) if has_sums else None
    _C.rms_norm_modulate_bwd(
        grad_y=address(grad),
        grad_y_image_stride=grad.stride(0),
        grad_y_row_stride=grad.stride(1),
        grad_x=address(grad_x),
        grad_shift=address(grad_shift),
        grad_scale=address(grad_scale),
        grad_weight=address(grad_weight),
        grad_bias=address(grad_bias),
        partials=address(partials),
        rows_per_chunk=chunk,
        **norm_arguments(rows, shift, scale, weight, bias, mean, rstd, norm),
    )
    return tuple(grads)


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _fwd.register_kernel(_device, _compiled_fwd)
    _bwd.register_kernel(_device, _compiled_bwd)


@_fwd.register_fake
def _(x, shift, scale, weight, bias, norm, eps):
    return _empty_outputs(x, norm)


@_bwd.register_fake
def _(grad_y, x, shift, scale, weight, bias, mean, rstd, norm):
    return tuple(empty_grads(x, x, shift, scale, weight, bias))


def _setup_context(ctx, inputs, output):
    x, shift, scale, weight, bias, norm, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, shift, scale, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)  # mean and rstd are never asked for theirs
    ctx.norm = norm


def _backward(ctx, grad_y, grad_mean, grad_rstd):
    x, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x, *others = _bwd(grad_y, x, shift, scale, weight, bias, mean, rstd, ctx.norm)
    parameters = (shift, scale, weight, bias)
    others = [None if p is None else grad for p, grad in zip(parameters, others, strict=True)]
    return grad_x, *others, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "rms_norm_modulate")


def rms_norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> Tensor:
    """Normalise the rows of x, apply weight and bias, then `* (1 + scale) + shift` (AdaLN, arXiv 2212.09748).

    y = (norm(x) * weight + bias) * (1 + scale) + shift, in fp32 (fp64 for fp64 x), rounded once.

    Args:
        x: (B, T, C), any floating dtype, 1 <= C <= 8192; without shift and scale any (..., C). The last
            dimension is contiguous, the others may have strides (a chunk of a packed projection is read in
            place).
        shift: (B, C), one for all tokens of a sample, or (B, T, C); any floating dtype; last dimension
            contiguous.
        scale: as shift, of the same shape and dtype. Both or neither.
        weight: (C,) of any floating dtype, or None for 1.
        bias: (C,) in the dtype of weight, or None for 0. Needs weight.
        norm: "rms" (no mean is subtracted) or "layer".
        eps: added to the mean square (rms) or the variance (layer); positive.

    Returns:
        y, shape and dtype of x, dense.

    Raises:
        ValueError: a shape, stride or value is not as above.
        TypeError: a dtype is not as above.
    """
    op = "rms_norm_modulate"
    check_float_tensors(op, x=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., C), got shape {tuple(x.shape)}")
    if (shift is not None or scale is not None) and x.dim() != 3:
        raise ValueError(f"{op}: x must be (B, T, C) when shift and scale are given, got {tuple(x.shape)}")
    shapes = {"B, C": (x.shape[0], x.shape[-1]), "B, T, C": tuple(x.shape)}
    check_norm_arguments(op, x, shift, scale, weight, bias, norm, eps, modulation_shapes=shapes)
    check_dense_rows(op, x=x)
    if x.dim() > 3 and not rows_collapse(x):
        raise ValueError(
            f"{op}: x with more than 3 dimensions must be viewable as (rows, C), "
            f"got shape {tuple(x.shape)} with strides {tuple(x.stride())}"
        )
    return _differentiable_fwd(x, shift, scale, weight, bias, norm, eps)[0]
