"""The ``loss`` section of a configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pixelgen.losses.term import TERMS, TermOptions
from pixelgen.options import OpenSection


@dataclass(frozen=True, kw_only=True)
class LossConfig(OpenSection):
    """Terms added to the flow-matching loss (arXiv 2602.02493). A weight of 0 leaves a term out.

    Args:
        gate: how the two perceptual terms depend on t: hard acts fully where t >= gate_t; cosine and sigmoid
            rise smoothly there, snr follows the share of signal in x_t, learned has a weight per bin of t.
        gate_t: the threshold of the gate; 0 for everywhere.
        gate_width: width in t of the rise of cosine, which begins at gate_t, and sigmoid, centred there.
        perceptual_ratio: factor of the sum of the two perceptual terms.
        balance: off, or a factor of that sum from a ratio of gradient norms at the last layer: global over
            all ranks, or released as the published code, on each rank alone.
        balance_start_step: first step at which balance acts.
        balance_every: steps between its updates.
        stages: network whose stages LPIPS compares; embedded is trained on the run's own images in seconds.
        stages_weights: pretrained, random, or the path of a file with the weights of vgg16.
        tokens: network whose patch tokens P-DINO and the alignment use; embedded as for stages.
        tokens_weights: pretrained, random, or the path of a file with the weights of the DINOv2.
        p_dino_layer: the DINOv2's layer, counted from 1, whose tokens are read; null for the last.
        compile_networks: compile the frozen networks with torch.compile.
    """

    SECTION = "loss."

    gate: Literal["hard", "cosine", "sigmoid", "snr", "learned"] = "hard"
    gate_t: float = 0.3
    gate_width: float = 0.2
    perceptual_ratio: float = 1.0
    balance: Literal["off", "global", "released"] = "off"
    balance_start_step: int = 400_000
    balance_every: int = 50
    stages: Literal["embedded", "vgg16"] = "embedded"
    stages_weights: str = "pretrained"
    tokens: Literal["embedded", "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14"] = (
        "embedded"
    )
    tokens_weights: str = "pretrained"
    p_dino_layer: int | None = None
    compile_networks: bool = False

    @classmethod
    def parts(cls) -> Mapping[str, type[TermOptions]]:
        """The options of the terms that are registered by now."""
        import pixelgen.losses.terms  # noqa: F401

        return {name: term.Options for name, term in TERMS.items()}

    def of_terms(self) -> dict[str, TermOptions]:
        """The options of every term by its name."""
        return {name: self.part(options) for name, options in self.parts().items()}

    def used_terms(self) -> dict[str, TermOptions]:
        """Those of the terms that have a weight at some step."""
        return {
            name: options
            for name, options in self.of_terms().items()
            if options.is_used and (self.perceptual_ratio > 0 or not TERMS[name].is_perceptual)
        }

    def needs(self, *kinds: str) -> bool:
        """Whether a term that is used needs one of these kinds of inputs; see ``Term.needs``."""
        return any(TERMS[name].needs.intersection(kinds) for name in self.used_terms())

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("gate_t", 0 <= self.gate_t <= 1, "lie in [0, 1]")
        self._require("gate_width", self.gate_width > 0, "be above 0")
        self._require("perceptual_ratio", self.perceptual_ratio >= 0, "be 0 or more")
        self._require("balance_start_step", self.balance_start_step >= 0, "be 0 or more")
        self._require("balance_every", self.balance_every >= 1, "be at least 1")
        self._require("p_dino_layer", self.p_dino_layer is None or self.p_dino_layer >= 1, "be at least 1")
        self.of_terms()  # each checks its own
