"""Experimental: a discriminator on frozen tokens that tells predicted from clean images (a projected GAN)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixelgen.losses.term import Frame, Term, TermOptions, register

if TYPE_CHECKING:
    from torch import Tensor

    from pixelgen.losses.features import Seen


@dataclass(frozen=True, kw_only=True)
class AdversarialOptions(TermOptions):
    """The adversarial game.

    Args:
        adversarial_weight: experimental: weight of a discriminator's judgement of the predicted tokens.
        adversarial_start_step: first step of the adversarial term.
        adversarial_lr: learning rate of the discriminator.
        adversarial_r1_weight: weight of the discriminator's gradient penalty R1.
    """

    adversarial_weight: float = 0.0
    adversarial_start_step: int = 0
    adversarial_lr: float = 1e-3
    adversarial_r1_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("adversarial_start_step", self.adversarial_start_step >= 0, "be 0 or more")
        self._require("adversarial_lr", self.adversarial_lr > 0, "be above 0")

    @property
    def schedule(self) -> tuple[tuple[int, float], ...]:
        """Nothing before its first step."""
        return ((0, 0.0), (self.adversarial_start_step, self.adversarial_weight))

    def trained(self) -> dict[str, object]:
        """The discriminator: whether there is one."""
        return {"loss.adversarial_weight": self.is_used}


@register
class Adversarial(Term):
    """-D(prediction), and for the discriminator D its own loss, an optimizer of its own and no gate weight.

    Off by default and experimental: PixelGen (arXiv 2602.02493) leaves an adversarial term as an open
    question.
    """

    name = "adversarial"
    Options = AdversarialOptions
    needs = frozenset({"tokens"})
    trains = "discriminator"
    own_loss_name = "discriminator"
    remedy = "loss.adversarial_lr or loss.adversarial_weight"

    def __init__(self, options: Any, frame: Frame) -> None:
        from pixelgen.losses.discriminator import Discriminator

        super().__init__(options, frame)
        assert frame.token_width is not None
        self.network: Any = Discriminator(frame.token_width, r1_weight=options.adversarial_r1_weight)

    def forward(self, seen: Seen) -> Tensor:
        """The denoiser's side of each sample, (K,) fp32."""
        return self.network.generator_term(seen.predicted.tokens)

    def own_loss(self, seen: Seen) -> Tensor:
        """The discriminator's side, (K,) fp32."""
        return self.network.discriminator_term(seen.target.tokens, seen.predicted.tokens)

    def own_optimizer(self) -> dict[str, Any]:
        """Without momentum: the discriminator works against what moves."""
        return {"lr": self.options.adversarial_lr, "betas": (0.0, 0.99)}
