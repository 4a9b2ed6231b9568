"""What a frozen feature network is: two small interfaces, and what every one of them needs at its input."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn


class FrozenEncoder(nn.Module):
    """A feature network that is never trained: no parameter gradients, always in eval mode.

    Gradients still flow through it to its input. Subclasses end their constructor with ``freeze()``.
    """

    def freeze(self) -> None:
        """Stop and drop parameter gradients and switch to eval mode for good."""
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: a surrounding module that is switched to train mode must not change the features."""
        return self


class StageEncoder(FrozenEncoder):
    """Feature maps at several depths, for LPIPS.

    ``forward(x)`` takes images (B, C, H, W) in [-1, 1], not clamped, and returns a list of (B, C_i, H_i,
    W_i).
    """

    stage_widths: tuple[int, ...]

    @property
    def layer_weights(self) -> list[Tensor]:
        """One (C_i,) fp32 tensor per stage: how much each channel counts in LPIPS."""
        return [self.get_buffer(f"layer_weight_{i}") for i in range(len(self.stage_widths))]

    def register_layer_weights(self, weights: list[Tensor]) -> None:
        """Keep the (C_i,) channel weights as buffers, so that they follow the module to its device."""
        for i, weight in enumerate(weights):
            self.register_buffer(f"layer_weight_{i}", weight.detach().clone())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] to a list of (B, C_i, H_i, W_i)."""
        raise TypeError(f"{type(self).__name__}: a StageEncoder must define forward")


class TokenEncoder(FrozenEncoder):
    """One feature vector per image patch, for REPA and P-DINO.

    ``forward(x)`` takes images (B, C, H, W) in [-1, 1], not clamped, and returns (B, T, D) in raster order.
    """

    width: int

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to tokens (B, T, D)."""
        raise TypeError(f"{type(self).__name__}: a TokenEncoder must define forward")


def as_rgb(x: Tensor, function: str) -> Tensor:
    """Images (B, 1 or 3, H, W) with three channels; a grey image is repeated (a view, no copy).

    Raises:
        ValueError: x is not (B, 1, H, W) or (B, 3, H, W).
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{function}: x must have shape (B, 1 or 3, H, W), got {tuple(x.shape)}")
    return x.expand(-1, 3, -1, -1)
