"""REPA: features of the denoiser, projected, point where the encoder's features of the clean image point."""

from __future__ import annotations

from pixelgen_kernels import Ops
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Linear, SiLU, Linear, SiLU, Linear from the denoiser's width to the encoder's.

    State-dict keys ``{0,2,4}.{weight,bias}`` are the released
    ``diffusion_trainer.proj.0.{0,2,4}.{weight,bias}``.

    Args:
        feature_width: width C of the denoiser's features.
        hidden_width: width of the two hidden layers; 2048 in the published recipes.
        encoder_width: width D of the encoder's tokens.
    """

    def __init__(self, feature_width: int, hidden_width: int, encoder_width: int) -> None:
        super().__init__(
            nn.Linear(feature_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, encoder_width),
        )


def alignment(projected: Tensor, target: Tensor, *, ops: Ops) -> Tensor:
    """1 - cosine of projected features and encoder tokens, per sample (REPA, arXiv 2410.06940).

    Args:
        projected: (B, T, D) from ``Projector``.
        target: (B, T, D) encoder tokens of the clean image.
        ops: the kernels to use.

    Returns:
        (B,) fp32.
    """
    return ops.cosine_distance(projected, target)
