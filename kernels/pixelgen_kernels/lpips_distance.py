"""One stage of LPIPS, per sample: the distance of two feature maps with unit channel vectors.

    p = pred / (|pred| + eps)    q = target / (|target| + eps)         norms over channels, per position
    d_b = mean over positions of sum_c weight_c (p_c - q_c)^2          (arXiv 1801.03924, eq. 1, with w^2 as
    `weight`)

Arithmetic in fp32 (fp64 when pred or target is fp64): in half precision the squares overflow.
"""

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_float_tensors,
    check_ndim,
    check_positive,
    check_shape,
    copy_like,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)

__all__ = ["lpips_distance", "lpips_distance_bwd_ref", "lpips_distance_ref"]


def _channel_norm(features: Tensor) -> tuple[Tensor, Tensor]:
    """Norm over channels, (B, 1, H, W), and where it is zero: there its gradient is zero, not NaN."""
    square = features.square().sum(1, keepdim=True)
    is_zero = square == 0
    return square.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0), is_zero


def _unit(features: Tensor, eps: float) -> Tensor:
    """features / (norm + eps); zero, with zero gradient, where all channels are zero."""
    norm, is_zero = _channel_norm(features)
    return (features / (norm + eps)).masked_fill(is_zero, 0)


def lpips_distance_ref(pred: Tensor, target: Tensor, weight: Tensor, *, eps: float = 1e-10) -> Tensor:
    """Plain PyTorch definition of `lpips_distance`; like it, differentiable in pred only."""
    dtype = stats_dtype(pred, target)
    difference = _unit(pred.to(dtype), eps) - _unit(target.detach().to(dtype), eps)
    per_position = (difference.square() * weight.detach().to(dtype)[:, None, None]).sum(1)
    return per_position.mean((1, 2))


def lpips_distance_bwd_ref(
    grad_distance: Tensor, pred: Tensor, target: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Gradient of pred, (B, C, H, W), in its dtype and memory layout.

    With n = |pred| and g_c = grad_distance_b * 2 weight_c (p_c - q_c) / (H W), the gradient of p:
    grad_pred = g / (n + eps) - pred * (sum_c g_c pred_c) / (n (n + eps)^2), and 0 where n = 0.
    """
    dtype = stats_dtype(pred, target)
    _, _, H, W = pred.shape
    features = pred.to(dtype)
    norm, is_zero = _channel_norm(features)
    scale = (norm + eps).reciprocal().masked_fill(is_zero, 0)
    unit = features * scale
    factor = grad_distance.to(dtype)[:, None] * weight.to(dtype) * (2 / (H * W))  # (B, C)
    grad_unit = (unit - _unit(target.to(dtype), eps)) * factor[:, :, None, None]
    # unit / norm is the direction of pred divided by (norm + eps); where the norm is zero, unit is zero too
    radial = (grad_unit * unit).sum(1, keepdim=True) / norm.masked_fill(is_zero, 1)
    return copy_like(pred, (grad_unit * scale).sub_(unit * radial))


@torch.library.custom_op("pixelgen::lpips_distance_fwd", mutates_args=())
def _fwd(pred: Tensor, target: Tensor, weight: Tensor, eps: float) -> Tensor:
    return lpips_distance_ref(pred, target, weight, eps=eps)


@torch.library.custom_op("pixelgen::lpips_distance_bwd", mutates_args=())
def _bwd(grad_distance: Tensor, pred: Tensor, target: Tensor, weight: Tensor, eps: float) -> Tensor:
    return lpips_distance_bwd_ref(grad_distance, pred, target, weight, eps)


@_fwd.register_fake
def _(pred, target, weight, eps):
    return pred.new_empty(pred.shape[0], dtype=stats_dtype(pred, target))


@_bwd.register_fake
def _(grad_distance, pred, target, weight, eps):
    return torch.empty_like(pred)


def _setup_context(ctx, inputs, output):
    pred, target, weight, ctx.eps = inputs
    ctx.save_for_backward(pred, target, weight)


def _backward(ctx, grad_distance):
    return _bwd(grad_distance, *ctx.saved_tensors, ctx.eps), None, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "lpips_distance")


def lpips_distance(pred: Tensor, target: Tensor, weight: Tensor, *, eps: float = 1e-10) -> Tensor:
    """One stage of LPIPS, per sample (arXiv 1801.03924, eq. 1).

    d_b = mean over H, W of sum_c weight_c (pred_c / (|pred| + eps) - target_c / (|target| + eps))^2, in fp32.

    Args:
        pred: (B, C, H, W) features of the prediction, any floating dtype, contiguous or channels-last. The
            only argument with a gradient, which has the same layout and is zero where all channels of pred
            are zero.
        target: (B, C, H, W) features of the target, any floating dtype and layout.
        weight: (C,) learned channel weights, any floating dtype.
        eps: added to the norms, above 0.

    Returns:
        (B,) float32 (float64 when pred or target is float64).

    Raises:
        TypeError: an argument is not a tensor, or not of a floating dtype.
        ValueError: a shape, device or eps is not as above, or C, H or W is 0.
    """
    op = "lpips_distance"
    check_float_tensors(op, pred=pred, target=target, weight=weight)
    check_ndim(op, "pred", pred, "B, C, H, W")
    check_shape(op, "target", target, pred.shape, "B, C, H, W")
    check_shape(op, "weight", weight, pred.shape[1:2], "C,")
    check_positive(op, "eps", eps)
    if 0 in pred.shape[1:]:
        raise ValueError(f"{op}: pred must have C, H and W of at least 1, got {tuple(pred.shape)}")
    return _differentiable_fwd(pred, target.detach(), weight.detach(), eps)
