"""1 - cosine similarity of tokens, averaged per sample: the distance of P-DINO and of the alignment loss.

    d_b = mean over tokens of 1 - <p, q>      p = pred / max(|pred|, eps)      q = target / max(|target|, eps)

Arithmetic in fp32 (fp64 when an input is fp64). A token whose vector is zero has distance 1 and receives no
gradient.
"""

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_float_tensors,
    check_ndim,
    check_positive,
    check_shape,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)

__all__ = ["cosine_distance", "cosine_distance_bwd_ref", "cosine_distance_ref"]


def _inverse_norm(tokens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm, 1 / max(norm, eps)) over the last dimension, kept; the inverse is 0 for zero tokens."""
    square = tokens.square().sum(-1, keepdim=True)
    is_zero = square == 0
    norm = square.masked_fill(is_zero, 1).sqrt()
    return norm, norm.clamp_min(eps).reciprocal().masked_fill(is_zero, 0)


def cosine_distance_ref(pred: Tensor, target: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Plain PyTorch definition of `cosine_distance`."""
    dtype = stats_dtype(pred, target)
    pred, target = pred.to(dtype), target.to(dtype)
    unit_pred = pred * _inverse_norm(pred, eps)[1]
    unit_target = target * _inverse_norm(target, eps)[1]
    return (1 - (unit_pred * unit_target).sum(-1)).mean(-1)


def cosine_distance_bwd_ref(
    grad_distance: Tensor, pred: Tensor, target: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and target, (B, T, D), each in its dtype.

    grad_pred = grad_distance_b / T * (<p, q> p - q) / |pred|; where |pred| < eps the norm is a constant and
    the first term is absent. grad_target likewise with p and q exchanged.
    """
    dtype = stats_dtype(pred, target)
    factor = grad_distance.to(dtype)[:, None, None] / pred.shape[1]
    norm_pred, inverse_pred = _inverse_norm(pred.to(dtype), eps)
    norm_target, inverse_target = _inverse_norm(target.to(dtype), eps)
    p, q = pred.to(dtype) * inverse_pred, target.to(dtype) * inverse_target
    cosine = (p * q).sum(-1, keepdim=True)
    grad_pred = (p * cosine.masked_fill(norm_pred < eps, 0) - q) * (inverse_pred * factor)
    grad_target = (q * cosine.masked_fill(norm_target < eps, 0) - p) * (inverse_target * factor)
    return grad_pred.to(pred.dtype).contiguous(), grad_target.to(target.dtype).contiguous()


@torch.library.custom_op("pixelgen::cosine_distance_fwd", mutates_args=())
def _fwd(pred: Tensor, target: Tensor, eps: float) -> Tensor:
    return cosine_distance_ref(pred, target, eps=eps)


@torch.library.custom_op("pixelgen::cosine_distance_bwd", mutates_args=())
def _bwd(grad_distance: Tensor, pred: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cosine_distance_bwd_ref(grad_distance, pred, target, eps)


@_fwd.register_fake
def _(pred, target, eps):
    return pred.new_empty(pred.shape[0], dtype=stats_dtype(pred, target))


@_bwd.register_fake
def _(grad_distance, pred, target, eps):
    return pred.new_empty(pred.shape), target.new_empty(target.shape)


def _setup_context(ctx, inputs, output):
    pred, target, ctx.eps = inputs
    ctx.save_for_backward(pred, target)


def _backward(ctx, grad_distance):
    grad_pred, grad_target = _bwd(grad_distance, *ctx.saved_tensors, ctx.eps)
    return grad_pred, grad_target, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "cosine_distance")


def cosine_distance(pred: Tensor, target: Tensor, *, eps: float = 1e-8) -> Tensor:
    """1 - cosine similarity per token, averaged per sample, in fp32.

    d_b = mean over T of 1 - <pred, target> / (max(|pred|, eps) max(|target|, eps)).

    Args:
        pred: (B, T, D), any floating dtype, any strides.
        target: (B, T, D), any floating dtype, any strides. Both have a gradient; that of a zero token is
            zero.
        eps: lower bound of the norms, above 0.

    Returns:
        (B,) float32 (float64 when an input is float64), in [0, 2] up to rounding.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating dtype.
        ValueError: a shape, device or eps is not as above, or T or D is 0.
    """
    op = "cosine_distance"
    check_float_tensors(op, pred=pred, target=target)
    check_ndim(op, "pred", pred, "B, T, D")
    check_shape(op, "target", target, pred.shape, "B, T, D")
    check_positive(op, "eps", eps)
    if pred.shape[1] * pred.shape[2] == 0:
        raise ValueError(f"{op}: pred must have T >= 1 and D >= 1, got {tuple(pred.shape)}")
    return _differentiable_fwd(pred, target, eps)
