"""The flow matching term: the squared error of a velocity, predicted as it is or as x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixelgen.losses.term import Term, TermOptions, register

if TYPE_CHECKING:
    from torch import Tensor

    from pixelgen.losses.features import Seen


@dataclass(frozen=True, kw_only=True)
class FlowMatchingOptions(TermOptions):
    """None: its weight is 1, which those of the others refer to."""

    schedule = ((0, 1.0),)


@register
class FlowMatching(Term):
    """Squared error of the velocity: mean of (x_pred - x)^2 / max(1 - t, t_eps)^2 for x-prediction.

    Predicted and true velocity, (x_pred - x_t) / max(1 - t, t_eps) and (x - x_t) / max(1 - t, t_eps), share
    their denominator, so x_t cancels (JiT, arXiv 2511.13720). A model that predicts the velocity itself has
    mean of (prediction - (x - noise))^2 (PixelDiT, arXiv 2511.20645).
    """

    name = "flow_matching"
    label = "flow matching"
    Options = FlowMatchingOptions
    needs = frozenset({"patches"})
    sees = "all"

    def forward(self, seen: Seen) -> Tensor:
        """The term of each sample, (K,) fp32."""
        target, t = seen.clean, seen.t
        if seen.noise is not None:
            # nothing is divided: the denominator of t = 0 is 1
            target, t = seen.clean - seen.noise, seen.t.new_zeros(seen.t.shape)
        return self.frame.ops.flow_matching_loss(seen.prediction, target, t, t_eps=self.frame.t_eps)
