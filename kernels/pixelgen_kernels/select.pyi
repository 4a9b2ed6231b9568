# Written by `python tests/ops/test_stubs.py`, which is also the test that they are up to date.

from typing import Literal

import pixelgen_kernels.ops.cosine_distance
import pixelgen_kernels.ops.flow_matching_loss
import pixelgen_kernels.ops.gate_residual_norm_modulate
import pixelgen_kernels.ops.lpips_distance
import pixelgen_kernels.ops.noise_patchify
import pixelgen_kernels.ops.patchify
import pixelgen_kernels.ops.philox
import pixelgen_kernels.ops.pixel_mlp
import pixelgen_kernels.ops.pixel_modulate
import pixelgen_kernels.ops.qk_norm_rope
import pixelgen_kernels.ops.rms_norm_modulate
import pixelgen_kernels.ops.swiglu

OP_NAMES: tuple[str, ...]

class Ops:
    cosine_distance = staticmethod(pixelgen_kernels.ops.cosine_distance.cosine_distance)
    flow_matching_loss = staticmethod(pixelgen_kernels.ops.flow_matching_loss.flow_matching_loss)
    gate_residual_norm_modulate = staticmethod(
        pixelgen_kernels.ops.gate_residual_norm_modulate.gate_residual_norm_modulate
    )
    lpips_distance = staticmethod(pixelgen_kernels.ops.lpips_distance.lpips_distance)
    noise_patchify = staticmethod(pixelgen_kernels.ops.noise_patchify.noise_patchify)
    patchify = staticmethod(pixelgen_kernels.ops.patchify.patchify)
    philox_normal = staticmethod(pixelgen_kernels.ops.philox.philox_normal)
    philox_uniform = staticmethod(pixelgen_kernels.ops.philox.philox_uniform)
    pixel_mlp = staticmethod(pixelgen_kernels.ops.pixel_mlp.pixel_mlp)
    pixel_modulate = staticmethod(pixelgen_kernels.ops.pixel_modulate.pixel_modulate)
    qk_norm_rope = staticmethod(pixelgen_kernels.ops.qk_norm_rope.qk_norm_rope)
    rms_norm_modulate = staticmethod(pixelgen_kernels.ops.rms_norm_modulate.rms_norm_modulate)
    swiglu = staticmethod(pixelgen_kernels.ops.swiglu.swiglu)
    unpatchify = staticmethod(pixelgen_kernels.ops.patchify.unpatchify)

def select(kernels: Literal["auto", "eager"]) -> Ops: ...
