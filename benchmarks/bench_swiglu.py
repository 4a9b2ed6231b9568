"""swiglu as a JiT block calls it: on the packed projection of width 2 F, F = 2/3 of 4 C."""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.swiglu import swiglu, swiglu_ref

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def cases(device: torch.device) -> Iterator[Case]:
    B = BATCH[device.type]
    for model, size in MODELS.items():
        for dtype in DTYPES:
            T, F = size.T, 8 * size.C // 3

            def inputs(device: torch.device, T: int = T, F: int = F, dtype: str = dtype) -> dict[str, Any]:
                return {"x": normal(B, T, 2 * F, dtype=dtype, device=device)}

            half = B * T * F * DTYPES[dtype].itemsize
            yield Case(
                op="swiglu",
                shape=f"{model} B={B} T={T} F={F}",
                dtype=dtype,
                fused=swiglu,
                eager=swiglu_ref,
                inputs=inputs,
                differentiable=("x",),
                fwd_bytes=3 * half,
                bwd_bytes=5 * half,  # in: x, grad_y; out: grad_x
            )
