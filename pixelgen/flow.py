"""The straight path between noise and image, the law of training times, and x-prediction as a velocity.

Said once, here: ``t`` in [0, 1], t = 0 is noise, t = 1 is data, and

    x_t = t * x + (1 - t) * noise

so dx_t/dt = x - noise = (x - x_t) / (1 - t), the velocity, which solvers and losses use. A denoiser
that predicts the image, ``x_pred``, has

    velocity = (x_pred - x_t) / max(1 - t, t_eps)

(arXiv 2511.13720: x-prediction with the loss on the velocity; 2602.02493 keeps both). One that predicts the
velocity (2511.20645) needs no division. Everything is a pure function; nothing waits for the device. Ranges
of settings are checked by the options that hold them.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)


def interpolate(x: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """x_t = t * x + (1 - t) * noise.

    Args:
        x: clean images, floating, (B, ...), in [-1, 1].
        noise: Gaussian samples (already multiplied by a noise scale, if any), shape of ``x``.
        t: time in [0, 1], one per sample (B,) or one for all.

    Returns:
        x_t, shape of ``x``.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if noise.shape != x.shape:
        raise ValueError(
            f"interpolate: noise must have the shape of x {tuple(x.shape)}, got {tuple(noise.shape)}"
        )
    time = _per_sample("interpolate", t, x)
    return time * x + (1.0 - time) * noise


def shift_time(t: Time, timeshift: float) -> Time:
    """t / (t + (1 - t) * timeshift): moves times towards the noise for timeshift > 1; keeps 0 and 1.

    Args:
        t: time in [0, 1], a number or a tensor of any shape.
        timeshift: positive and finite; 1 changes nothing.

    Returns:
        The shifted time, of the type, shape and dtype of ``t``.
    """
    return t / (t + (1.0 - t) * timeshift)


def logit_normal_time(normal_draw: Tensor, mean: float = -0.8, std: float = 0.8) -> Tensor:
    """t = sigmoid(std * normal_draw + mean), the logit-normal law of training times (arXiv 2511.13720).

    Args:
        normal_draw: standard normal, floating, any shape (usually (B,)).
        mean: mean of logit(t); -0.8 puts the median at t = 0.31.
        std: standard deviation of logit(t), not negative.

    Returns:
        t in (0, 1), shape and dtype of ``normal_draw``.
    """
    return torch.sigmoid(normal_draw * std + mean)


def velocity_from_x_pred(x_pred: Tensor, x_t: Tensor, t: float | Tensor, t_eps: float = 0.05) -> Tensor:
    """velocity = (x_pred - x_t) / max(1 - t, t_eps), computed in at least fp32.

    Args:
        x_pred: predicted images, floating, (B, ...).
        x_t: noisy images, shape of ``x_pred``.
        t: time in [0, 1], one per sample (B,) or one for all.
        t_eps: smallest denominator, positive; keeps the velocity finite where 1 - t goes to 0.

    Returns:
        velocity, shape of ``x_t``, fp32 (fp64 when an image is fp64).

    Raises:
        ValueError: the shapes do not fit together.
    """
    if x_pred.shape != x_t.shape:
        raise ValueError(
            f"velocity_from_x_pred: x_pred must have the shape of x_t {tuple(x_t.shape)}, "
            f"got {tuple(x_pred.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(x_pred.dtype, x_t.dtype), torch.float32)
    difference = x_pred.to(dtype) - x_t.to(dtype)
    time = _per_sample("velocity_from_x_pred", t, x_t)
    remaining = (1.0 - time).clamp_min(t_eps) if isinstance(time, Tensor) else max(1.0 - time, t_eps)
    return difference / remaining


def round_to_float32(value: float) -> float:
    """The fp32 number nearest to ``value``, as a Python float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _per_sample(function: str, t: float | Tensor, x: Tensor) -> float | Tensor:
    """``t`` (B,) as (B, 1, ..., 1) with as many dimensions as ``x``; numbers as they are."""
    if not isinstance(t, Tensor):
        return t
    if t.shape != x.shape[:1]:
        raise ValueError(f"{function}: t must have shape (B,) = {tuple(x.shape[:1])}, got {tuple(t.shape)}")
    return t.view(-1, *[1] * (x.ndim - 1))
