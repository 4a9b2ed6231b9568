"""The ``loss`` section of a configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pixelgen.options import Section


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Terms added to the flow-matching loss (arXiv 2602.02493). A weight of 0 leaves a term out.

    Args:
        alignment_weight: weight of the alignment of the denoiser's features with the token network's (REPA).
        alignment_schedule: changes of that weight, as pairs of a step and the weight from it on; for example
            [[100000, 0.1], [200000, 0]]. Alignment helps early and can hurt late.
        alignment_layer: number of blocks after which the denoiser's features are taken.
        projector_width: inner width of the projector between the two.
        lpips_weight: weight of LPIPS between prediction and image.
        p_dino_weight: weight of P-DINO, one minus the cosine of the patch tokens of prediction and image.
        gate: how the two perceptual terms depend on t: hard acts fully where t >= gate_t; cosine and sigmoid
            rise smoothly there, snr follows the share of signal in x_t, learned has a weight per bin of t.
        gate_t: the threshold of the gate; 0 for everywhere.
        gate_width: width in t of the rise of cosine, which begins at gate_t, and sigmoid, centred there.
        p_dino_gate: paper gates P-DINO per sample; released gates whole batches, as the published code.
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
        adversarial_weight: experimental: weight of a discriminator's judgement of the predicted tokens.
        adversarial_start_step: first step of the adversarial term.
        adversarial_lr: learning rate of the discriminator.
        adversarial_r1_weight: weight of the discriminator's gradient penalty R1.
    """

    SECTION = "loss."

    alignment_weight: float = 0.5
    alignment_schedule: tuple[tuple[int, float], ...] = ()
    alignment_layer: int = 2
    projector_width: int = 64
    lpips_weight: float = 0.1
    p_dino_weight: float = 0.01
    gate: Literal["hard", "cosine", "sigmoid", "snr", "learned"] = "hard"
    gate_t: float = 0.3
    gate_width: float = 0.2
    p_dino_gate: Literal["paper", "released"] = "paper"
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
    adversarial_weight: float = 0.0
    adversarial_start_step: int = 0
    adversarial_lr: float = 1e-3
    adversarial_r1_weight: float = 1.0

    @property
    def uses_alignment(self) -> bool:
        """Whether the alignment has a weight at any step."""
        return self.alignment_weight > 0 or any(weight > 0 for _, weight in self.alignment_schedule)

    def __post_init__(self) -> None:
        self._require_choices()
        for name in (
            "alignment_weight",
            "lpips_weight",
            "p_dino_weight",
            "perceptual_ratio",
            "adversarial_weight",
            "adversarial_start_step",
            "adversarial_r1_weight",
        ):
            self._require(name, getattr(self, name) >= 0, "be 0 or more")
        steps = [step for step, _ in self.alignment_schedule]
        is_schedule = steps == sorted(set(steps)) and all(
            step >= 0 and weight >= 0 for step, weight in self.alignment_schedule
        )
        self._require("alignment_schedule", is_schedule, "have rising steps and weights of 0 or more")
        is_plain = self.p_dino_gate == "paper" or self.gate == "hard"
        self._require(
            "p_dino_gate", is_plain, f"be paper with loss.gate {self.gate}: released knows only hard"
        )
        self._require("gate_width", self.gate_width > 0, "be above 0")
        self._require("adversarial_lr", self.adversarial_lr > 0, "be above 0")
        self._require("gate_t", 0 <= self.gate_t <= 1, "lie in [0, 1]")
        self._require("projector_width", self.projector_width >= 1, "be at least 1")
        self._require("balance_start_step", self.balance_start_step >= 0, "be 0 or more")
        self._require("balance_every", self.balance_every >= 1, "be at least 1")
        self._require("p_dino_layer", self.p_dino_layer is None or self.p_dino_layer >= 1, "be at least 1")
