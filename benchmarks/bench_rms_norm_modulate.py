"""rms_norm_modulate as a JiT block calls it: shift and scale are chunks of one packed (B, 6C) projection."""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_ref

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def cases(device: torch.device) -> Iterator[Case]:
    B = BATCH[device.type]
    for model, size in MODELS.items():
        for dtype in DTYPES:
            T, C = size.T, size.C

            def inputs(device: torch.device, T: int = T, C: int = C, dtype: str = dtype) -> dict[str, Any]:
                packed = normal(B, 6 * C, dtype=dtype, device=device, seed=1)
                shift, scale, *_ = packed.chunk(6, -1)
                weight = 1 + normal(C, dtype="fp32", device=device, seed=2) / 4
                x = normal(B, T, C, dtype=dtype, device=device)
                return {"x": x, "shift": shift, "scale": scale, "weight": weight}

            element = DTYPES[dtype].itemsize
            rows, modulation = B * T * C * element, B * C * element
            yield Case(
                op="rms_norm_modulate",
                shape=f"{model} B={B} T={T} C={C}",
                dtype=dtype,
                fused=rms_norm_modulate,
                eager=rms_norm_modulate_ref,
                inputs=inputs,
                differentiable=("x", "shift", "scale", "weight"),
                fwd_bytes=2 * rows + 2 * modulation + 4 * C,
                # in: x, grad_y, scale, weight; out: grad_x, grad_shift, grad_scale, grad_weight
                bwd_bytes=3 * rows + 3 * modulation + 8 * C,
            )
