"""patchify and unpatchify in the channel orders of the class-conditional model: first in, last out."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from pixelgen_kernels.patchify import patchify, patchify_ref, unpatchify, unpatchify_ref

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def cases(device: torch.device) -> Iterator[Case]:
    B = BATCH[device.type]
    for model, size in MODELS.items():
        S, P = size.image_size, size.P
        for dtype in DTYPES:
            moved = 2 * B * 3 * S * S * DTYPES[dtype].itemsize

            def image(device: torch.device, S: int = S, dtype: str = dtype) -> dict[str, Any]:
                return {"x": normal(B, 3, S, S, dtype=dtype, device=device)}

            def tokens(
                device: torch.device, T: int = (S // P) ** 2, D: int = 3 * P * P, dtype: str = dtype
            ) -> dict[str, Any]:
                return {"tokens": normal(B, T, D, dtype=dtype, device=device)}

            yield Case(
                op="patchify",
                shape=f"{model} B={B} C=3 H=W={S} P={P} first",
                dtype=dtype,
                fused=partial(patchify, patch_size=P, channel_order="first"),
                eager=partial(patchify_ref, patch_size=P, channel_order="first"),
                inputs=image,
                differentiable=("x",),
                fwd_bytes=moved,
                bwd_bytes=moved,
            )
            yield Case(
                op="unpatchify",
                shape=f"{model} B={B} C=3 H=W={S} P={P} last",
                dtype=dtype,
                fused=partial(unpatchify, patch_size=P, image_size=(S, S), channel_order="last"),
                eager=partial(unpatchify_ref, patch_size=P, image_size=(S, S), channel_order="last"),
                inputs=tokens,
                differentiable=("tokens",),
                fwd_bytes=moved,
                bwd_bytes=moved,
            )
