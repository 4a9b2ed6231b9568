"""flow_matching_loss as a training step calls it: x_pred in the dtype of the model, clean tokens in fp32."""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.flow_matching_loss import flow_matching_loss, flow_matching_loss_ref

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def cases(device: torch.device) -> Iterator[Case]:
    B = BATCH[device.type]
    for model, size in MODELS.items():
        T, D = (size.image_size // size.P) ** 2, 3 * size.P * size.P
        for dtype in DTYPES:

            def inputs(device: torch.device, T: int = T, D: int = D, dtype: str = dtype) -> dict[str, Any]:
                return {
                    "x_pred": normal(B, T, D, dtype=dtype, device=device),
                    "x": normal(B, T, D, dtype="fp32", device=device, seed=1),
                    "t": torch.linspace(0, 1, B, device=device),
                }

            x_pred_bytes, x_bytes = B * T * D * DTYPES[dtype].itemsize, B * T * D * 4
            yield Case(
                op="flow_matching_loss",
                shape=f"{model} B={B} T={T} D={D}",
                dtype=dtype,
                fused=flow_matching_loss,
                eager=flow_matching_loss_ref,
                inputs=inputs,
                differentiable=("x_pred",),
                fwd_bytes=x_pred_bytes + x_bytes,
                bwd_bytes=2 * x_pred_bytes + x_bytes,
            )
