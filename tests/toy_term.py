"""A loss term of somebody else's: how much more neighbours differ in the prediction than in the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelgen.losses.features import Seen
from pixelgen.losses.term import Frame, Term, TermOptions, register


@dataclass(frozen=True, kw_only=True)
class ToyOptions(TermOptions):
    """Total variation.

    Args:
        toy_weight: weight of the difference of total variations.
        toy_start_step: first step of the term.
    """

    WEIGHT = "toy_weight"

    toy_weight: float = 0.0
    toy_start_step: int = 0

    @property
    def schedule(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0.0), (self.toy_start_step, self.toy_weight))


@register
class Toy(Term):
    """Scaled by a number that the denoiser's optimizer trains."""

    name = "toy"
    label = "total variation"
    Options = ToyOptions
    needs = frozenset({"images"})
    trains = "toy_scale"

    def __init__(self, options: ToyOptions, frame: Frame) -> None:
        super().__init__(options, frame)
        self.network = nn.Linear(1, 1)

    def forward(self, seen: Seen) -> Tensor:
        difference = total_variation(seen.predicted.images) - total_variation(seen.target.images)
        assert self.network is not None
        return self.network(difference.abs()[:, None])[:, 0].float()


def total_variation(images: Tensor) -> Tensor:
    return sum((images.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3)), torch.zeros(()))
