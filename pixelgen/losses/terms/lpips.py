"""LPIPS between prediction and clean image, on the samples that pass the noise gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixelgen.losses.term import Term, TermOptions, register

if TYPE_CHECKING:
    from torch import Tensor

    from pixelgen.losses.features import Seen


@dataclass(frozen=True, kw_only=True)
class LPIPSOptions(TermOptions):
    """The distance of feature maps.

    Args:
        lpips_weight: weight of LPIPS between prediction and image.
    """

    WEIGHT = "lpips_weight"

    lpips_weight: float = 0.1


@register
class LPIPSTerm(Term):
    """Sum over stages of the distance of unit-normalised feature maps (arXiv 1801.03924)."""

    name = "lpips"
    label = "LPIPS"
    Options = LPIPSOptions
    needs = frozenset({"maps"})
    is_perceptual = True

    def forward(self, seen: Seen) -> Tensor:
        """The term of each sample, (K,) fp32."""
        return self.frame.lpips.distance(seen.predicted.maps, seen.target.maps)
