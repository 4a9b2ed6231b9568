"""The objective of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.encoders.build import build_stage_encoder, build_token_encoder
from pixelgen.encoders.embedded import EmbeddedConfig, EmbeddedFeatures, embedded_features
from pixelgen.losses.gate import NoiseGate
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective
from pixelgen.models.sizes import ModelConfig

if TYPE_CHECKING:
    from pixelgen.losses.options import LossConfig


def build_objective(
    loss: LossConfig,
    model: ModelConfig,
    *,
    run_dir: str | Path,
    images: Callable[[], tuple[Tensor, Tensor]],
    t_eps: float = 0.05,
    seed: int = 0,
    kernels: Literal["auto", "eager"] = "auto",
) -> Objective:
    """Encoders and objective as the configuration names them; only encoders that some weight needs are built.

    Args:
        loss: weights, gate, encoders.
        model: the denoiser, for its width, patch and image size, channels and classes.
        run_dir: where ``embedded`` features are kept.
        images: called only to train ``embedded`` features: uint8 images (N, C, H, W) and int64 labels (N,), a
            few thousand of the run's own.
        t_eps: floor of 1 - t.
        seed: seed of ``embedded`` features and of ``random`` weights.
        kernels: as in ``Objective``.

    Raises:
        UserError: unknown encoder names, weights that cannot be had, images that do not fit.
    """
    # What the encoders draw must not move the projector's start: trained features draw more than loaded ones.
    with torch.random.fork_rng(devices=[]):
        lpips, encoder = _build_networks(loss, model, run_dir, images, seed, kernels)
    return Objective(
        feature_width=model.width,
        patch_size=model.patch_size,
        image_size=model.image_height_width,
        encoder=encoder,
        lpips=lpips,
        alignment_weight=loss.alignment_weight,
        alignment_schedule=loss.alignment_schedule,
        lpips_weight=loss.lpips_weight,
        p_dino_weight=loss.p_dino_weight,
        perceptual_ratio=loss.perceptual_ratio,
        projector_width=loss.projector_width,
        gate=NoiseGate(loss.gate, loss.gate_t, loss.gate_width),
        p_dino_gate=loss.p_dino_gate,
        balance=loss.balance,
        balance_start_step=loss.balance_start_step,
        balance_every=loss.balance_every,
        adversarial_weight=loss.adversarial_weight,
        adversarial_start_step=loss.adversarial_start_step,
        adversarial_r1_weight=loss.adversarial_r1_weight,
        t_eps=t_eps,
        kernels=kernels,
    )


def _build_networks(
    loss: LossConfig,
    model: ModelConfig,
    run_dir: str | Path,
    images: Callable[[], tuple[Tensor, Tensor]],
    seed: int,
    kernels: Literal["auto", "eager"],
) -> tuple[LPIPS | None, TokenEncoder | nn.Module | None]:
    """LPIPS and the token encoder; None for what no weight needs."""
    needs_lpips = loss.lpips_weight * loss.perceptual_ratio > 0
    needs_tokens = (
        loss.uses_alignment or loss.p_dino_weight * loss.perceptual_ratio > 0 or loss.adversarial_weight > 0
    )
    embedded: EmbeddedFeatures | None = None
    if (needs_lpips and loss.stages == "embedded") or (needs_tokens and loss.tokens == "embedded"):
        config = EmbeddedConfig(
            channels=model.channels, patch_size=model.patch_size, num_classes=model.num_classes, seed=seed
        )
        embedded = embedded_features(run_dir, config, images)
    lpips = None
    if needs_lpips:
        stages = build_stage_encoder(loss.stages, weights=loss.stages_weights, seed=seed, embedded=embedded)
        # VGG16 is meant to see 16 pixels per patch; the embedded network was trained on the images as is.
        is_resized = loss.stages != "embedded" and model.patch_size != 16
        lpips = LPIPS(stages, ops=select(kernels), resize_from_patch=model.patch_size if is_resized else None)
    encoder = None
    if needs_tokens:
        encoder = build_token_encoder(
            loss.tokens,
            weights=loss.tokens_weights,
            patch_size=model.patch_size,
            layer=loss.p_dino_layer,
            seed=seed,
            embedded=embedded,
        )
    return lpips, encoder
