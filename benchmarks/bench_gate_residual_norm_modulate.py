"""gate_residual_norm_modulate as a JiT block calls it: gate, shift and scale are chunks of one (B, 6C)."""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def cases(device: torch.device) -> Iterator[Case]:
    B = BATCH[device.type]
    for model, size in MODELS.items():
        for dtype in DTYPES:
            T, C = size.T, size.C

            def inputs(device: torch.device, T: int = T, C: int = C, dtype: str = dtype) -> dict[str, Any]:
                packed = normal(B, 6 * C, dtype=dtype, device=device, seed=1)
                _, _, gate, shift, scale, _ = packed.chunk(6, -1)
                weight = 1 + normal(C, dtype="fp32", device=device, seed=2) / 4
                x = normal(B, T, C, dtype=dtype, device=device)
                y = normal(B, T, C, dtype=dtype, device=device, seed=3)
                return {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "weight": weight}

            element = DTYPES[dtype].itemsize
            rows, modulation = B * T * C * element, B * C * element
            yield Case(
                op="gate_residual_norm_modulate",
                shape=f"{model} B={B} T={T} C={C}",
                dtype=dtype,
                fused=gate_residual_norm_modulate,
                eager=gate_residual_norm_modulate_ref,
                inputs=inputs,
                differentiable=("x", "y", "gate", "shift", "scale", "weight"),
                # in: x, y, gate, shift, scale, weight; out: residual, normed
                fwd_bytes=4 * rows + 3 * modulation + 4 * C,
                # in: grad_residual, grad_normed, residual, y, gate, scale, weight;
                # out: grad_x, grad_y, grad_gate, grad_shift, grad_scale, grad_weight
                bwd_bytes=6 * rows + 5 * modulation + 8 * C,
            )
