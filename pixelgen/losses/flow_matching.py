"""The flow matching term: x-prediction, judged as a velocity."""

from __future__ import annotations

from pixelgen_kernels import Ops
from torch import Tensor


def flow_matching(x_pred: Tensor, x: Tensor, t: Tensor, *, t_eps: float, ops: Ops) -> Tensor:
    """Squared error of the velocity, per sample: mean of (x_pred - x)^2 / max(1 - t, t_eps)^2.

    Predicted and true velocity, (x_pred - x_t) / max(1 - t, t_eps) and (x - x_t) / max(1 - t, t_eps), share
    their denominator, so x_t cancels (JiT, arXiv 2511.13720).

    Args:
        x_pred: prediction, tokens (B, T, P*P*C) or images (B, C, H, W).
        x: the clean images in the same layout.
        t: (B,) time.
        t_eps: floor of 1 - t; 0.05 in every published recipe.
        ops: the kernels to use.

    Returns:
        (B,) fp32.
    """
    if x.ndim == 4:
        x_pred, x = x_pred.flatten(2), x.flatten(2)
    return ops.flow_matching_loss(x_pred, x, t, t_eps=t_eps)
