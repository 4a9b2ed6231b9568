# Written by `python tests/ops/test_stubs.py`, which is also the test that they are up to date.

from pixelgen_kernels.native import build_info as build_info
from pixelgen_kernels.ops.cosine_distance import cosine_distance as cosine_distance
from pixelgen_kernels.ops.flow_matching_loss import flow_matching_loss as flow_matching_loss
from pixelgen_kernels.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate as gate_residual_norm_modulate,
)
from pixelgen_kernels.ops.lpips_distance import lpips_distance as lpips_distance
from pixelgen_kernels.ops.noise_patchify import noise_patchify as noise_patchify
from pixelgen_kernels.ops.patchify import patchify as patchify
from pixelgen_kernels.ops.patchify import unpatchify as unpatchify
from pixelgen_kernels.ops.philox import philox_normal as philox_normal
from pixelgen_kernels.ops.philox import philox_uniform as philox_uniform
from pixelgen_kernels.ops.pixel_mlp import pixel_mlp as pixel_mlp
from pixelgen_kernels.ops.pixel_modulate import pixel_modulate as pixel_modulate
from pixelgen_kernels.ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from pixelgen_kernels.ops.rms_norm_modulate import rms_norm_modulate as rms_norm_modulate
from pixelgen_kernels.ops.swiglu import swiglu as swiglu
from pixelgen_kernels.select import OP_NAMES as OP_NAMES
from pixelgen_kernels.select import Ops as Ops
from pixelgen_kernels.select import select as select
