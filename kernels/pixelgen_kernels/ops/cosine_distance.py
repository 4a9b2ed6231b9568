"""1 - cosine similarity of tokens, averaged per sample: the distance of P-DINO and of the alignment loss.

    d_b = mean over tokens of 1 - <p, q>      p = pred / max(|pred|, eps)      q = target / max(|target|, eps)

Arithmetic in fp32 (fp64 when an input is fp64). A token whose vector is zero has distance 1 and receives no
gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import BATCH, STRIDED, Benchmark, Draw, Inputs
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register
from pixelgen_kernels.registry import Op


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
    wants_pred: bool,
    wants_target: bool,
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
        grad_pred = grad.to(pred.dtype)
    if wants_target:
        grad = (q * cosine.masked_fill(norm_target < eps, 0) - p) * (inverse_target * factor)
        grad_target = grad.to(target.dtype)
    return grad_pred, grad_target


def _fwd(pred: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(pred, target)
    pred, target = pred.to(dtype), target.to(dtype)
    cosine = (pred * _inverse_norm(pred, eps)[1] * (target * _inverse_norm(target, eps)[1])).sum(-1)
    rows = pred.square().sum(-1).sqrt(), target.square().sum(-1).sqrt(), cosine
    return (1 - cosine).mean(-1), torch.stack(rows, 1)


def _empty(pred: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, T, _ = pred.shape
    dtype = stats_dtype(pred, target)
    return pred.new_empty(B, dtype=dtype), pred.new_empty((B, 3, T), dtype=dtype)


def _empty_gradients(grad_distance, pred, target, statistics, eps, wants_pred, wants_target):
    grad_pred = pred.new_empty(pred.shape if wants_pred else 0)
    return grad_pred, target.new_empty(target.shape if wants_target else 0)


_cosine_distance = register(
    "cosine_distance",
    _fwd,
    cosine_distance_bwd_ref,
    empty=_empty,
    outputs=("distance", "statistics"),
    empty_gradients=_empty_gradients,
    readable=lambda grad: grad,  # any stride
)


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
    checks.floats(op, pred=pred, target=target)
    checks.ndim(op, "pred", pred, "B, T, D")
    checks.shape(op, "target", target, pred.shape, "B, T, D")
    checks.positive(op, "eps", eps)
    if pred.shape[1] * pred.shape[2] == 0:
        raise ValueError(f"{op}: pred must have T >= 1 and D >= 1, got {tuple(pred.shape)}")
    return _cosine_distance(pred, target, eps)[0]


def _inputs(draw: Draw, shape: tuple[int, ...]) -> Inputs:
    pred, noise = draw.values(*shape), draw.values(*shape)
    return {"pred": draw.place(pred), "target": draw.place(pred + noise, draw.other)}


def _per_encoder(device: str) -> Iterator[Benchmark]:
    """As P-DINO calls it, for each size of DINOv2; images of 256 pixels are resized to 16 x 16 patches."""
    B = BATCH["cpu"] if device == "cpu" else BATCH["cuda"] // 2
    for encoder, D in {"DINOv2-S": 384, "DINOv2-B": 768, "DINOv2-L": 1024}.items():
        label = f"{encoder} B={B} T=256 D={D}"
        yield Benchmark(label=label, shape=(B, 256, D), constant=("target",))


Op(
    fused=cosine_distance,
    eager=cosine_distance_ref,
    call=_cosine_distance,
    differentiable=("pred", "target"),
    inputs=_inputs,
    # the smallest in several samples: eager may have one number exactly right by chance
    shapes=((9, 1, 1), (3, 7, 13), (2, 24, 384), (2, 256, 768), (2, 3, 1030), (0, 4, 12)),
    small=(3, 2, 5),
    layouts=STRIDED,
    benchmarks=_per_encoder,
)
