"""lpips_distance on the feature maps of VGG16's five stages, as the perceptual branch of a step calls it.

256 pixels on a GPU, 128 on a CPU. The branch gathers the samples that pass the gate: at the paper's
distribution of times 52 % of a batch, half of which fills the buckets of a GPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.lpips_distance import lpips_distance, lpips_distance_ref

from benchmarks.case import BATCH, DTYPES, Case, normal

IMAGE_SIZE = {"cpu": 128, "cuda": 256}
SAMPLES = {"cpu": BATCH["cpu"], "cuda": BATCH["cuda"] // 2}
# last layer -> (channels, image side / map side)
STAGES = {
    "relu1_2": (64, 1),
    "relu2_2": (128, 2),
    "relu3_3": (256, 4),
    "relu4_3": (512, 8),
    "relu5_3": (512, 16),
}
# VGG16 runs channels-last on a GPU
MEMORY_FORMAT = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}


def cases(device: torch.device) -> Iterator[Case]:
    B, memory_format = SAMPLES[device.type], MEMORY_FORMAT[device.type]
    for stage, (C, shrinkage) in STAGES.items():
        side = IMAGE_SIZE[device.type] // shrinkage
        for dtype in DTYPES:

            def inputs(
                device: torch.device, C: int = C, side: int = side, dtype: str = dtype
            ) -> dict[str, Any]:
                pred, target = (
                    normal(B, C, side, side, dtype=dtype, device=device, seed=seed).relu() for seed in (0, 1)
                )
                return {
                    "pred": pred.to(memory_format=memory_format),
                    "target": target.to(memory_format=memory_format),
                    "weight": normal(C, dtype="fp32", device=device, seed=2).abs(),
                }

            map_bytes = B * C * side * side * DTYPES[dtype].itemsize
            yield Case(
                op="lpips_distance",
                shape=f"VGG16-{stage} B={B} C={C} H={side} W={side}",
                dtype=dtype,
                fused=lpips_distance,
                eager=lpips_distance_ref,
                inputs=inputs,
                differentiable=("pred",),
                fwd_bytes=2 * map_bytes,
                bwd_bytes=3 * map_bytes,
            )
