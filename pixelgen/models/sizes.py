"""Architecture of the class-conditional denoiser and the published sizes, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pixelgen.models.families import FAMILIES, Architecture, Family, register


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
        self._require("heads", self.heads >= 1, "be at least 1")
        is_multiple = self.width % self.heads == 0 and self.head_dim % 4 == 0
        self._require("heads", is_multiple, f"make width / heads, {self.width} / heads, a multiple of 4")
        self._require("width", self.width <= 8192, "be at most 8192")
        self._require("heads", self.head_dim <= 256, f"make width / heads, {self.width} / heads, at most 256")
        self._require("mlp_ratio", self.mlp_width >= 1, "leave the MLP a width of at least 1")
        for name in ("bottleneck_dim", "in_context_len"):
            self._require(name, getattr(self, name) >= 0, "not be negative")
        is_block = not self.in_context_len or 0 <= self.in_context_start < self.depth
        self._require("in_context_start", is_block, f"lie in [0, depth) = [0, {self.depth})")
        for name in ("attn_dropout", "proj_dropout"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "lie in [0, 1)")

    def without_dropout(self) -> ModelConfig:
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

_TINY = ModelConfig(width=64, depth=3, heads=4, num_classes=10, in_context_start=1)

SIZES: dict[str, ModelConfig] = {
    **{f"JiT-{name}/16": config for name, config in _JIT.items()},
    **{f"JiT-{name}/32": replace(config, patch_size=32, image_size=512) for name, config in _JIT.items()},
    "PixelGen-L/16": _JIT["L"],
    "PixelGen-XL/16": ModelConfig(
        width=1152, depth=28, heads=16, bottleneck_dim=0, in_context_start=8, proj_dropout=0.1
    ),
    # Small ones: for 8x8 grey digits (the embedded data set) and for tests at 32 px.
    "tiny/2": replace(_TINY, patch_size=2, image_size=8, channels=1, bottleneck_dim=0, in_context_len=2),
    "tiny/4": replace(_TINY, patch_size=4, image_size=32, bottleneck_dim=16, in_context_len=4),
}


register(Family(name="jit", config=ModelConfig, sizes=SIZES, module="pixelgen.models.jit:JiT"))


def model_config(size: str, **overrides: object) -> ModelConfig:
    """The configuration of a published size with some fields replaced.

    Args:
        size: a key of ``SIZES``, such as ``"PixelGen-XL/16"``.
        **overrides: fields of ``ModelConfig`` to replace, such as ``image_size=512``.

    Raises:
        UserError: unknown size; the message lists the known ones.
    """
    return FAMILIES["jit"].architecture(size, **overrides)  # type: ignore[return-value]
