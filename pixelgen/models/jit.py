"""JiT, the class-conditional denoiser of PixelGen (arXiv 2511.13720, 2602.02493): x-prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pixelgen.conditions import Condition
from pixelgen.models.denoiser import Denoiser, Kernels
from pixelgen.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    PositionTable,
    TimestepEmbedder,
    sincos_position_table,
)
from pixelgen.models.layers import (
    Attention,
    Block,
    FinalLayer,
    Pending,
    RMSNorm,
    SwiGLU,
    adaln,
    add_pending,
    packed_modulations,
)
from pixelgen.models.sizes import ModelConfig


class JiT(Denoiser):
    """A plain transformer on pixel patches with AdaLN and in-context class tokens.

    Parameter names equal those of the published PixelGen code. A fresh model predicts exact zeros: every
    AdaLN output and the final projection start at zero.

    Args:
        config: the architecture.
        kernels: ``"auto"`` for the fused ops, ``"eager"`` for plain PyTorch; same parameters, same results up
            to rounding.
    """

    class_table = "y_embedder.embedding_table.weight"
    config: ModelConfig
    pos_embed: Tensor

    def __init__(self, config: ModelConfig, kernels: Kernels = "auto") -> None:
        super().__init__(config, kernels)
        rows, columns = config.grid
        self.x_embedder = PatchEmbed(config.channels, config.patch_size, config.width, config.bottleneck_dim)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        # A buffer, not a parameter as in the published code: it is never trained. The key is the same.
        self.register_buffer("pos_embed", torch.empty(1, config.num_tokens, config.width))
        self.rope = PositionTable(config.head_dim, rows, columns)
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, config.width))
        self.blocks = nn.ModuleList(self._block(index) for index in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_dim, self.ops)
        self.reset_parameters()

    def _block(self, index: int) -> Block:
        config = self.config
        # the middle half drops out
        is_middle = index in range(config.depth // 4, config.depth // 4 * 3)
        proj_dropout = config.proj_dropout if is_middle else 0.0
        attention = Attention(
            config.width,
            config.heads,
            self.ops,
            attn_dropout=config.attn_dropout if is_middle else 0.0,
            proj_dropout=proj_dropout,
        )
        mlp = SwiGLU(config.width, config.mlp_width, proj_dropout, self.ops)
        return Block(config.width, attention, mlp, adaln(config.width, 6 * config.width), self.ops)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills every parameter and table; call it again after ``to_empty`` on a model built on meta."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        self.x_embedder.reset_parameters()
        self.t_embedder.reset_parameters()
        self.y_embedder.reset_parameters()
        if self.config.in_context_len:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        projections = [cast("nn.Sequential", module)[1] for module in self.adaln_modules()]
        for layer in (*cast("list[nn.Linear]", projections), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_position_table(self.config.width, *self.config.grid))

    def adaln_modules(self) -> list[nn.Module]:
        """Those of the blocks and of the final layer."""
        blocks = cast("list[Block]", self.fsdp_units())
        return [*(block.adaLN_modulation for block in blocks), self.final_layer.adaLN_modulation]

    def null(self, condition: Condition) -> Condition:
        """The label ``num_classes``."""
        return {"label": torch.full_like(condition["label"], self.config.num_classes)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, bool | str] | None:
        """A JiT has no such options."""
        return {} if "blocks.0.attn.qkv.weight" in state else None

    def fsdp_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def balance_weight(self) -> Tensor:
        """The weight of the projection to pixels."""
        return self.final_layer.linear.weight

    def tables(self) -> dict[str, Tensor]:
        """Positions, which depend on the resolution."""
        return {"pos_embed": sincos_position_table(self.config.width, *self.config.grid)}

    def resized(
        self, name: str, given: Tensor, own: Tensor, classes: Mapping[int, int]
    ) -> tuple[Tensor, str] | None:
        """Other classes; another number of channels, over which weights are averaged: grey stays grey."""
        if name == self.class_table:
            return self._other_classes(given, own, classes)
        P, channels = self.config.patch_size, self.config.channels
        if name == "x_embedder.proj1.weight" and given.shape[::2] == own.shape[::2]:
            given_channels = given.shape[1]
            value = given.mean(1, keepdim=True).expand(own.shape) * (given_channels / channels)
            return value, f"{given_channels} channels to {channels}"
        if name.startswith("final_layer.linear.") and len(given) % P**2 == 0:
            pixels = given.unflatten(0, (P**2, -1))  # the channel is the last index of a patch's values
            if given.shape[1:] != own.shape[1:] or pixels.shape[1] not in (1, 3):
                return None
            value = pixels.mean(1, keepdim=True).expand(-1, channels, *given.shape[1:]).flatten(0, 1)
            return value, f"{pixels.shape[1]} channels to {channels}"
        return None

    def forward_tokens(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        t: Tensor,
        condition: Condition,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Denoiser``. The condition is ``{"label": (B,) int64}`` in [0, num_classes].

        The features are the input of block ``tap`` without the in-context tokens.
        """
        config = self.config
        if grid != config.grid:
            raise ValueError(f"JiT: the grid must be {config.grid}, as image_size says, got {grid}")
        if tap is not None and not 0 <= tap < config.depth:
            raise ValueError(f"JiT: tap must lie in [0, {config.depth}), got {tap}")
        label = self.y_embedder(condition["label"])  # (B, C)
        c = self.t_embedder(t) + label
        x = self.x_embedder(tokens)
        # The residual stream has the embedding's dtype (bf16 under autocast) from first block to last.
        x = x + self.pos_embed.to(x.dtype)
        rope = self.rope()
        modulations = packed_modulations(c, self.adaln_modules(), x.dtype)
        prefix, features = 0, None
        pending: Pending | None = None
        for index, block in enumerate(self.blocks):
            is_start = config.in_context_len > 0 and index == config.in_context_start
            if is_start or index == tap:  # both need the sum itself
                x, pending = add_pending(x, pending), None
            if index == tap:
                features = x[:, prefix:]
            if is_start:
                prefix = config.in_context_len
                x = torch.cat([(label[:, None] + self.in_context_posemb).to(x.dtype), x], dim=1)
            x, pending = block(x, pending, c, rope, prefix, modulations[index])
        if pending is not None:
            branch, gate = pending
            pending = branch[:, prefix:], gate
        return self.final_layer(x[:, prefix:], pending, c, modulations[-1]), features
