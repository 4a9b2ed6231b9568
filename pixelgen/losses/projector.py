"""The network between the denoiser's features and the tokens that they are aligned with."""

from __future__ import annotations

from torch import nn


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
