"""Where tokens come from: position tables, and patches, times and labels as vectors.

Module and parameter names follow the published PixelGen code, so that its checkpoints load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_position_table(width: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sine-cosine table (DiT, arXiv 2212.09748).

    The first half of the channels encodes the column, the second half the row; inside each half all sines
    come first, then all cosines, at frequencies 10000^(-k / (C/4)). Computed in float64.

    Args:
        width: channels C, a multiple of 4.
        rows, columns: of the patch grid.

    Returns:
        (1, rows * columns, C) fp32 in raster order.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position[:, None] * frequency  # (T, C/4)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = _raster(rows, columns)
    return torch.cat([encode(column), encode(row)], dim=1).float()[None]


def rope_table(head_dim: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Axial RoPE: the first half of the head rotates with the row, the second half with the column.

    Pair j of an axis turns by ``position * 10000^(-2j / (D/2))`` with integer positions.

    Args:
        head_dim: head dimension D, a multiple of 4.
        rows, columns: of the patch grid.

    Returns:
        cos and sin, each (rows * columns, D / 2) fp32, for adjacent channel pairs (2i, 2i + 1).
    """
    pairs = torch.arange(head_dim // 4, dtype=torch.float64, device="cpu")
    frequency = 10000.0 ** (-2.0 * pairs / (head_dim // 2))
    row, column = _raster(rows, columns)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)
    return angle.cos().float(), angle.sin().float()


def _raster(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    return row.flatten(), column.flatten()


class PositionTable(nn.Module):
    """Constant fp32 tables that follow the model's device but never its dtype, and stay out of checkpoints.

    A pure bf16 model would otherwise round its angles to 8 bits.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = (head_dim, rows, columns)
        cos, sin = rope_table(*self.shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Computed again instead of converted: a cast loses digits, and leaving meta there is nothing to copy.
        device = fn(self.cos).device
        cos, sin = rope_table(*self.shape)
        self.cos, self.sin = cos.to(device), sin.to(device)
        return self

    def forward(self) -> tuple[Tensor, Tensor]:
        """Cos and sin, each (T, D / 2) fp32."""
        return self.cos, self.sin


class PatchProjection(nn.Conv2d):
    """A convolution whose kernel covers its stride, applied to what it would unfold: a matrix product.

    The parameters have convolution shapes as in the published checkpoints.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, in_channels * kernel area), channel first, to (B, T, out_channels)."""
        return F.linear(input.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Patches to tokens: one projection, or two with a bottleneck between them."""

    def __init__(self, channels: int, patch_size: int, width: int, bottleneck_dim: int) -> None:
        super().__init__()
        inner = bottleneck_dim or width
        self.proj1 = PatchProjection(channels, inner, patch_size, patch_size, bias=bottleneck_dim == 0)
        self.proj2 = PatchProjection(inner, width, 1) if bottleneck_dim else None

    def reset_parameters(self) -> None:
        """Xavier-uniform weights seen as matrices, zero biases."""
        for proj in (self.proj1, self.proj2):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight.flatten(1))
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, P*P*channels) channel-first patches to (B, T, C)."""
        x = self.proj1(tokens)
        return x if self.proj2 is None else self.proj2(x)


class TimestepEmbedder(nn.Module):
    """Time in [0, 1] to a vector: 128 cosines and 128 sines of t * max_period^(-k/128), then an MLP."""

    num_features = 256

    def __init__(self, width: int, max_period: float = 10000.0) -> None:
        super().__init__()
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(self.num_features, width), nn.SiLU(), nn.Linear(width, width))

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) weights, zero biases."""
        for name, parameter in self.mlp.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, C). The features are fp32 whatever the weights are."""
        half = self.num_features // 2
        frequency = torch.exp(
            torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(self.max_period) / half)
        )
        angle = t.float()[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class index to a vector; row ``num_classes`` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def reset_parameters(self) -> None:
        """Normal(0, 0.02)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) int64 to (B, C)."""
        return self.embedding_table(y)
