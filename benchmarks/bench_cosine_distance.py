"""cosine_distance as P-DINO calls it: tokens of the prediction against those of the image.

One case per size of DINOv2; an image of 256 pixels is resized to 16 x 16 patches.
"""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.cosine_distance import cosine_distance, cosine_distance_ref

from benchmarks.case import BATCH, DTYPES, Case, normal

SAMPLES = {"cpu": BATCH["cpu"], "cuda": BATCH["cuda"] // 2}
WIDTHS = {"DINOv2-S": 384, "DINOv2-B": 768, "DINOv2-L": 1024}
T = 256


def cases(device: torch.device) -> Iterator[Case]:
    B = SAMPLES[device.type]
    for encoder, D in WIDTHS.items():
        for dtype in DTYPES:

            def inputs(device: torch.device, D: int = D, dtype: str = dtype) -> dict[str, Any]:
                return {
                    "pred": normal(B, T, D, dtype=dtype, device=device),
                    "target": normal(B, T, D, dtype=dtype, device=device, seed=1),
                }

            tokens_bytes = B * T * D * DTYPES[dtype].itemsize
            yield Case(
                op="cosine_distance",
                shape=f"{encoder} B={B} T={T} D={D}",
                dtype=dtype,
                fused=cosine_distance,
                eager=cosine_distance_ref,
                inputs=inputs,
                differentiable=("pred",),
                fwd_bytes=2 * tokens_bytes,
                bwd_bytes=3 * tokens_bytes,
            )
