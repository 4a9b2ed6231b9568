"""Ops of liger-kernel (Triton), called as ours are: the ones that it has."""

from typing import Any

from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
from torch import Tensor


def rms_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, *, norm: str = "rms", eps: float
) -> Tensor:
    """`pixelgen_kernels.rms_norm_modulate` of the rms norm; all arithmetic in fp32, as ours."""
    if norm != "rms":
        raise ValueError(f"liger has no modulated norm of the kind {norm!r}")
    in_place = False  # gradients would be written over what forward kept
    return LigerModulatedRMSNormFunction.apply(x, weight, scale, shift, eps, 0.0, "gemma", in_place)


def swiglu(x: Tensor) -> Tensor:
    """`pixelgen_kernels.swiglu`: gate first."""
    return LigerFusedGateUpSiLUMulFunction.apply(x)


OPS: dict[str, Any] = {"rms_norm_modulate": rms_norm_modulate, "swiglu": swiglu}
