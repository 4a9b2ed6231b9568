"""Encoders by the names that configurations use."""

from __future__ import annotations

from pathlib import Path

from pixelgen.encoders import dinov2
from pixelgen.encoders.base import StageEncoder, TokenEncoder
from pixelgen.encoders.dinov2 import DINOv2
from pixelgen.encoders.embedded import EmbeddedFeatures, EmbeddedStages, EmbeddedTokens
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.errors import UserError

STAGE_ENCODERS = ("vgg16", "embedded")
TOKEN_ENCODERS = (*dinov2.MODELS, "embedded")


def build_stage_encoder(
    name: str,
    *,
    weights: str | Path | None = "pretrained",
    seed: int = 0,
    embedded: EmbeddedFeatures | None = None,
) -> StageEncoder:
    """The feature maps that LPIPS compares.

    Args:
        name: ``vgg16`` or ``embedded``.
        weights: ``pretrained``, a path, ``random``, or None; not read for ``embedded``.
        seed: seed of random weights.
        embedded: the features of the run, needed for ``embedded``.

    Raises:
        UserError: unknown name, weights that cannot be had, or no ``embedded`` features.
    """
    if name == "vgg16":
        return VGG16(weights, seed=seed)
    if name == "embedded":
        return EmbeddedStages(_require(embedded, "build_stage_encoder"))
    raise UserError(f"loss.stages: must be one of {', '.join(STAGE_ENCODERS)}, got {name!r}")


def build_token_encoder(
    name: str,
    *,
    weights: str | Path | None = "pretrained",
    patch_size: int,
    layer: int | None = None,
    seed: int = 0,
    embedded: EmbeddedFeatures | None = None,
) -> TokenEncoder:
    """The patch tokens that REPA and P-DINO compare.

    Args:
        name: ``dinov2_vits14``, ``dinov2_vitb14``, ``dinov2_vitl14``, ``dinov2_vitg14`` or
            ``embedded``.
        weights: ``pretrained``, a path, ``random``, or None; not read for ``embedded``.
        patch_size: the denoiser's patch size: one token per patch.
        layer: DINOv2 blocks to run, from 1; None for all; not read for ``embedded``.
        seed: seed of random weights.
        embedded: the features of the run, needed for ``embedded``.

    Raises:
        UserError: unknown name, layer out of range, weights that cannot be had, or no ``embedded`` features,
            or ones of another patch size.
    """
    if name in dinov2.MODELS:
        return DINOv2(name, weights, patch_size=patch_size, layer=layer, seed=seed)
    if name == "embedded":
        features = _require(embedded, "build_token_encoder")
        if features.config.patch_size != patch_size:
            raise UserError(
                f"build_token_encoder: patch_size must be that of the embedded features, "
                f"{features.config.patch_size}, got {patch_size}"
            )
        return EmbeddedTokens(features)
    raise UserError(f"loss.tokens: must be one of {', '.join(TOKEN_ENCODERS)}, got {name!r}")


def _require(embedded: EmbeddedFeatures | None, function: str) -> EmbeddedFeatures:
    if embedded is None:
        raise UserError(f"{function}: embedded features must be given for the encoder 'embedded', got None")
    return embedded
