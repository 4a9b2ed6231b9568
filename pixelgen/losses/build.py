"""The objective of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pixelgen_kernels import select
from torch import Tensor

from pixelgen.encoders.base import TokenEncoder
from pixelgen.encoders.dinov2 import DINOv2
from pixelgen.encoders.embedded import EmbeddedConfig, EmbeddedFeatures, EmbeddedTokens, embedded_features
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective

if TYPE_CHECKING:
    from pixelgen.losses.options import LossConfig
    from pixelgen.models.denoiser import Denoiser
    from pixelgen.models.families import Architecture


def build_objective(
    loss: LossConfig,
    model: Denoiser,
    *,
    run_dir: str | Path,
    images: Callable[[], tuple[Tensor, Tensor]],
    t_eps: float = 0.05,
    seed: int = 0,
    micro_batches: int = 1,
    kernels: Literal["auto", "eager"] = "auto",
) -> Objective:
    """Encoders and objective as the configuration names them; only encoders that some term needs are built.

    Args:
        loss: the section of the configuration.
        model: the denoiser.
        run_dir: where ``embedded`` features are kept.
        images: called only to train ``embedded`` features: uint8 images (N, C, H, W) and int64 labels (N,), a
            few thousand of the run's own.
        t_eps: floor of 1 - t.
        seed: seed of ``embedded`` features and of ``random`` weights.
        micro_batches: parts of a process's batch, each of which is a call.
        kernels: as in ``Objective``.

    Raises:
        UserError: weights that cannot be had, images that do not fit.
    """
    # What the encoders draw must not move the projector's start: trained features draw more than loaded ones.
    with torch.random.fork_rng(devices=[]):
        networks = build_networks(
            loss,
            model.config,
            lambda config: embedded_features(run_dir, config, images),
            seed=seed,
            kernels=kernels,
        )
    return _objective(loss, model, networks, t_eps=t_eps, micro_batches=micro_batches, kernels=kernels)


def build_skeleton(loss: LossConfig, model: Denoiser) -> Objective:
    """An objective without weights worth the name, on the default device: to count and measure with."""
    networks = build_networks(loss, model.config, EmbeddedFeatures, has_weights=False)
    return _objective(loss, model, networks)


def _objective(
    loss: LossConfig, model: Denoiser, networks: tuple[LPIPS | None, TokenEncoder | None], **options: Any
) -> Objective:
    lpips, encoder = networks
    return Objective(
        loss,
        feature_width=model.config.width,
        patch_size=model.config.patch_size,
        encoder=encoder,
        lpips=lpips,
        channel_order=model.output_order,
        prediction=model.prediction,
        balance_parameter=model.balance_weight,
        **options,
    )


def build_networks(
    loss: LossConfig,
    model: Architecture,
    embedded: Callable[[EmbeddedConfig], EmbeddedFeatures],
    *,
    seed: int = 0,
    kernels: Literal["auto", "eager"] = "auto",
    has_weights: bool = True,
) -> tuple[LPIPS | None, TokenEncoder | None]:
    """LPIPS and the token encoder; None for what no term needs.

    Args:
        loss, seed, kernels: as in ``build_objective``.
        model: the denoiser's architecture.
        embedded: gives ``embedded`` features; called only where they are needed.
        has_weights: whether weights are loaded, or drawn.
    """
    needs_lpips, needs_tokens = loss.needs("maps"), loss.needs("tokens", "target_tokens")
    features: Any = None
    if (needs_lpips and loss.stages == "embedded") or (needs_tokens and loss.tokens == "embedded"):
        config = EmbeddedConfig(
            channels=model.channels, patch_size=model.patch_size, num_classes=model.num_classes, seed=seed
        )
        features = embedded(config)
    lpips = None
    if needs_lpips:
        weights = loss.stages_weights if has_weights else None
        stages = features if loss.stages == "embedded" else VGG16(weights, seed=seed)
        # VGG16 is meant to see 16 pixels per patch; the embedded network was trained on the images as is.
        is_resized = loss.stages != "embedded" and model.patch_size != 16
        lpips = LPIPS(stages, ops=select(kernels), resize_from_patch=model.patch_size if is_resized else None)
    encoder: TokenEncoder | None = None
    if needs_tokens and loss.tokens == "embedded":
        encoder = EmbeddedTokens(features)
    elif needs_tokens:
        encoder = DINOv2(
            loss.tokens,
            loss.tokens_weights if has_weights else None,
            patch_size=model.patch_size,
            layer=loss.p_dino_layer,
            seed=seed,
        )
    return lpips, encoder
