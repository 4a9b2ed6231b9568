"""Root-mean-square or layer norm, affine or not, followed by the shift and scale of AdaLN, in one pass.

    n = x * rstd             rstd = 1 / sqrt(mean(x^2) + eps)            norm="rms"    (arXiv 1910.07467)
    n = (x - mean) * rstd    rstd = 1 / sqrt(mean((x - mean)^2) + eps)   norm="layer"  (arXiv 1607.06450)
    y = (n * weight + bias) * (1 + scale) + shift                                      (arXiv 2212.09748)

Statistics and arithmetic in fp32 (fp64 for fp64 `x`); one rounding, to the dtype of `x`, at the end.
"""

from typing import Literal

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import ROWS, Draw, Inputs, ModelShape, per_model
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register, rows_collapse
from pixelgen_kernels.registry import Op


def per_row(modulation: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C) or (B, T, C) -> a shape that broadcasts with (B, T, C)."""
    return (modulation.unsqueeze(1) if modulation.dim() == 2 else modulation).to(dtype)


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
        y = y * (1 + per_row(scale, stats)) + per_row(shift, stats)
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
    grad_y: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, shift, scale, weight and bias from grad_y (None is zeros); None for what is None.

    With m = n * weight + bias, grad_m = grad_y * (1 + scale) and grad_n = grad_m * weight:
    grad_x = rstd * (grad_n - n * mean(grad_n * n)), for the layer norm also minus rstd * mean(grad_n).
    """
    stats = stats_dtype(x)
    gy = torch.zeros_like(x, dtype=stats) if grad_y is None else grad_y.to(stats)
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
        grad_m = gy * (1 + per_row(scale, stats))
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


def empty_statistics(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Uninitialised mean and rstd."""
    rows = x.shape[:-1] or ((),)
    rstd = x.new_empty(*rows, dtype=stats_dtype(x))  # a tuple of sizes would take longer to read
    return torch.empty_like(rstd) if norm == "layer" else rstd.new_empty(0), rstd


def _empty(x, shift, scale, weight, bias, norm, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *empty_statistics(x, norm)


_rms_norm_modulate = register(
    "rms_norm_modulate",
    rms_norm_modulate_fwd_ref,
    rms_norm_modulate_bwd_ref,
    empty=_empty,
    outputs=("y", "mean", "rstd"),
)


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
    if checks.are_rows("BTC BC|BTC? = C? =?", x, shift, scale, weight, bias):
        checks.norm_values(op, x, norm, eps)
    else:
        checks.rows(op, x=x)
        shape = tuple(x.shape)
        if not shape:
            raise ValueError(f"{op}: x must be (..., C), got shape {shape}")
        if len(shape) != 3 and (shift is not None or scale is not None):
            raise ValueError(f"{op}: x must be (B, T, C) when shift and scale are given, got {shape}")
        shapes = {"B, C": (shape[0], shape[-1]), "B, T, C": shape}
        checks.norm_arguments(op, x, shift, scale, weight, bias, norm, eps, modulation_shapes=shapes)
        if len(shape) > 3 and not rows_collapse(x):
            raise ValueError(
                f"{op}: x with more than 3 dimensions must be viewable as (rows, C), "
                f"got shape {shape} with strides {tuple(x.stride())}"
            )
    return _rms_norm_modulate(x, shift, scale, weight, bias, norm, eps)[0]


def norm_inputs(
    draw: Draw,
    shape: tuple[int, ...],
    modulation: str = "per sample",
    affine: str = "weight",
    norm: str = "rms",
) -> Inputs:
    """Without shift and scale where x is not (B, T, C). x is off-centre: the norms differ."""
    inputs: Inputs = {"x": draw.place(draw.values(*shape) * 2 + 0.5), "norm": norm, "eps": 1e-5}
    if len(shape) == 3 and modulation == "per sample":
        inputs["shift"], inputs["scale"], *_ = draw.chunks(6, shape[0], shape[2])
    elif len(shape) == 3 and modulation == "per token":
        inputs["shift"], inputs["scale"] = draw.with_other(*shape), draw.with_other(*shape)
    if affine != "none":
        inputs["weight"] = draw.weight(shape[-1])
    if affine == "weight and bias":
        inputs["bias"] = draw.weight(shape[-1])
    return inputs


NORM_OPTIONS = {
    "modulation": ("per sample", "per token", "none"),
    "affine": ("weight", "weight and bias", "none"),
    "norm": ("rms", "layer"),
}


def in_a_block(B: int, model: ModelShape) -> tuple[str, tuple[int, ...], Inputs]:
    """Shift, scale and gate are chunks of a packed (B, 6 C) projection."""
    return f"B={B} T={model.T} C={model.C}", (B, model.T, model.C), {}


Op(
    fused=rms_norm_modulate,
    eager=rms_norm_modulate_ref,
    call=_rms_norm_modulate,
    differentiable=("x", "shift", "scale", "weight", "bias"),
    inputs=norm_inputs,
    shapes=(
        *((1, 1, 8), (3, 37, 13), (2, 70, 1024), (1, 2, 8192)),
        *((24,), (24, 24), (2, 3, 4, 24), (1, 6, 1, 4, 24), (0, 5, 16), (2, 0, 16)),
    ),
    small=(2, 3, 8),
    layouts=ROWS,
    options=NORM_OPTIONS,
    benchmarks=per_model(in_a_block),
    idle={"shift": 1.0},
)
