"""The ``sample`` section of a configuration. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pixelgen.options import Section


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """How images are drawn: the grids of the run, and the defaults of pixelgen.sample.

    Args:
        sampler: euler, heun (two evaluations a step), heun-reuse (one), adams (second order, one), or
            flow_dpm, which is PixelDiT's (one; adams with the weights of equal steps).
        steps: solver steps.
        guidance: scale of classifier-free guidance; 1 for none.
        guidance_low: guidance acts from this t on.
        guidance_high: guidance acts up to this t.
        guidance_rule: paper decides on the t of the evaluation, both ends included; released, as PixelGen's
            code, on the t at which the step began; pixeldit, as PixelDiT's code, on the t of the evaluation,
            both ends excluded.
        timeshift: t becomes t / (t + (1 - t) * timeshift); above 1 spends more steps near the noise.
    """

    SECTION = "sample."

    sampler: Literal["euler", "heun", "heun-reuse", "adams", "flow_dpm"] = "heun"
    steps: int = 25
    guidance: float = 2.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_rule: Literal["paper", "released", "pixeldit"] = "paper"
    timeshift: float = 1.0

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("steps", self.steps >= 1, "be at least 1")
        self._require("guidance", 0 <= self.guidance < math.inf, "be a finite number of 0 or more")
        self._require("guidance_low", 0 <= self.guidance_low <= 1, "lie in [0, 1]")
        self._require("guidance_high", self.guidance_high <= 1, "lie in [0, 1]")
        above = self.guidance_low < self.guidance_high
        self._require("guidance_high", above, f"be above sample.guidance_low {self.guidance_low}")
        self._require("timeshift", 0 < self.timeshift < math.inf, "be a finite number above 0")
