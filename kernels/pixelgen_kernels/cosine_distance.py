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
from pixelgen_kernels.native import _C, address, dtype_tag, has_cuda, launch

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
    grad_distance: Tensor,
    pred: Tensor,
    target: Tensor,
    statistics: Tensor,
    eps: float,
    wants_pred: bool = True,
    wants_target: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and target, (B, T, D), each in its dtype; one that is not wanted has no elements.

    With `statistics` (B, 3, T), the rows |pred|, |target| and <p, q>:
    grad_pred = grad_distance_b / T * (<p, q> p - q) / |pred|; where |pred| < eps the norm is a constant and
    the first term is absent. grad_target likewise with p and q exchanged.
    """
    dtype = stats_dtype(pred, target)
    norm_pred, norm_target, cosine = statistics[..., None].unbind(1)
    inverse_pred, inverse_target = (
        torch.where(norm == 0, 0, norm.clamp_min(eps).reciprocal()) for norm in (norm_pred, norm_target)
    )
    factor = grad_distance.to(dtype)[:, None, None] / pred.shape[1]
    p, q = pred.to(dtype) * inverse_pred, target.to(dtype) * inverse_target
    grad_pred, grad_target = pred.new_empty(0), target.new_empty(0)
    if wants_pred:
        grad = (p * cosine.masked_fill(norm_pred < eps, 0) - q) * (inverse_pred * factor)
        grad_pred = grad.to(pred.dtype).contiguous()
    if wants_target:
        grad = (q * cosine.masked_fill(norm_target < eps, 0) - p) * (inverse_target * factor)
        grad_target = grad.to(target.dtype).contiguous()
    return grad_pred, grad_target


# Tokens that are added up before the second pass: what fills an even share of the cores; on a GPU, a block.
TOKENS_PER_CHUNK = {"cpu": 16, "cuda": 8}


def _fwd_by_reference(pred: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(pred, target)
    pred, target = pred.to(dtype), target.to(dtype)
    cosine = (pred * _inverse_norm(pred, eps)[1] * (target * _inverse_norm(target, eps)[1])).sum(-1)
    rows = pred.square().sum(-1).sqrt(), target.square().sum(-1).sqrt(), cosine
    return (1 - cosine).mean(-1), torch.stack(rows, 1)


_fwd = torch.library.custom_op("pixelgen::cosine_distance_fwd", _fwd_by_reference, mutates_args=())
_bwd = torch.library.custom_op("pixelgen::cosine_distance_bwd", cosine_distance_bwd_ref, mutates_args=())


def _shared_arguments(pred: Tensor, target: Tensor, statistics: Tensor, eps: float) -> dict[str, int | float]:
    """What forward and backward both pass on."""
    B, T, D = pred.shape
    pred_strides, target_strides = pred.stride(), target.stride()
    return {
        "pred": address(pred),
        "target": address(target),
        "statistics": address(statistics),
        "tokens_per_chunk": TOKENS_PER_CHUNK[pred.device.type],
        "B": B,
        "T": T,
        "D": D,
        "pred_stride_b": pred_strides[0],
        "pred_stride_t": pred_strides[1],
        "pred_stride_d": pred_strides[2],
        "target_stride_b": target_strides[0],
        "target_stride_t": target_strides[1],
        "target_stride_d": target_strides[2],
        "eps": eps,
        "pred_dtype": dtype_tag(pred),
        "target_dtype": dtype_tag(target),
        **launch(pred),
    }


def _compiled_fwd(pred: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stats = stats_dtype(pred, target)
    if pred.is_cuda and stats == torch.float64:  # not worth compiled code on a GPU
        return _fwd_by_reference(pred, target, eps)
    B, T, _ = pred.shape
    distance = pred.new_empty(B, dtype=stats)
    statistics = pred.new_empty((B, 3, T), dtype=stats)
    if B > 0:
        partials = pred.new_empty((B, -(-T // TOKENS_PER_CHUNK[pred.device.type])), dtype=stats)
        shared = _shared_arguments(pred, target, statistics, eps)
        _C.cosine_distance_fwd(distance=address(distance), partials=address(partials), **shared)
    return distance, statistics


def _compiled_bwd(
    grad_distance: Tensor,
    pred: Tensor,
    target: Tensor,
    statistics: Tensor,
    eps: float,
    wants_pred: bool = True,
    wants_target: bool = True,
) -> tuple[Tensor, Tensor]:
    if pred.is_cuda and statistics.dtype == torch.float64:
        return cosine_distance_bwd_ref(grad_distance, pred, target, statistics, eps, wants_pred, wants_target)
    grad_pred = pred.new_empty(pred.shape if wants_pred else 0)
    grad_target = target.new_empty(target.shape if wants_target else 0)
    if grad_pred.numel() + grad_target.numel() > 0:
        _C.cosine_distance_bwd(
            grad_distance=address(grad_distance),
            grad_distance_stride=grad_distance.stride(0),
            grad_distance_dtype=dtype_tag(grad_distance),
            grad_pred=address(grad_pred if wants_pred else None),
            grad_target=address(grad_target if wants_target else None),
            **_shared_arguments(pred, target, statistics, eps),
        )
    return grad_pred, grad_target


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _fwd.register_kernel(_device, _compiled_fwd)
    _bwd.register_kernel(_device, _compiled_bwd)


@_fwd.register_fake
def _(pred, target, eps):
    B, T, _ = pred.shape
    stats = stats_dtype(pred, target)
    return pred.new_empty(B, dtype=stats), pred.new_empty((B, 3, T), dtype=stats)


@_bwd.register_fake
def _(grad_distance, pred, target, statistics, eps, wants_pred=True, wants_target=True):
    return (
        pred.new_empty(pred.shape if wants_pred else 0),
        target.new_empty(target.shape if wants_target else 0),
    )


def _setup_context(ctx, inputs, output):
    pred, target, ctx.eps = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, target, statistics)


def _backward(ctx, grad_distance, grad_statistics):
    if grad_distance is None:
        return None, None, None
    wants_pred, wants_target, _ = ctx.needs_input_grad
    grad_pred, grad_target = _bwd(grad_distance, *ctx.saved_tensors, ctx.eps, wants_pred, wants_target)
    return grad_pred if wants_pred else None, grad_target if wants_target else None, None


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
    return _differentiable_fwd(pred, target, eps)[0]
