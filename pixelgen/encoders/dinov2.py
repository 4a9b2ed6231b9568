"""DINOv2 patch tokens: timm's ViT with the position table interpolated as the public hub model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgen.encoders.base import TokenEncoder, as_rgb, check_dtype
from pixelgen.encoders.weights import load_weights
from pixelgen.errors import UserError

# Our name to timm's.
MODELS = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
}
# The hub's own file, which is in torch.hub's cache once the hub's model has been loaded.
URL = "https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
_NAMES = "cls_token, pos_embed, patch_embed.proj.weight, blocks.0.norm1.weight, ..., timm or hub naming"
_PATCH = 14


class DINOv2(TokenEncoder):
    """Patch tokens of a DINOv2 ViT after its final norm, one per patch of the denoiser.

    Args:
        name: ``dinov2_vits14``, ``dinov2_vitb14``, ``dinov2_vitl14`` or ``dinov2_vitg14``.
        weights: ``"pretrained"`` (the hub's file, which torch.hub downloads once), the path of a file with
            timm's or the hub's naming, ``"random"`` (seeded, with a warning), or None: as ``VGG16``.
        patch_size: pixels of the image per token. The image is resized so that this many pixels become
            DINOv2's 14: for the published patch size 16, to 14/16 of its side.
        layer: number of blocks to run, counted from 1; the final norm is applied in any case. None: all.
        seed: seed of the random weights.

    Raises:
        UserError: unknown name, layer out of range, weights cannot be downloaded, or the file is missing,
            truncated or of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "dinov2_vitb14",
        weights: str | Path | None = "pretrained",
        *,
        patch_size: int = 16,
        layer: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        import timm

        if name not in MODELS:
            raise UserError(f"DINOv2: name must be one of {', '.join(MODELS)}, got {name!r}")
        if patch_size < 1:
            raise UserError(f"DINOv2: patch_size must be at least 1, got {patch_size}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit: Any = timm.create_model(MODELS[name], num_classes=0, dynamic_img_size=True)
        if weights is not None:
            load_weights(
                vit,
                weights,
                url=URL.format(name=name),
                what=name,
                option="loss.tokens_weights",
                names=_NAMES,
                own_key=_timm_key,
            )
        depth = len(vit.blocks)
        if layer is not None and not 1 <= layer <= depth:
            raise UserError(f"DINOv2: layer must lie in [1, {depth}] for {name}, got {layer}")
        vit.blocks = vit.blocks[:layer]
        self.vit: Any = vit
        self.patch_size = patch_size
        self.width = vit.embed_dim
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Patch tokens of images.

        Args:
            x: (B, 3, H, W), or (B, 1, H, W) which is repeated, in [-1, 1], not clamped; sides are multiples
                of ``patch_size``.

        Returns:
            (B, T, D) with T = (H / patch_size) * (W / patch_size), in raster order.

        Raises:
            ValueError: another shape, or sides that ``patch_size`` does not divide.
            TypeError: integer images, or a wider dtype than the network's.
        """
        x = as_rgb(x, "DINOv2")
        check_dtype(x, self.mean.dtype, "DINOv2")
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"DINOv2: image sides must be multiples of patch_size {self.patch_size}, "
                f"got {(height, width)}"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        # Normalised first, then resized: the order of the published code.
        x = ((x + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, size=(grid[0] * _PATCH, grid[1] * _PATCH), mode="bicubic", antialias=False)
        tokens = self.vit.patch_embed(x).flatten(1, 2)  # (B, T, D)
        tokens = torch.cat(
            [self.vit.cls_token.expand(len(x), -1, -1), tokens.to(self.vit.cls_token.dtype)], dim=1
        )
        tokens = tokens + interpolate_position_table(self.vit.pos_embed, grid)
        for block in self.vit.blocks:
            tokens = block(tokens)
        return self.vit.norm(tokens)[:, 1:]


def _timm_key(key: str) -> str | None:
    """A key of the hub's naming in timm's; they differ in the SwiGLU of the giant model only."""
    if key == "mask_token":
        return None
    return key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def interpolate_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's position table for another grid, as ``facebookresearch/dinov2``'s hub models compute it.

    Bicubic, not antialiased, sampled at the scale factor (side + 0.1) / old side. timm interpolates with
    antialias and without the 0.1, which gives other features.

    Args:
        table: (1, 1 + M * M, D), the class token's entry first.
        grid: rows and columns of the new patch grid.

    Returns:
        (1, 1 + rows * columns, D) in the dtype of ``table``.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale_factor = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    patches = F.interpolate(patches, scale_factor=scale_factor, mode="bicubic", antialias=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([table[:, :1].float(), patches], dim=1).to(table.dtype)
