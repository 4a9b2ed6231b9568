"""What the terms compare: frozen features of clean and predicted images, computed once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.encoders.embedded import EmbeddedTokens
from pixelgen.losses.gate import BUCKETS, Selection
from pixelgen.losses.lpips import LPIPS


@dataclass(frozen=True)
class Wanted:
    """Of which rows of a batch features are wanted; None for no rows.

    Attributes:
        tokens: of the token encoder.
        maps: of the LPIPS network.
        images: the images themselves.
    """

    tokens: Selection | None = None
    maps: Selection | None = None
    images: Selection | None = None

    @property
    def maps_are_among_tokens(self) -> bool:
        """Whether both are wanted, and maps of no row without tokens."""
        if self.tokens is None or self.maps is None:
            return False
        return self.maps is self.tokens or self.tokens.index is None


class Features:
    """Frozen features of the rows of a batch that were wanted."""

    def __init__(
        self, wanted: Wanted, tokens: Tensor | None, maps: list[Tensor] | None, images: Tensor | None
    ) -> None:
        # what was not wanted is None, and not asked for
        self._wanted: Any = wanted
        self._tokens: Any = tokens
        self._maps: Any = maps
        self._images: Any = images

    def tokens(self, rows: Selection) -> Tensor:
        """(K, T, D) of the token encoder."""
        return rows.rows_of(self._wanted.tokens, self._tokens)

    def maps(self, rows: Selection) -> list[Tensor]:
        """Feature maps (K, C, H, W) of the LPIPS network."""
        return [rows.rows_of(self._wanted.maps, stage) for stage in self._maps]

    def images(self, rows: Selection) -> Tensor:
        """(K, C, H, W) in [-1, 1], fp32."""
        return rows.rows_of(self._wanted.images, self._images)


class FeatureNetworks:
    """The frozen networks of an objective.

    Args:
        encoder: images (B, C, H, W) to tokens (B, T, D), or None.
        lpips: what has ``encode`` and ``distance`` as ``LPIPS`` does, or None.
    """

    def __init__(self, encoder: TokenEncoder | nn.Module | None, lpips: LPIPS | nn.Module | None) -> None:
        self.encoder: Any = encoder
        self.lpips: Any = lpips
        self._shares_trunk = _share_trunk(encoder, lpips)

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

    def __call__(self, images: Callable[[Selection], Tensor], wanted: Wanted) -> Features:
        """Features of selected rows.

        Args:
            images: gives the images (K, C, H, W) of rows, in [-1, 1].
            wanted: of which rows.
        """
        made: dict[int, Tensor] = {}

        def of(rows: Selection) -> Tensor:
            if id(rows) not in made:
                made[id(rows)] = images(rows)
            return made[id(rows)]

        seen = None if wanted.images is None else of(wanted.images)
        if self._shares_trunk and wanted.maps_are_among_tokens:
            assert wanted.tokens is not None and wanted.maps is not None
            whole = self.lpips.encode(of(wanted.tokens))
            among = [wanted.maps.rows_of(wanted.tokens, stage) for stage in whole]
            return Features(wanted, self.encoder.from_stages(whole), among, seen)
        tokens = None if wanted.tokens is None else self.encoder(of(wanted.tokens))
        maps = None if wanted.maps is None else self.lpips.encode(of(wanted.maps))
        return Features(wanted, tokens, maps, seen)


def _share_trunk(encoder: object, lpips: object) -> bool:
    """Whether LPIPS and tokens read one embedded network, which then runs once per image, not twice."""
    return (
        isinstance(encoder, EmbeddedTokens)
        and isinstance(lpips, LPIPS)
        and lpips.resize_from_patch is None
        and lpips.stages is encoder.features
    )
