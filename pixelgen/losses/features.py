"""What the perceptual terms compare: frozen features of clean and predicted images, computed once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pixelgen_kernels import Ops
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.encoders.embedded import EmbeddedStages, EmbeddedTokens
from pixelgen.losses.gate import BUCKETS, Selection
from pixelgen.losses.lpips import LPIPS


@dataclass(frozen=True)
class Features:
    """Of some rows of a batch; None for what was not asked for.

    Attributes:
        tokens: (K, T, D) of the token encoder.
        maps: what LPIPS compares: its feature maps (K, C, H, W), or the images where it is a plain callable.
    """

    tokens: Tensor | None
    maps: list[Tensor] | None


class FeatureNetworks:
    """The frozen networks of an objective.

    Args:
        encoder: images (B, C, H, W) to tokens (B, T, D), or None.
        lpips: ``LPIPS``, or any callable (x_pred, x) -> (B,) on images, or None.
        patch_size: patch size of the token layout.
        image_size: (H, W) of the images.
        ops: the kernels to use.
    """

    def __init__(
        self,
        encoder: TokenEncoder | nn.Module | None,
        lpips: LPIPS | Callable[[Tensor, Tensor], Tensor] | None,
        *,
        patch_size: int,
        image_size: tuple[int, int],
        ops: Ops,
    ) -> None:
        self.encoder: Any = encoder
        self.lpips: Any = lpips
        self.patch_size, self.image_size, self.ops = patch_size, image_size, ops
        self._shares_trunk = _share_trunk(encoder, lpips)

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """As ``nn.Module._apply``: the networks follow the objective to its device."""
        for module in (self.encoder, self.lpips):
            if isinstance(module, nn.Module):
                module._apply(fn, recurse)

    def speed_up(self, *, half: bool, compiled: bool) -> None:
        """Settings that change the networks' speed and, in half precision, their last digits.

        Args:
            half: weights of convolutions and linear layers in bf16, convolutions channels-last; the caller
                then runs them under bf16 autocast, which would convert frozen weights anew in every call.
            compiled: run the networks through ``torch.compile``.
        """
        networks = [self.encoder, self.lpips.stages if isinstance(self.lpips, LPIPS) else None]
        for network in networks:
            if not isinstance(network, nn.Module):
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

    def __call__(self, x: Tensor, of_tokens: Selection | None, of_maps: Selection | None) -> Features:
        """Features of selected rows; None asks for none of that kind.

        Args:
            x: tokens (B, T, P*P*C) or images (B, C, H, W) in [-1, 1].
            of_tokens: the rows whose tokens are wanted.
            of_maps: the rows whose maps are wanted; where both are wanted, a part of the others or the same.
        """
        if self._shares_trunk and of_tokens is not None and of_maps is not None:
            maps = self.lpips.encode(self.image(of_tokens.rows(x)))
            tokens = self.encoder.from_stages(maps)
            return Features(tokens, [of_maps.rows_of(of_tokens, stage) for stage in maps])
        seen = None if of_tokens is None else self.image(of_tokens.rows(x))
        tokens = None if seen is None else self.encoder(seen)
        if of_maps is None:
            return Features(tokens, None)
        image = seen if seen is not None and of_maps is of_tokens else self.image(of_maps.rows(x))
        return Features(tokens, self.lpips.encode(image) if isinstance(self.lpips, LPIPS) else [image])

    def lpips_distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        """LPIPS of two lists of maps, (K,) fp32.

        Raises:
            ValueError: a callable that returns another shape.
        """
        if isinstance(self.lpips, LPIPS):
            return self.lpips.distance(maps, target)
        distance = self.lpips(maps[0], target[0])
        if distance.shape != (len(maps[0]),):
            raise ValueError(
                f"Objective: lpips must return (B,) = ({len(maps[0])},), got {tuple(distance.shape)}"
            )
        return distance

    def image(self, x: Tensor) -> Tensor:
        """Tokens (B, T, P*P*C) or images to images (B, C, H, W), fp32 (fp64 if x is)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.ndim == 4:
            return x
        return self.ops.unpatchify(x, self.patch_size, self.image_size, channel_order="last")


def _share_trunk(encoder: object, lpips: object) -> bool:
    """Whether LPIPS and tokens read one embedded network, which then runs once per image, not twice."""
    return (
        isinstance(encoder, EmbeddedTokens)
        and isinstance(lpips, LPIPS)
        and lpips.resize_from_patch is None
        and isinstance(lpips.stages, EmbeddedStages)
        and lpips.stages.features is encoder.features
    )
