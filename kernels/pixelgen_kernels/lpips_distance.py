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
from pixelgen_kernels.native import _C, address, dtype_tag, has_cuda, launch

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
    """Plain PyTorch definition of `lpips_distance`; like it, not differentiable in weight."""
    dtype = stats_dtype(pred, target)
    difference = _unit(pred.to(dtype), eps) - _unit(target.to(dtype), eps)
    per_position = (difference.square() * weight.detach().to(dtype)[:, None, None]).sum(1)
    return per_position.mean((1, 2))


def lpips_distance_bwd_ref(
    grad_distance: Tensor, pred: Tensor, target: Tensor, weight: Tensor, statistics: Tensor
) -> Tensor:
    """Gradient of pred, (B, C, H, W), in its dtype and memory layout.

    With p and q as above and `statistics` (B, 3, H W), the rows |pred| + eps, |target| + eps and
    r = sum_c weight_c (p_c - q_c) p_c / |pred|:
    grad_pred_c = grad_distance_b * 2 / (H W) / (|pred| + eps) * (weight_c (p_c - q_c) - pred_c r).
    Where all channels of a vector are zero, its row of statistics is 0, and so is the gradient.
    """
    dtype = stats_dtype(pred, target)
    B, _, H, W = pred.shape
    norm_pred, norm_target, radial = statistics.view(B, 3, 1, H, W).unbind(1)
    inverse_pred, inverse_target = (
        torch.where(norm == 0, 0, norm.reciprocal()) for norm in (norm_pred, norm_target)
    )
    features = pred.to(dtype)
    difference = features * inverse_pred - target.to(dtype) * inverse_target
    factor = (grad_distance.to(dtype) * (2 / (H * W)))[:, None, None, None] * inverse_pred
    grad = (difference * weight.to(dtype)[:, None, None] - features * radial) * factor
    return copy_like(pred, grad)


# Elements that are added up before the second pass: what fills an even share of the cores.
ELEMENTS_PER_CHUNK = {"cpu": 131072, "cuda": 16384}


def _fwd_by_reference(pred: Tensor, target: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(pred, target)
    pred, target, weight = pred.to(dtype), target.to(dtype), weight.to(dtype)
    (norm_pred, pred_is_zero), (norm_target, target_is_zero) = _channel_norm(pred), _channel_norm(target)
    p = _unit(pred, eps)
    along = ((p - _unit(target, eps)) * p * weight[:, None, None]).sum(1, keepdim=True)
    rows = (
        (norm_pred + eps).masked_fill(pred_is_zero, 0),
        (norm_target + eps).masked_fill(target_is_zero, 0),
        (along / norm_pred).masked_fill(pred_is_zero, 0),
    )
    return lpips_distance_ref(pred, target, weight, eps=eps), torch.cat(rows, 1).flatten(2)


_fwd = torch.library.custom_op("pixelgen::lpips_distance_fwd", _fwd_by_reference, mutates_args=())
_bwd = torch.library.custom_op("pixelgen::lpips_distance_bwd", lpips_distance_bwd_ref, mutates_args=())


def _positions(height: int, width: int, *strides: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) as few rows as these strides allow: one, where the positions of all maps are evenly spaced."""
    if width == 1 or all(stride[2] == width * stride[3] for stride in strides):
        return 1, height * width
    return height, width


def _map_arguments(name: str, strides: tuple[int, ...], width: int) -> dict[str, int]:
    """Strides of a map whose rows have `width` positions; those of one column are its rows'."""
    b, c, h, w = strides
    return {
        f"{name}_stride_b": b,
        f"{name}_stride_c": c,
        f"{name}_stride_h": h,
        f"{name}_stride_w": h if width == 1 else w,
    }


def _shared_arguments(
    pred: Tensor, target: Tensor, weight: Tensor, statistics: Tensor, eps: float, *more: tuple[int, ...]
) -> dict[str, int | float]:
    """What forward and backward both pass on; `more` are the strides of other maps."""
    B, C, H, W = pred.shape
    rows, columns = _positions(H, W, pred.stride(), target.stride(), *more)
    return {
        "pred": address(pred),
        "target": address(target),
        "weight": address(weight),
        "statistics": address(statistics),
        "positions_per_chunk": _positions_per_chunk(pred),
        "B": B,
        "C": C,
        "H": rows,
        "W": columns,
        **_map_arguments("pred", pred.stride(), W),
        **_map_arguments("target", target.stride(), W),
        "weight_stride": weight.stride(0),
        "eps": eps,
        "pred_dtype": dtype_tag(pred),
        "target_dtype": dtype_tag(target),
        "weight_dtype": dtype_tag(weight),
        **launch(pred),
    }


def _positions_per_chunk(pred: Tensor) -> int:
    """A multiple of 4 for any C: the kernels for NCHW read 4 positions at a time."""
    return max(1, ELEMENTS_PER_CHUNK[pred.device.type] // pred.shape[1] // 4 * 4)


def _compiled_fwd(pred: Tensor, target: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stats = stats_dtype(pred, target)
    if pred.is_cuda and stats == torch.float64:  # not worth compiled code on a GPU
        return _fwd_by_reference(pred, target, weight, eps)
    B, _, H, W = pred.shape
    distance = pred.new_empty(B, dtype=stats)
    statistics = pred.new_empty((B, 3, H * W), dtype=stats)
    if B > 0:
        partials = pred.new_empty((B, -(-H * W // _positions_per_chunk(pred))), dtype=stats)
        shared = _shared_arguments(pred, target, weight, statistics, eps)
        _C.lpips_distance_fwd(distance=address(distance), partials=address(partials), **shared)
    return distance, statistics


def _compiled_bwd(
    grad_distance: Tensor, pred: Tensor, target: Tensor, weight: Tensor, statistics: Tensor
) -> Tensor:
    if pred.is_cuda and statistics.dtype == torch.float64:
        return lpips_distance_bwd_ref(grad_distance, pred, target, weight, statistics)
    grad_pred = torch.empty_like(pred)
    if grad_pred.numel() > 0:
        strides = grad_pred.stride()
        _C.lpips_distance_bwd(
            grad_distance=address(grad_distance),
            grad_distance_stride=grad_distance.stride(0),
            grad_distance_dtype=dtype_tag(grad_distance),
            grad_pred=address(grad_pred),
            **_map_arguments("grad_pred", strides, pred.shape[3]),
            **_shared_arguments(pred, target, weight, statistics, 0.0, strides),
        )
    return grad_pred


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _fwd.register_kernel(_device, _compiled_fwd)
    _bwd.register_kernel(_device, _compiled_bwd)


@_fwd.register_fake
def _(pred, target, weight, eps):
    B, _, H, W = pred.shape
    stats = stats_dtype(pred, target)
    return pred.new_empty(B, dtype=stats), pred.new_empty((B, 3, H * W), dtype=stats)


@_bwd.register_fake
def _(grad_distance, pred, target, weight, statistics):
    return torch.empty_like(pred)


def _setup_context(ctx, inputs, output):
    pred, target, weight, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, target, weight, statistics)


def _backward(ctx, grad_distance, grad_statistics):
    if grad_distance is None:
        return None, None, None, None
    return _bwd(grad_distance, *ctx.saved_tensors), None, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "lpips_distance")


def lpips_distance(pred: Tensor, target: Tensor, weight: Tensor, *, eps: float = 1e-10) -> Tensor:
    """One stage of LPIPS, per sample (arXiv 1801.03924, eq. 1).

    d_b = mean over H, W of sum_c weight_c (pred_c / (|pred| + eps) - target_c / (|target| + eps))^2, in fp32.

    Args:
        pred: (B, C, H, W) features of the prediction, any floating dtype, contiguous or channels-last. Its
            gradient has the same layout and is zero where all channels of pred are zero.
        target: (B, C, H, W) features of the target, any floating dtype and layout. It has a gradient too if
            it requires one, at the cost of a second call.
        weight: (C,) channel weights, any floating dtype. They have no gradient.
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
    weight = weight.detach()
    distance = _differentiable_fwd(pred, target.detach(), weight, eps)[0]
    if target.requires_grad and torch.is_grad_enabled():
        # the distance is symmetric; the value is that of the first call, the gradient of target the second's
        mirrored = _differentiable_fwd(target, pred.detach(), weight, eps)[0]
        distance = distance + (mirrored - mirrored.detach())
    return distance
