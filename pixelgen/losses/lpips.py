"""LPIPS: distance of unit-normalised feature maps, channels weighted by how people judge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pixelgen_kernels import Ops
from torch import Tensor, nn

from pixelgen.encoders.base import StageEncoder, check_range


class LPIPS(nn.Module):
    """Sum over stages of the ``lpips_distance`` op (arXiv 1801.03924), per sample.

    Args:
        stages: the frozen feature maps and their channel weights.
        ops: the kernels to use.
        resize_from_patch: None compares the images as they are. P resizes both first to (side * 16) // P,
            bilinear and antialiased, as the published recipe does for P other than 16, so that VGG16 sees a
            patch as 16 pixels.
    """

    def __init__(self, stages: StageEncoder, *, ops: Ops, resize_from_patch: int | None = None) -> None:
        super().__init__()
        self.stages = stages
        self.ops = ops
        self.resize_from_patch = resize_from_patch

    def forward(self, x_pred: Tensor, x: Tensor) -> Tensor:
        """Distance of prediction and clean image.

        Args:
            x_pred: (B, C, H, W) in [-1, 1], not clamped; receives the gradient.
            x: (B, C, H, W) in [-1, 1].

        Returns:
            (B,) fp32.

        Raises:
            ValueError: other shapes, or on the CPU an ``x`` far outside [-1, 1].
            TypeError: a dtype that the network does not take.
        """
        if x_pred.shape != x.shape:
            raise ValueError(
                f"LPIPS: x_pred and x must have one shape, got {tuple(x_pred.shape)} and {tuple(x.shape)}"
            )
        check_range(x, "LPIPS")
        with torch.no_grad():
            target = self.encode(x)
        return self.distance(self.encode(x_pred), target)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps of images (B, C, H, W), resized first where that is asked for.

        Raises:
            ValueError: images of which resizing leaves nothing.
        """
        if self.resize_from_patch is not None:
            height, width = ((side * 16) // self.resize_from_patch for side in x.shape[-2:])
            if not height or not width:
                raise ValueError(
                    f"LPIPS: image sides must be at least {self.resize_from_patch / 16:g} to be resized from "
                    f"patches of {self.resize_from_patch} to 16, got {tuple(x.shape[-2:])}"
                )
            if (height, width) != tuple(x.shape[-2:]):
                x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True)
        return self.stages(x)

    def distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        """Sum of the stages' distances, (B,) fp32; gradient for ``maps`` only."""
        # The op is fp32 inside whatever it is given: unit-normalising in half precision gives NaN.
        distances = [
            self.ops.lpips_distance(p, q, weight)
            for p, q, weight in zip(maps, target, self.stages.layer_weights, strict=True)
        ]
        return torch.stack(distances).sum(0)
