"""Fused kernels for pixel-space diffusion transformers: ops with their references, registration and checks.

Every op is a `torch.library` op with a plain PyTorch reference beside it (`<op>_ref`), works under autograd
and `torch.compile(fullgraph=True)`, and runs compiled code where there is some for the device.
"""

from pixelgen_kernels.cosine_distance import cosine_distance
from pixelgen_kernels.flow_matching_loss import flow_matching_loss
from pixelgen_kernels.gate_residual_norm_modulate import gate_residual_norm_modulate
from pixelgen_kernels.lpips_distance import lpips_distance
from pixelgen_kernels.native import build_info
from pixelgen_kernels.noise_patchify import noise_patchify
from pixelgen_kernels.ops import OP_NAMES, Ops, select
from pixelgen_kernels.patchify import patchify, unpatchify
from pixelgen_kernels.philox import philox_normal, philox_uniform
from pixelgen_kernels.pixel_modulate import pixel_modulate
from pixelgen_kernels.qk_norm_rope import qk_norm_rope
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate
from pixelgen_kernels.swiglu import swiglu

__all__ = [
    "OP_NAMES",
    "Ops",
    "build_info",
    "cosine_distance",
    "flow_matching_loss",
    "gate_residual_norm_modulate",
    "lpips_distance",
    "noise_patchify",
    "patchify",
    "philox_normal",
    "philox_uniform",
    "pixel_modulate",
    "qk_norm_rope",
    "rms_norm_modulate",
    "select",
    "swiglu",
    "unpatchify",
]
