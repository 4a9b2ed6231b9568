"""Architecture of the class-conditional denoiser and the published sizes, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pixelgen.errors import UserError
from pixelgen.models.families import Architecture, Family, register


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """Architecture of a JiT denoiser (arXiv 2511.13720; PixelGen's uses the same, 2602.02493).

    Args:
        width: channels C of a token; a multiple of 4 and of ``heads``.
        depth: number of transformer blocks.
        heads: attention heads N; C / N, the head dimension, must be a multiple of 4.
        patch_size: side P of a square patch in pixels.
        image_size: image side in pixels, or ``(height, width)``; both multiples of ``patch_size``.
        channels: image channels.
        num_classes: classes of the data; the embedding has one more row, the null label.
        mlp_ratio: the SwiGLU's inner width is ``int(int(C * mlp_ratio) * 2 / 3)``.
        bottleneck_dim: width of the patch embedding's bottleneck; 0 for a single projection.
        in_context_len: class tokens prepended to the image tokens; 0 for none.
        in_context_start: index of the first block that sees them.
        attn_dropout: dropout of the attention weights, in the middle half of the blocks.
        proj_dropout: dropout after attention's projection and on the SwiGLU product, in the same blocks.
    """

    heads: int
    mlp_ratio: float = 4.0
    bottleneck_dim: int = 128
    in_context_len: int = 32
    in_context_start: int = 4
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise UserError(f"ModelConfig: heads must be at least 1, got {self.heads}")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"ModelConfig: width / heads must be a multiple of 4, got {self.width} / {self.heads}"
            )
        if self.width > 8192 or self.head_dim > 256:
            raise UserError(
                f"ModelConfig: width must be at most 8192 and width / heads at most 256, "
                f"got {self.width} and {self.head_dim}"
            )
        if self.mlp_width < 1:
            raise UserError(f"ModelConfig: mlp_ratio {self.mlp_ratio} leaves the MLP no width")
        if self.bottleneck_dim < 0 or self.in_context_len < 0:
            raise UserError("ModelConfig: bottleneck_dim and in_context_len must not be negative")
        if self.in_context_len and not 0 <= self.in_context_start < self.depth:
            raise UserError(
                f"ModelConfig: in_context_start must lie in [0, depth) = [0, {self.depth}), "
                f"got {self.in_context_start}"
            )
        for name in ("attn_dropout", "proj_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"ModelConfig: {name} must lie in [0, 1), got {getattr(self, name)}")

    def without_rates(self) -> ModelConfig:
        """The same weights without dropout."""
        return replace(self, attn_dropout=0.0, proj_dropout=0.0)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Inner width of the SwiGLU, truncated as the published code does."""
        return int(int(self.width * self.mlp_ratio) * 2 / 3)


_JIT = {
    "B": ModelConfig(width=768, depth=12, heads=12),
    "L": ModelConfig(width=1024, depth=24, heads=16, in_context_start=8),
    "H": ModelConfig(
        width=1280, depth=32, heads=16, bottleneck_dim=256, in_context_start=10, proj_dropout=0.2
    ),
    "G": ModelConfig(
        width=1664, depth=40, heads=16, bottleneck_dim=256, in_context_start=10, proj_dropout=0.2
    ),
}

SIZES: dict[str, ModelConfig] = {
    **{f"JiT-{name}/16": config for name, config in _JIT.items()},
    **{f"JiT-{name}/32": replace(config, patch_size=32, image_size=512) for name, config in _JIT.items()},
    "PixelGen-L/16": _JIT["L"],
    "PixelGen-XL/16": ModelConfig(
        width=1152, depth=28, heads=16, bottleneck_dim=0, in_context_start=8, proj_dropout=0.1
    ),
    # Small ones: for 8x8 grey digits (the embedded data set) and for tests at 32 px.
    "tiny/2": ModelConfig(
        width=64,
        depth=3,
        heads=4,
        patch_size=2,
        image_size=8,
        channels=1,
        num_classes=10,
        bottleneck_dim=0,
        in_context_len=2,
        in_context_start=1,
    ),
    "tiny/4": ModelConfig(
        width=64,
        depth=3,
        heads=4,
        patch_size=4,
        image_size=32,
        num_classes=10,
        bottleneck_dim=16,
        in_context_len=4,
        in_context_start=1,
    ),
}


def model_config(size: str, **overrides: object) -> ModelConfig:
    """The configuration of a published size with some fields replaced.

    Args:
        size: a key of ``SIZES``, such as ``"PixelGen-XL/16"``.
        **overrides: fields of ``ModelConfig`` to replace, such as ``image_size=512``.

    Raises:
        UserError: unknown size; the message lists the known ones.
    """
    if size not in SIZES:
        raise UserError(f"model_config: size must be one of {', '.join(SIZES)}, got {size!r}")
    return replace(SIZES[size], **overrides)  # type: ignore[arg-type]


register(Family(name="jit", config=ModelConfig, sizes=SIZES, module="pixelgen.models.jit:JiT"))
