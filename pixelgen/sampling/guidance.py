"""Classifier-free guidance within an interval of t, as a velocity function for the solvers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pixelgen.conditions import Condition, joined
from pixelgen.flow import round_to_float32, velocity_from_x_pred
from pixelgen.sampling.options import SampleConfig

BORDER_MARGIN = 1e-6  # ten times the rounding of an fp32 grid of times


class GuidedVelocity:
    """velocity = v_null + scale * (v_label - v_null) inside the guidance interval, v_label outside it.

    Classifier-free guidance (arXiv 2207.12598) limited to an interval (arXiv 2404.07724), on the velocities
    v = (x_pred - x_t) / max(1 - t, t_eps) of an x-predicting model, or on those that the model predicts.
    Inside the interval null condition and condition run as one doubled batch, null first; outside it, and
    when ``scale`` is 1, only the condition runs.

    Which evaluations are guided:

    - rule ``"paper"``: low <= t <= high, t being the time of the evaluation itself, with a margin of 1e-6 so
      that a grid time is on the border where it is meant to be;
    - rule ``"released"``: low < step_t <= high (``< high`` for its Adams) compared in fp32, step_t being the
      time at which the solver step began. So Heun's corrector follows its predictor, and with low = 0 the
      first step is never guided;
    - rule ``"pixeldit"``, PixelDiT's: low < t < high, both ends excluded and compared in fp32, t being the
      time of the evaluation itself, so that Heun's corrector is decided on by itself. With low = 0 the first
      step is never guided. A grid time that is meant to be on a border is on it, or next to it, by its
      rounding to fp32: of 100 even steps between 0.1 and 0.9, 11 to 89 are guided.

    Attributes:
        nfe: network evaluations per image so far: 1 for a plain batch, 2 for a doubled one.

    Args:
        model_fn: ``model_fn(x_t (B, ...), t (B,), condition) -> prediction (B, ...)``.
        condition: of each image, on the device of the images.
        null: the null condition, of the same names, shapes and dtypes.
        settings: guidance scale, interval and rule, and the sampler.
        t_eps: smallest denominator of the velocity, positive; None for a model that predicts the velocity
            x - noise itself.
    """

    def __init__(
        self,
        model_fn: Callable[[Tensor, Tensor, Condition], Tensor],
        condition: Condition,
        null: Condition,
        settings: SampleConfig,
        t_eps: float | None = 0.05,
    ) -> None:
        self.model_fn = model_fn
        self.condition = condition
        self.scale = settings.guidance
        self.doubled = joined(null, condition) if self.scale != 1.0 else condition
        self.settings = settings
        self.low = round_to_float32(settings.guidance_low)
        self.high = round_to_float32(settings.guidance_high)
        self.t_eps = t_eps
        self.nfe = 0

    def is_guided(self, t: float, step_t: float) -> bool:
        """Whether an evaluation at ``t``, in a step that began at ``step_t``, runs the doubled batch."""
        if self.scale == 1.0:
            return False
        if self.settings.guidance_rule == "paper":
            return self.low - BORDER_MARGIN <= t <= self.high + BORDER_MARGIN
        if self.settings.guidance_rule == "pixeldit":
            return self.low < round_to_float32(t) < self.high
        start = round_to_float32(step_t)
        return self.low < start < self.high or (start == self.high and self.settings.sampler != "adams")

    def __call__(self, x_t: Tensor, t: float, step_t: float) -> Tensor:
        """Velocity of ``x_t`` (B, ...) at ``t``, in a step that began at ``step_t``; shape of ``x_t``."""
        if not self.is_guided(t, step_t):
            self.nfe += 1
            return self._velocity(x_t, t, self.condition)
        self.nfe += 2
        null, label = self._velocity(torch.cat([x_t, x_t]), t, self.doubled).chunk(2)
        return null + self.scale * (label - null)

    def _velocity(self, x_t: Tensor, t: float, condition: Condition) -> Tensor:
        # Filled on the device: torch.tensor(t) would be made on the host, and its copy waited for.
        time = torch.full((x_t.shape[0],), t, dtype=x_t.dtype, device=x_t.device)
        prediction = self.model_fn(x_t, time, condition)
        return prediction if self.t_eps is None else velocity_from_x_pred(prediction, x_t, t, self.t_eps)
