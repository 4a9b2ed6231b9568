"""qk_norm_rope as a JiT block calls it: on the packed projection, in-context tokens first."""

from collections.abc import Iterator
from typing import Any

import torch
from pixelgen_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def cases(device: torch.device) -> Iterator[Case]:
    B = BATCH[device.type]
    for model, size in MODELS.items():
        for dtype in DTYPES:
            T, N, prefix = size.T, size.N, size.prefix
            D = size.C // N

            def inputs(
                device: torch.device,
                T: int = T,
                N: int = N,
                D: int = D,
                prefix: int = prefix,
                dtype: str = dtype,
            ) -> dict[str, Any]:
                angle = 3 * normal(T - prefix, D // 2, dtype="fp32", device=device, seed=1)
                return {
                    "qkv": normal(B, T, 3 * N * D, dtype=dtype, device=device),
                    "q_weight": 1 + normal(D, dtype="fp32", device=device, seed=2) / 4,
                    "k_weight": 1 + normal(D, dtype="fp32", device=device, seed=3) / 4,
                    "cos": angle.cos(),
                    "sin": angle.sin(),
                    "num_heads": N,
                    "num_prefix_tokens": prefix,
                }

            third = B * T * N * D * DTYPES[dtype].itemsize
            tables = 4 * (2 * D + (T - prefix) * D)  # weights and angles, fp32
            yield Case(
                op="qk_norm_rope",
                shape=f"{model} B={B} T={T} N={N} D={D}",
                dtype=dtype,
                fused=qk_norm_rope,
                eager=qk_norm_rope_ref,
                inputs=inputs,
                differentiable=("qkv", "q_weight", "k_weight"),
                fwd_bytes=6 * third + tables,
                # in: grad_q, grad_k, grad_v, q, k (v is not needed), tables; out: grad_qkv, two of weights
                bwd_bytes=8 * third + tables + 8 * D,
            )
