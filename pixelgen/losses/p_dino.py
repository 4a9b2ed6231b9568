"""P-DINO: the prediction's patch tokens point where those of the clean image point."""

from __future__ import annotations

from pixelgen_kernels import Ops
from torch import Tensor


def p_dino(tokens: Tensor, target: Tensor, *, ops: Ops) -> Tensor:
    """1 - cosine of the tokens of prediction and clean image, per sample (PixelGen, arXiv 2602.02493).

    Args:
        tokens: (B, T, D) encoder tokens of the predicted image.
        target: (B, T, D) encoder tokens of the clean image.
        ops: the kernels to use.

    Returns:
        (B,) fp32.
    """
    return ops.cosine_distance(tokens, target)
