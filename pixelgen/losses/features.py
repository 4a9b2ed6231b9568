"""What the terms compare: frozen features of clean and predicted images, computed once, when asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.encoders.embedded import EmbeddedTokens
from pixelgen.losses.gate import BUCKETS, Selection
from pixelgen.losses.lpips import LPIPS


class FeatureNetworks:
    """The frozen networks of an objective.

    Args:
        encoder: images (B, C, H, W) to tokens (B, T, D), or None.
        lpips: what has ``encode`` and ``distance`` as ``LPIPS`` does, or None.
    """

    def __init__(self, encoder: TokenEncoder | nn.Module | None, lpips: LPIPS | nn.Module | None) -> None:
        self.encoder: Any = encoder
        self.lpips: Any = lpips
        #: Whether LPIPS and tokens read one embedded network, which then runs once per image, not twice.
        self.share_trunk = (
            isinstance(encoder, EmbeddedTokens)
            and isinstance(lpips, LPIPS)
            and lpips.resize_from_patch is None
            and lpips.stages is encoder.features
        )

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """As ``nn.Module._apply``: the networks follow the objective to its device."""
        for module in (self.encoder, self.lpips):
            if module is not None:
                module._apply(fn, recurse)

    def speed_up(self, *, half: bool, compiled: bool) -> None:
        """Settings that change the networks' speed and, in half precision, their last digits.

        Args:
            half: weights of convolutions and linear layers in bf16, convolutions channels-last; the caller
                then runs them under bf16 autocast, which would convert frozen weights anew in every call.
            compiled: run the networks through ``torch.compile``.
        """
        for network in (self.encoder, getattr(self.lpips, "stages", None)):
            if network is None:
                continue
            for module in network.modules() if half else ():
                if isinstance(module, nn.Conv2d):
                    module.to(torch.bfloat16).to(memory_format=torch.channels_last)
                elif isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
            if compiled:
                # One graph for each size of a selection, with gradient and without; PyTorch's own limit is 8.
                limit = 2 * (BUCKETS + 1)
                torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
                network.compile(dynamic=False)


class ImageFeatures:
    """Frozen features of the images of a batch, by selections of its rows; each is computed when first read.

    What was made for all rows serves every selection of them, so read those of all rows first.

    Args:
        networks: the frozen networks.
        images: gives the images (K, C, H, W) of a selection, in [-1, 1], at least fp32.
        has_gradient: whether gradients flow to the images.
    """

    def __init__(
        self, networks: FeatureNetworks, images: Callable[[Selection], Tensor], *, has_gradient: bool
    ) -> None:
        self.networks, self.images, self._has_gradient = networks, images, has_gradient
        self._made: dict[str, list[tuple[Selection, list[Tensor]]]] = {}

    def once(self, kind: str, rows: Selection, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What was made of this kind for all rows or for these, else what is made now."""
        made = self._made.setdefault(kind, [])
        for known, values in made:
            if known is rows or known.index is None:
                return [rows.rows_of(known, value) for value in values]
        with nullcontext() if self._has_gradient else torch.no_grad():
            made.append((rows, make()))
        return made[-1][1]


class SelectedFeatures(NamedTuple):
    """The features of some rows."""

    source: ImageFeatures
    rows: Selection

    @property
    def images(self) -> Tensor:
        """(K, C, H, W) in [-1, 1]."""
        return self.source.once("images", self.rows, lambda: [self.source.images(self.rows)])[0]

    @property
    def maps(self) -> list[Tensor]:
        """Feature maps (K, C, H, W) of the LPIPS network."""
        return self.source.once("maps", self.rows, lambda: self.source.networks.lpips.encode(self.images))

    @property
    def tokens(self) -> Tensor:
        """(K, T, D) of the token encoder."""
        networks = self.source.networks

        def make() -> list[Tensor]:
            share = networks.share_trunk
            return [networks.encoder.from_stages(self.maps) if share else networks.encoder(self.images)]

        return self.source.once("tokens", self.rows, make)[0]


class Seen(NamedTuple):
    """What a term sees of the K samples that it is for.

    Attributes:
        t: (K,) time.
        predicted, target: features of the predicted and of the clean images.
        prediction, clean: for a term that needs ``"patches"``, both as (K, T, P*P*C), values in the order of
            the denoiser's output.
        noise: noise patches beside them where the prediction is a velocity; None where it is x.
        features: for one that needs ``"features"``, (K, T, width) of the block ``Term.feature_layer``.
    """

    t: Tensor
    predicted: SelectedFeatures
    target: SelectedFeatures
    prediction: Any = None
    clean: Any = None
    noise: Any = None
    features: Any = None
