"""One stage of LPIPS, per sample: the distance of two feature maps with unit channel vectors.

    p = pred / (|pred| + eps)    q = target / (|target| + eps)         norms over channels, per position
    d_b = mean over positions of sum_c weight_c (p_c - q_c)^2          (arXiv 1801.03924, eq. 1, with w^2 as
    `weight`)

Arithmetic in fp32 (fp64 when pred or target is fp64): in half precision the squares overflow.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import BATCH, Benchmark, Draw, Inputs
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register
from pixelgen_kernels.registry import Op


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
    return ((difference * weight.to(dtype)[:, None, None] - features * radial) * factor).to(pred.dtype)


def _fwd(pred: Tensor, target: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
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


def _empty(pred: Tensor, target: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, _, H, W = pred.shape
    dtype = stats_dtype(pred, target)
    return pred.new_empty(B, dtype=dtype), pred.new_empty((B, 3, H * W), dtype=dtype)


def _empty_gradient(grad_distance, pred, target, weight, statistics):
    return torch.empty_like(pred)


_lpips_distance = register(
    "lpips_distance",
    _fwd,
    lpips_distance_bwd_ref,
    empty=_empty,
    outputs=("distance", "statistics"),
    gradients={"pred": "pred"},
    empty_gradients=_empty_gradient,
    readable=lambda grad: grad,  # any stride
)


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
    checks.floats(op, pred=pred, target=target, weight=weight)
    checks.ndim(op, "pred", pred, "B, C, H, W")
    checks.shape(op, "target", target, pred.shape, "B, C, H, W")
    checks.shape(op, "weight", weight, pred.shape[1:2], "C,")
    checks.positive(op, "eps", eps)
    if 0 in pred.shape[1:]:
        raise ValueError(f"{op}: pred must have C, H and W of at least 1, got {tuple(pred.shape)}")
    weight = weight.detach()
    distance = _lpips_distance(pred, target.detach(), weight, eps)[0]
    if target.requires_grad and torch.is_grad_enabled():
        # the distance is symmetric; the value is that of the first call, the gradient of target the second's
        mirrored = _lpips_distance(target, pred.detach(), weight, eps)[0]
        distance = distance + (mirrored - mirrored.detach())
    return distance


def _inputs(draw: Draw, shape: tuple[int, ...]) -> Inputs:
    """Features behind a ReLU, but no vector of zeros: the distance has no derivative there."""
    pred, target = draw.values(*shape).relu(), draw.values(*shape).relu()
    pred[:, 0] += 0.1
    target[:, 0] += 0.1
    return {
        "pred": draw.place(pred),
        "target": draw.place(target, draw.other),
        "weight": draw.place(draw.values(shape[1]).abs(), draw.weights or torch.float32),
    }


# of VGG16: last layer -> (channels, image side / map side)
STAGES = {
    "relu1_2": (64, 1),
    "relu2_2": (128, 2),
    "relu3_3": (256, 4),
    "relu4_3": (512, 8),
    "relu5_3": (512, 16),
}
IMAGE_SIZE = {"cpu": 128, "cuda": 256}


def _per_stage(device: str) -> Iterator[Benchmark]:
    """The maps of VGG16's stages as the perceptual branch of a step calls it; channels-last on a GPU.

    The branch gathers the samples that pass the gate: at the paper's distribution of times 52 % of a batch,
    half of which fills the buckets of a GPU.
    """
    B = BATCH["cpu"] if device == "cpu" else BATCH["cuda"] // 2
    layout = "dense" if device == "cpu" else "channels last"
    for stage, (C, shrinkage) in STAGES.items():
        side = IMAGE_SIZE[device] // shrinkage
        label = f"VGG16-{stage} B={B} C={C} H={side} W={side}"
        yield Benchmark(label=label, shape=(B, C, side, side), layout=layout, constant=("target",))


Op(
    fused=lpips_distance,
    eager=lpips_distance_ref,
    call=_lpips_distance,
    differentiable=("pred", "target"),
    inputs=_inputs,
    shapes=(
        (1, 1, 1, 1),
        (3, 13, 5, 7),
        (2, 16, 8, 8),
        (2, 5, 6, 1),
        (2, 64, 32, 32),
        (2, 512, 2, 2),
        (1, 1030, 3, 17),
        (1, 2051, 2, 5),
        (0, 4, 3, 3),
    ),
    small=(2, 3, 2, 3),
    layouts=(
        "dense",
        "channels last",
        "chunk",
        "chunk of tokens",
        "crop",
        "transposed",
        "last transposed",
        "odd address",
        "expanded",
    ),
    benchmarks=_per_stage,
)
