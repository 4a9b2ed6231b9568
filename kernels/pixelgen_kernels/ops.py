"""All ops in one value, so that a model chooses between fused and eager in one place."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from pixelgen_kernels.cosine_distance import cosine_distance, cosine_distance_ref
from pixelgen_kernels.flow_matching_loss import flow_matching_loss, flow_matching_loss_ref
from pixelgen_kernels.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)
from pixelgen_kernels.lpips_distance import lpips_distance, lpips_distance_ref
from pixelgen_kernels.noise_patchify import noise_patchify, noise_patchify_ref
from pixelgen_kernels.patchify import patchify, patchify_ref, unpatchify, unpatchify_ref
from pixelgen_kernels.pixel_modulate import pixel_modulate, pixel_modulate_ref
from pixelgen_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_ref
from pixelgen_kernels.swiglu import swiglu, swiglu_ref


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One callable per op; fused and eager ones have the same signatures."""

    patchify: Callable[..., Any]
    unpatchify: Callable[..., Any]
    noise_patchify: Callable[..., Any]
    flow_matching_loss: Callable[..., Any]
    rms_norm_modulate: Callable[..., Any]
    gate_residual_norm_modulate: Callable[..., Any]
    qk_norm_rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    lpips_distance: Callable[..., Any]
    cosine_distance: Callable[..., Any]
    pixel_modulate: Callable[..., Any]


_FUSED = Ops(
    patchify=patchify,
    unpatchify=unpatchify,
    noise_patchify=noise_patchify,
    flow_matching_loss=flow_matching_loss,
    rms_norm_modulate=rms_norm_modulate,
    gate_residual_norm_modulate=gate_residual_norm_modulate,
    qk_norm_rope=qk_norm_rope,
    swiglu=swiglu,
    lpips_distance=lpips_distance,
    cosine_distance=cosine_distance,
    pixel_modulate=pixel_modulate,
)
_EAGER = Ops(
    patchify=patchify_ref,
    unpatchify=unpatchify_ref,
    noise_patchify=noise_patchify_ref,
    flow_matching_loss=flow_matching_loss_ref,
    rms_norm_modulate=rms_norm_modulate_ref,
    gate_residual_norm_modulate=gate_residual_norm_modulate_ref,
    qk_norm_rope=qk_norm_rope_ref,
    swiglu=swiglu_ref,
    lpips_distance=lpips_distance_ref,
    cosine_distance=cosine_distance_ref,
    pixel_modulate=pixel_modulate_ref,
)

OP_NAMES = tuple(field.name for field in fields(Ops))


def select(kernels: Literal["auto", "eager"]) -> Ops:
    """The fused ops (``"auto"``) or their eager references (``"eager"``).

    Raises:
        ValueError: another name.
    """
    if kernels not in ("auto", "eager"):
        raise ValueError(f"select: kernels must be 'auto' or 'eager', got {kernels!r}")
    return _FUSED if kernels == "auto" else _EAGER
