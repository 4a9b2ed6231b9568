"""Architecture of PixelDiT and its published sizes, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pixelgen.models.families import Architecture, Family, register


@dataclass(frozen=True, kw_only=True)
class PixelDiTConfig(Architecture):
    """Architecture of a PixelDiT denoiser (arXiv 2511.20645): patch blocks, then pixel blocks.

    Args:
        width: channels D of a patch token; a multiple of ``heads``.
        depth: number of patch blocks.
        heads: attention heads, of patch and of pixel blocks; D / heads must be a multiple of 4.
        pixel_width: channels d of a pixel; a multiple of 4 where there is a table of positions.
        pixel_depth: number of pixel blocks; 0 projects the patch tokens to pixels, a plain DiT on pixels.
        pixel_positions: whether a fixed sine-cosine table of positions is added to the pixels.
        pixel_modulation: pixel gives every pixel a shift, scale and gate of its own, patch all pixels of a
            patch the same.
        post_modulation: in the pixel blocks, scale and shift act on the output of a branch and there is no
            gate; checkpoints do not fit the default, which the released ones have.
        prediction: what the network predicts, the velocity (image - noise) or the image x.
        recompute_modulation: compute the pixel blocks' modulations again in the backward pass instead of
            keeping them, their largest tensors; without effect with train.activation_checkpointing.
        patch_size: side P of a square patch in pixels.
        image_size: image side in pixels, or ``(height, width)``; both multiples of ``patch_size``.
        channels: image channels.
        num_classes: classes of the data; the embedding has one more row, the null label.
    """

    heads: int
    pixel_width: int = 16
    pixel_depth: int = 4
    pixel_positions: bool = True
    pixel_modulation: Literal["pixel", "patch"] = "pixel"
    post_modulation: bool = False
    prediction: Literal["velocity", "x"] = "velocity"
    recompute_modulation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("heads", self.heads >= 1, "be at least 1")
        is_multiple = self.width % self.heads == 0 and self.head_dim % 4 == 0
        self._require("heads", is_multiple, f"make width / heads, {self.width} / heads, a multiple of 4")
        self._require("heads", self.head_dim <= 256, f"make width / heads, {self.width} / heads, at most 256")
        self._require("width", self.width <= 8192, "be at most 8192")
        self._require("pixel_depth", self.pixel_depth >= 0, "not be negative")
        self._require("pixel_width", 1 <= self.pixel_width <= 64, "lie between 1 and 64")
        fits = self.pixel_width % 4 == 0 or not self.pixel_positions
        self._require("pixel_width", fits, "be a multiple of 4 for the table of pixel positions")
        for name, choices in (("pixel_modulation", ("pixel", "patch")), ("prediction", ("velocity", "x"))):
            self._require(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")

    def without_dropout(self) -> PixelDiTConfig:
        """The same weights; what is recomputed may change."""
        return replace(self, recompute_modulation=False)

    @property
    def last_tap(self) -> int:
        """What leaves the last patch block can be tapped too."""
        return self.depth

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Inner width of a patch block's SwiGLU, truncated as the published code does."""
        return int(2 * int(4 * self.width) / 3)

    @property
    def patch_pixels(self) -> int:
        """Pixels Q of a patch."""
        return self.patch_size**2

    @property
    def num_kinds(self) -> int:
        """Vectors of a pixel's modulation."""
        return 4 if self.post_modulation else 6


_TINY = PixelDiTConfig(width=64, depth=2, heads=4, pixel_width=8, pixel_depth=1, num_classes=10)

PIXELDIT_SIZES: dict[str, PixelDiTConfig] = {
    "PixelDiT-B/16": PixelDiTConfig(width=768, depth=12, heads=12, pixel_depth=2),
    "PixelDiT-L/16": PixelDiTConfig(width=1024, depth=22, heads=16),
    "PixelDiT-XL/16": PixelDiTConfig(width=1152, depth=26, heads=16),
    # Small ones: for 8x8 grey digits (the embedded data set) and for tests at 32 px.
    "PixelDiT-tiny/4": replace(_TINY, patch_size=4, image_size=8, channels=1),
    "PixelDiT-tiny/8": replace(_TINY, patch_size=8, image_size=32),
}


register(
    Family(
        name="pixeldit",
        config=PixelDiTConfig,
        sizes=PIXELDIT_SIZES,
        module="pixelgen.models.pixeldit:PixelDiT",
    )
)
