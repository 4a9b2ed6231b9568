"""The two interfaces of frozen feature networks, and checks of their input."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn


class FrozenEncoder(nn.Module):
    """A feature network that is never trained: no parameter gradients, always in eval mode.

    Gradients still flow through it to its input. Subclasses end their constructor with ``freeze()``.
    """

    def freeze(self) -> None:
        """Stop and drop parameter gradients and switch to eval mode for good."""
        self.requires_grad_(False)
        self.zero_grad()
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
            self.register_buffer(f"layer_weight_{i}", weight)


class TokenEncoder(FrozenEncoder):
    """One feature vector per image patch, for REPA and P-DINO.

    ``forward(x)`` takes images (B, C, H, W) in [-1, 1], not clamped, and returns (B, T, D) in raster order.
    """

    width: int


def as_rgb(x: Tensor, function: str) -> Tensor:
    """Images (B, 1 or 3, H, W) with three channels; a grey image is repeated (a view, no copy)."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{function}: x must have shape (B, 1 or 3, H, W), got {tuple(x.shape)}")
    return x.expand(-1, 3, -1, -1)


def check_dtype(x: Tensor, dtype: torch.dtype, function: str) -> None:
    """A TypeError for what a network of ``dtype`` cannot take: integers, wider floats outside autocast."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the meta device has no autocast
        dtype = torch.promote_types(dtype, torch.float32)  # autocast narrows float32 by itself
    if not x.is_floating_point() or torch.promote_types(x.dtype, dtype) != dtype:
        raise TypeError(
            f"{function}: x must be images in [-1, 1], of {dtype} as the network or a narrower floating "
            f"dtype, got {x.dtype}"
        )


def check_range(x: Tensor, function: str) -> None:
    """Refuse clean images in [0, 255]; on the CPU only, as the host of a GPU would have to wait.

    A ValueError for values beyond 10: resized images exceed [-1, 1] by less. NaN pass and show in the loss.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return
    low, high = (float(value) for value in x.detach().aminmax())
    if low < -10 or high > 10:
        raise ValueError(
            f"{function}: x must be images in [-1, 1], got values from {low:g} to {high:g}; uint8 images are "
            "scaled by x / 127.5 - 1"
        )
