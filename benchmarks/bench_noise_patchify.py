"""noise_patchify as a training step calls it, on the uint8 images of the loader, with the clean tokens.

The noise is given, in the dtype of the tokens, or drawn inside. Eager draws it with integer arithmetic on
whole tensors.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from pixelgen_kernels.noise_patchify import noise_patchify, noise_patchify_ref
from torch import Tensor

from benchmarks.case import BATCH, DTYPES, MODELS, Case, normal


def uint8_images(B: int, size: int, device: torch.device) -> Tensor:
    """(B, 3, size, size), the same values on every device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (B, 3, size, size), generator=generator, dtype=torch.uint8).to(device)


def cases(device: torch.device) -> Iterator[Case]:
    for model, size in MODELS.items():
        for dtype in DTYPES:
            yield from _cases(BATCH[device.type], model, size.image_size, size.P, dtype)


def _cases(B: int, model: str, S: int, P: int, dtype: str) -> Iterator[Case]:
    count = B * 3 * S * S
    options = {"patch_size": P, "return_clean": True, "dtype": DTYPES[dtype]}
    token_bytes = count * (DTYPES[dtype].itemsize + 4)  # the clean tokens are fp32

    def given(device: torch.device) -> dict[str, Any]:
        return {
            "image": uint8_images(B, S, device),
            "t": torch.linspace(0, 1, B, device=device),
            "noise": normal(B, 3, S, S, dtype=dtype, device=device),
        }

    def philox(device: torch.device) -> dict[str, Any]:
        return {
            "image": uint8_images(B, S, device),
            "t": torch.linspace(0, 1, B, device=device),
            "seed": 0,
            "step": 1,
            "sample_index": torch.arange(B, device=device),
        }

    for source, inputs, noise_bytes in (
        ("given", given, count * DTYPES[dtype].itemsize),
        ("philox", philox, 0),
    ):
        yield Case(
            op="noise_patchify",
            shape=f"{model} B={B} C=3 H=W={S} P={P} noise={source}",
            dtype=dtype,
            fused=partial(noise_patchify, **options),
            eager=partial(noise_patchify_ref, **options),
            inputs=inputs,
            differentiable=(),
            fwd_bytes=count + noise_bytes + token_bytes,
            bwd_bytes=0,
        )
