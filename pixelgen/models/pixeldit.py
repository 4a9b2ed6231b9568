"""PixelDiT, the dual-level denoiser (arXiv 2511.20645): patch blocks for what, pixel blocks for how it looks.

A transformer on patches makes one conditioning vector ``s`` of each patch. A second, shallow one works on
the pixels: every pixel has a shift, scale and gate of its own, made from the ``s`` of its patch, and for
attention the pixels of a patch are compacted into one token and expanded again. Only through ``s`` do pixels
know the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from pixelgen_kernels import Ops
from pixelgen_kernels.handover import Handover
from torch import Tensor, nn

from pixelgen.conditions import Condition
from pixelgen.models.denoiser import Denoiser, Kernels
from pixelgen.models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_position_table
from pixelgen.models.layers import (
    Attention,
    Block,
    Checkpointing,
    Pending,
    RMSNorm,
    SplitSwiGLU,
    adaln,
    add_pending,
    autocast_dtype,
    checkpointed,
    packed_modulations,
)
from pixelgen.models.pixeldit_sizes import PixelDiTConfig
from pixelgen.models.recomputed import Recomputed

ROPE_EXTENT = 16.0  # of both axes, whatever the number of patches
TIME_PERIOD = 10.0


def extent_rope_table(head_dim: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Axial RoPE on a square that every image fills: positions are evenly spaced from 0 to 16, ends included.

    Even channel pairs rotate with the column, odd ones with the row; pairs 2k and 2k + 1 share the frequency
    10000^(-4k/D). An axis of one patch sits at 0.

    Args:
        head_dim: head dimension D, a multiple of 4.
        rows, columns: of the patch grid.

    Returns:
        cos and sin, each (rows * columns, D / 2) fp32, for adjacent channel pairs (2i, 2i + 1).
    """
    pairs = torch.arange(head_dim // 4, dtype=torch.float64, device="cpu")
    frequency = 10000.0 ** (-4.0 * pairs / head_dim)

    def positions(count: int) -> Tensor:
        return torch.linspace(0, ROPE_EXTENT, count, dtype=torch.float64, device="cpu")

    row, column = torch.meshgrid(positions(rows), positions(columns), indexing="ij")
    of_column, of_row = (axis.reshape(-1, 1) * frequency for axis in (column, row))  # (T, D/4)
    angle = torch.stack([of_column, of_row], dim=-1).flatten(1)
    return angle.cos().float(), angle.sin().float()


def pixel_position_table(width: int, rows: int, columns: int, patch_size: int) -> Tensor:
    """The sine-cosine table of the pixels' integer coordinates, pixels grouped by patch.

    Args:
        width: channels d, a multiple of 4.
        rows, columns: of the patch grid.
        patch_size: side P of a patch.

    Returns:
        (rows * columns, P * P, d) fp32: patches and the pixels inside each in raster order.
    """
    P = patch_size
    table = sincos_position_table(width, rows * P, columns * P)[0]
    table = table.view(rows, P, columns, P, width).transpose(1, 2)
    return table.reshape(rows * columns, P * P, width)


class GridTables:
    """Constant fp32 tables by patch grid and device, made when first asked for.

    No buffers: there is one for every image size, none is in a checkpoint and none follows the model's dtype.
    """

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self._make = make
        self._made: dict[tuple[Any, ...], Any] = {}

    def __reduce__(self) -> Any:  # a copy makes its own
        return type(self), (self._make,)

    def __call__(self, grid: tuple[int, int], device: torch.device) -> Any:
        """A tensor or a tuple of tensors, as ``make(rows, columns)`` gives."""
        key = *grid, device
        if key not in self._made:
            with torch.inference_mode(False):  # or a later training step could not use it
                made = self._make(*grid)
                many = isinstance(made, tuple)
                self._made[key] = tuple(t.to(device) for t in made) if many else made.to(device)
        return self._made[key]


class PixelMLP(nn.Module):
    """Holds the two layers of a pixel block's MLP, d -> 4d -> d; the arithmetic lives in `pixel_mlp`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)


class PixelBlock(nn.Module):
    """A block on pixels: compacted attention and a per-pixel MLP, both modulated pixel by pixel.

    The modulations of all pixels of a patch are one projection of the patch's conditioning, its values
    ordered (pixel, kind, channel). See `pixel_modulate` and `pixel_mlp` for the equations.
    """

    #: What the backward pass computes again; see ``Denoiser.checkpoint_blocks``.
    checkpointing: Checkpointing = "none"

    def __init__(self, config: PixelDiTConfig, ops: Ops) -> None:
        super().__init__()
        D, d, Q = config.width, config.pixel_width, config.patch_pixels
        self.config, self.ops = config, ops
        self.compress_to_attn = nn.Linear(Q * d, D)
        self.expand_from_attn = nn.Linear(D, Q * d)
        self.norm1 = RMSNorm(d)
        self.attn = Attention(D, config.heads, ops, qkv_bias=False)
        self.norm2 = RMSNorm(d)
        self.mlp = PixelMLP(d)
        modulated = Q if config.pixel_modulation == "pixel" else 1
        self.adaLN_modulation = adaln(D, modulated * config.num_kinds * d, is_activated=True)

    def forward(self, x: Tensor, s: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """One block on the pixels.

        Args:
            x: (B * T, Q, d) pixels grouped by patch.
            s: (B, T, D) conditioning of the patches, after its SiLU.
            rope: cos and sin of the patches.

        Returns:
            (B * T, Q, d).
        """
        return checkpointed(self._compute, self.checkpointing, x, s, rope)

    def _compute(self, x: Tensor, s: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        modulation = self.adaLN_modulation(s)
        kept: Recomputed | None = None
        if self.config.recompute_modulation and self.checkpointing == "none" and modulation.requires_grad:
            kept = Recomputed(modulation, lambda: self.adaLN_modulation(s))
        Q, d = x.shape[1:]
        modulated = Q if self.config.pixel_modulation == "pixel" else 1
        modulation = modulation.view(len(x), modulated, self.config.num_kinds * d)
        modulation = modulation.expand(-1, Q, -1)  # of a patch, for all its pixels
        # Nothing else reads this modulation, so its gradient may take its place.
        handover = Handover()
        with kept or Recomputed.NOTHING:
            if self.config.post_modulation:
                h = self.ops.rms_norm_modulate(x, weight=self.norm1.weight, eps=RMSNorm.eps)
            else:
                h = self.ops.pixel_modulate(
                    x, modulation, self.norm1.weight, eps=RMSNorm.eps, handover=handover
                )
        # the pixels of a patch, as they lie in memory, are its token
        h = self.compress_to_attn(h.view(*s.shape[:2], Q * d))
        y = self.expand_from_attn(self.attn(h, rope)).view(x.shape)
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        with kept or Recomputed.NOTHING:
            return self.ops.pixel_mlp(
                *(x, y, modulation, self.norm2.weight, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
                eps=RMSNorm.eps,
                handover=handover,
            )


class PixelFinalLayer(nn.Module):
    """RMSNorm and a projection to the channels of a pixel, or to all pixels of a patch, channel fastest."""

    def __init__(self, width: int, values: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, values)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., values)."""
        return self.linear(self.ops.rms_norm_modulate(x, weight=self.norm.weight, eps=RMSNorm.eps))


class PixelDiT(Denoiser):
    """Patch blocks, then pixel blocks that they condition; predicts the velocity x - noise.

    Parameter names equal those of the published PixelDiT code. A fresh model predicts exact zeros: every
    AdaLN output and the final projection start at zero. Any image is taken whose sides the patch divides.

    Args:
        config: the architecture.
        kernels: ``"auto"`` for the fused ops, ``"eager"`` for plain PyTorch; same parameters, same results up
            to rounding.
    """

    class_table = "y_embedder.embedding_table.weight"
    input_order = "last"  # the pixel path reads pixels; patch vectors are put in order for it
    config: PixelDiTConfig

    def __init__(self, config: PixelDiTConfig, kernels: Kernels = "auto") -> None:
        super().__init__(config, kernels)
        self.prediction = config.prediction
        D, d, ops = config.width, config.pixel_width, self.ops
        has_pixels = config.pixel_depth > 0
        if has_pixels:
            self.pixel_embedder = nn.ModuleDict({"proj": nn.Linear(config.channels, d)})
        self.s_embedder = nn.ModuleDict({"proj": nn.Linear(config.patch_dim, D)})
        self.t_embedder = TimestepEmbedder(D, TIME_PERIOD)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        self.patch_blocks = nn.ModuleList(self._patch_block() for _ in range(config.depth))
        self.pixel_blocks = nn.ModuleList(PixelBlock(config, ops) for _ in range(config.pixel_depth))
        self.final_layer = PixelFinalLayer(
            *((d, config.channels) if has_pixels else (D, config.patch_dim)), ops
        )
        self.rope = GridTables(partial(extent_rope_table, config.head_dim))
        self.pixel_positions = GridTables(partial(pixel_position_table, d, patch_size=config.patch_size))
        self.reset_parameters()

    def _patch_block(self) -> Block:
        D, ops = self.config.width, self.ops
        attention = Attention(D, self.config.heads, ops, qkv_bias=False)
        mlp = SplitSwiGLU(D, self.config.mlp_width, ops)
        return Block(D, attention, mlp, adaln(D, 6 * D, is_activated=True), ops)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills every parameter; call it again after ``to_empty`` on a model built on meta."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        embedder = cast("nn.Linear", self.s_embedder["proj"])
        nn.init.xavier_uniform_(embedder.weight)
        nn.init.zeros_(embedder.bias)
        for index in (0, 2):  # the biases stay as PyTorch draws them, as in the published code
            nn.init.normal_(cast("nn.Linear", self.t_embedder.mlp[index]).weight, std=0.02)
        self.y_embedder.reset_parameters()
        for layer in (*(block.adaLN_modulation[0] for block in self.fsdp_units()), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def null(self, condition: Condition) -> Condition:
        """The label ``num_classes``."""
        return {"label": torch.full_like(condition["label"], self.config.num_classes)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, bool | str] | None:
        """``post_modulation``: a pixel has 4 modulations, or 6 without; and ``pixel_modulation``."""
        if "patch_blocks.0.attn.qkv.weight" not in state:
            return None
        names = ("pixel_blocks.0.adaLN_modulation.0", "pixel_embedder.proj", "s_embedder.proj")
        if any(f"{name}.weight" not in state for name in names):
            return {}
        modulation, of_pixel, of_patch = (state[f"{name}.weight"] for name in names)
        kinds, found = len(modulation) // len(of_pixel), "patch"
        if kinds not in (4, 6):  # not one for all pixels of a patch, but for each
            kinds, found = kinds * of_pixel.shape[1] // of_patch.shape[1], "pixel"
        return {"post_modulation": kinds == 4, "pixel_modulation": found}

    def adaln_modules(self) -> list[nn.Module]:
        """Those of the patch blocks; the pixel blocks' are larger products, of every patch."""
        return [cast("Block", block).adaLN_modulation for block in self.patch_blocks]

    def modules_in_ops(self) -> list[nn.Module]:
        """The MLPs of the pixels."""
        return [cast("PixelBlock", block).mlp for block in self.pixel_blocks]

    def fsdp_units(self) -> list[Any]:
        """Patch blocks, then pixel blocks."""
        return [*self.patch_blocks, *self.pixel_blocks]

    def compile_blocks(self) -> None:
        """Compiles the patch blocks: pixel blocks are products and fused ops, nothing is left to fuse."""
        self._compile(list(self.patch_blocks))

    def balance_weight(self) -> Tensor:
        """The weight of the projection to pixels."""
        return self.final_layer.linear.weight

    def resized(
        self, name: str, given: Tensor, own: Tensor, classes: Mapping[int, int]
    ) -> tuple[Tensor, str] | None:
        """Other classes; another number of channels, over which weights are averaged: grey stays grey."""
        if name == self.class_table:
            return self._other_classes(given, own, classes)
        Q, channels = self.config.patch_pixels, self.config.channels
        if name in ("pixel_embedder.proj.weight", "s_embedder.proj.weight") and len(given) == len(own):
            of_pixel = 1 if name.startswith("pixel") else Q
            if given.shape[1] % of_pixel:
                return None
            by_channel = given.unflatten(1, (-1, of_pixel))  # the channel comes first
            there = by_channel.shape[1]
            value = by_channel.mean(1, keepdim=True).expand(-1, channels, -1) * (there / channels)
            return value.flatten(1), f"{there} channels to {channels}"
        if name.startswith("final_layer.linear.") and given.shape[1:] == own.shape[1:]:
            of_patch = Q if self.config.pixel_depth == 0 else 1
            there = len(given) // of_patch
            if len(given) % of_patch or there not in (1, 3):
                return None
            pixels = given.unflatten(0, (of_patch, there))
            value = pixels.mean(1, keepdim=True).expand(-1, channels, *given.shape[1:]).flatten(0, 1)
            return value, f"{there} channels to {channels}"
        return None

    def forward_tokens(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        t: Tensor,
        condition: Condition,
        tap: int | None = None,
        s: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Denoiser``. The condition is ``{"label": (B,) int64}`` in [0, num_classes].

        Args:
            tokens: (B, T, P*P*channels) noisy patches, channel last.
            grid: any rows and columns.
            t: (B,).
            condition: not read where ``s`` is given.
            tap: L in [0, depth]: also return the features after L patch blocks.
            s: (B, T, D) conditioning of the patches after its SiLU, in place of the patch blocks.

        Raises:
            ValueError: no such block, or an ``s`` of another shape, with ``tap`` or without pixel blocks.
        """
        config = self.config
        if tap is not None and not 0 <= tap <= config.depth:
            raise ValueError(f"PixelDiT: tap must lie in [0, {config.depth}], got {tap}")
        features: Tensor | None = None
        if s is None:
            time = self.t_embedder(t)  # (B, D)
            stream, features = self._patch_path(tokens, grid, time, condition, tap)
            if config.pixel_depth == 0:
                return self.final_layer(stream), features
            s = F.silu(time[:, None] + stream)
        elif config.pixel_depth == 0 or tap is not None or s.shape != (*tokens.shape[:2], config.width):
            expected = (*tokens.shape[:2], config.width)
            raise ValueError(
                f"PixelDiT: s must have shape (B, T, D) = {expected}, pixel blocks to condition and no tap, "
                f"got {tuple(s.shape)}, pixel_depth {config.pixel_depth} and tap {tap}"
            )
        return self._pixel_path(tokens, grid, s), features

    def _patch_path(
        self, tokens: Tensor, grid: tuple[int, int], time: Tensor, condition: Condition, tap: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, T, D) after all patch blocks, and after ``tap`` of them."""
        c = F.silu(time + self.y_embedder(condition["label"]))
        by_channel = tokens.unflatten(-1, (-1, self.config.channels)).transpose(-1, -2).flatten(-2)
        x = self.s_embedder["proj"](by_channel.to(self.s_embedder["proj"].weight.dtype))
        rope = self.rope(grid, x.device)
        blocks = cast("list[Block]", list(self.patch_blocks))
        modulations = packed_modulations(c, self.adaln_modules(), x.dtype)
        features: Tensor | None = None
        pending: Pending | None = None
        for index, block in enumerate(blocks):
            if index == tap:  # needs the sum itself
                x, pending = add_pending(x, pending), None
                features = x
            x, pending = block(x, pending, c, rope, 0, modulations[index])
        x = add_pending(x, pending)
        return x, x if tap == len(blocks) else features

    def _pixel_path(self, tokens: Tensor, grid: tuple[int, int], s: Tensor) -> Tensor:
        """The prediction (B, T, P*P*channels)."""
        B, T, _ = tokens.shape
        embedder = self.pixel_embedder["proj"]
        pixels = tokens.unflatten(-1, (-1, self.config.channels))  # (B, T, Q, channels)
        x = embedder(pixels.to(embedder.weight.dtype))
        if self.config.pixel_positions:
            # The pixel stream is fp32 under autocast, as in the published code; else of the weights' dtype.
            dtype = x.dtype if autocast_dtype(x.device) is None else torch.float32
            x = x.to(dtype) + self.pixel_positions(grid, x.device).to(dtype)
        x = x.flatten(0, 1)  # (B * T, Q, d)
        rope = self.rope(grid, x.device)
        for block in self.pixel_blocks:
            x = block(x, s, rope)
        return self.final_layer(x).view(B, T, self.config.patch_dim)
