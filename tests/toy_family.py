"""A family of denoisers that the package does not have, in one file: all that an addition has to bring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelgen.conditions import Condition
from pixelgen.models.denoiser import Denoiser, Kernels
from pixelgen.models.families import Architecture, Family, register


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Architecture):
    """Architecture of a stack of gated layers that predicts the velocity.

    Args:
        width: channels of a token.
        depth: number of blocks.
        patch_size: side of a square patch in pixels.
        slope: factor of every block's branch.
        image_size: image side in pixels.
        channels: image channels.
        num_classes: classes of the data.
    """

    slope: float = 1.0


class ToyBlock(nn.Module):
    checkpointing = "none"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.slope = config.slope
        self.mix = nn.Linear(config.width, config.width)
        self.gate = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        around = x.mean(1, keepdim=True)
        return x + self.slope * torch.tanh(self.mix(x + around)) * self.gate(c).sigmoid()[:, None]


class Toy(Denoiser):
    """Patches in and out have the channel last, unlike those of JiT."""

    prediction = "velocity"
    input_order = "last"
    config: ToyConfig

    def __init__(self, config: ToyConfig, kernels: Kernels = "auto") -> None:
        super().__init__(config, kernels)
        patch_dim = config.patch_size**2 * config.channels
        self.embed = nn.Linear(patch_dim, config.width)
        self.time = nn.Linear(1, config.width)
        self.label = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.depth))
        self.out = nn.Linear(config.width, patch_dim)

    def null(self, condition: Condition) -> Condition:
        return {"label": torch.full_like(condition["label"], self.config.num_classes)}

    def fsdp_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def balance_weight(self) -> Tensor:
        return self.out.weight

    def forward_tokens(
        self, tokens: Tensor, grid: tuple[int, int], t: Tensor, condition: Condition, tap: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x = self.embed(tokens.to(self.embed.weight.dtype))
        c = self.time(t[:, None]) + self.label(condition["label"])
        features = None
        for index, block in enumerate(self.blocks):
            if index == tap:
                features = x
            x = block(x, c)
        return self.out(x), features


SIZES = {"toy/2": ToyConfig(width=32, depth=3, patch_size=2)}
register(Family(name="toy", config=ToyConfig, sizes=SIZES, module="toy_family:Toy"))
