"""JiT, the class-conditional denoiser of PixelGen (arXiv 2511.13720, 2602.02493): x-prediction."""

from __future__ import annotations

from typing import Literal, cast

import torch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.models.layers import (
    Block,
    Checkpointing,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    Pending,
    PositionTable,
    RMSNorm,
    TimestepEmbedder,
    add_pending,
    packed_modulations,
    sincos_position_table,
)
from pixelgen.models.sizes import ModelConfig


class JiT(nn.Module):
    """A plain transformer on pixel patches with AdaLN and in-context class tokens.

    Parameter names equal those of the published PixelGen code. A fresh model predicts exact zeros: every
    AdaLN output and the final projection start at zero.

    Args:
        config: the architecture.
        kernels: ``"auto"`` for the fused ops, ``"eager"`` for plain PyTorch; same parameters, same results up
            to rounding.
    """

    pos_embed: Tensor

    def __init__(self, config: ModelConfig, kernels: Literal["auto", "eager"] = "auto") -> None:
        super().__init__()
        self.config = config
        self.ops = select(kernels)
        rows, columns = config.grid
        self.x_embedder = PatchEmbed(config.channels, config.patch_size, config.width, config.bottleneck_dim)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        # A buffer, not a parameter as in the published code: it is never trained. The key is the same.
        self.register_buffer("pos_embed", torch.empty(1, config.num_tokens, config.width))
        self.rope = PositionTable(config.head_dim, rows, columns)
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, config.width))
        middle = range(config.depth // 4, config.depth // 4 * 3)  # the blocks with dropout
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.mlp_width,
                attn_dropout=config.attn_dropout if index in middle else 0.0,
                proj_dropout=config.proj_dropout if index in middle else 0.0,
                ops=self.ops,
            )
            for index in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.patch_dim, self.ops)
        self.reset_parameters()

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
        for layer in (*(module[1] for module in self._adaln_modules()), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_position_table(self.config.width, *self.config.grid))

    def checkpoint_blocks(self, mode: Checkpointing) -> None:
        """Chooses what a block's backward pass computes again instead of keeping it.

        Args:
            mode: ``"none"``; ``"selective"``: all but the outputs of matrix products and attention; or
                ``"full"``: everything but the block's input.
        """
        for block in self._blocks():
            block.checkpointing = mode

    def compile_blocks(self) -> None:
        """Compiles the forward pass of every block by itself; equal blocks share their code.

        They differ in dropout, in class tokens, and in whether a branch is pending, each in training and in
        evaluation: more variants than PyTorch compiles of one function by default, after which it would run
        the others uncompiled. Hooks on the blocks, such as those that gather sharded weights, stay outside.
        """
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for block in self._blocks():
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _adaln_modules(self) -> list[nn.Sequential]:
        return [module.adaLN_modulation for module in (*self._blocks(), self.final_layer)]

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, feature_layer: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts the clean image from a noisy one.

        Args:
            x_t: (B, channels, H, W) noisy image, H and W as in the configuration.
            t: (B,) time in [0, 1]; 0 is noise, 1 is data.
            y: (B,) int64 labels in [0, num_classes]; ``num_classes`` is the null label.
            feature_layer: L in [0, depth): also return the input of block L without the in-context tokens.

        Returns:
            x_pred (B, channels, H, W), and with ``feature_layer`` the features (B, T, C).

        Raises:
            ValueError: an image of another shape, or no such layer.
        """
        config = self.config
        expected = (config.channels, *config.image_height_width)
        if x_t.ndim != 4 or tuple(x_t.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"JiT: x_t must have shape (B, {shape}), got {tuple(x_t.shape)}")
        tokens = self.ops.patchify(x_t, config.patch_size, channel_order="first")
        x_pred, features = self.forward_tokens(tokens, t, y, feature_layer)
        x_pred = self.ops.unpatchify(
            x_pred, config.patch_size, config.image_height_width, channel_order="last"
        )
        return x_pred if features is None else (x_pred, features)

    def forward_tokens(
        self, tokens: Tensor, t: Tensor, y: Tensor, feature_layer: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same in token layout, without a trip through images.

        Args:
            tokens: (B, T, P*P*channels) noisy patches ordered (channel, row, column).
            t: (B,) time in [0, 1].
            y: (B,) int64 labels.
            feature_layer: as in ``forward``.

        Returns:
            Predicted clean patches (B, T, P*P*channels) ordered (row, column, channel); the features or None.
        """
        config = self.config
        if feature_layer is not None and not 0 <= feature_layer < config.depth:
            raise ValueError(f"JiT: feature_layer must lie in [0, {config.depth}), got {feature_layer}")
        label = self.y_embedder(y)  # (B, C)
        condition = self.t_embedder(t) + label
        x = self.x_embedder(tokens)
        # The stream keeps the embedding's dtype (bf16 under autocast) from the first block to the last.
        x = x + self.pos_embed.to(x.dtype)
        rope = self.rope()
        modulations = packed_modulations(condition, self._adaln_modules(), x.dtype)
        prefix, features = 0, None
        pending: Pending | None = None
        for index, block in enumerate(self.blocks):
            is_start = config.in_context_len > 0 and index == config.in_context_start
            if is_start or index == feature_layer:  # both need the sum itself
                x, pending = add_pending(x, pending), None
            if index == feature_layer:
                features = x[:, prefix:]
            if is_start:
                prefix = config.in_context_len
                x = torch.cat([(label[:, None] + self.in_context_posemb).to(x.dtype), x], dim=1)
            x, pending = block(x, pending, condition, rope, prefix, modulations[index])
        if pending is not None:
            branch, gate = pending
            pending = branch[:, prefix:], gate
        return self.final_layer(x[:, prefix:], pending, condition, modulations[-1]), features
