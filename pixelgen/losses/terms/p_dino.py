"""P-DINO: the prediction's patch tokens point where those of the clean image point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pixelgen.errors import UserError
from pixelgen.losses.term import Term, TermOptions, register

if TYPE_CHECKING:
    from torch import Tensor

    from pixelgen.config.train_config import TrainConfig
    from pixelgen.losses.features import Seen


@dataclass(frozen=True, kw_only=True)
class PDINOOptions(TermOptions):
    """The distance of patch tokens.

    Args:
        p_dino_weight: weight of P-DINO, one minus the cosine of the patch tokens of prediction and image.
        p_dino_gate: paper gates P-DINO per sample; released gates whole batches, as the published code.
    """

    WEIGHT = "p_dino_weight"

    p_dino_weight: float = 0.01
    p_dino_gate: Literal["paper", "released"] = "paper"

    def check(self, config: TrainConfig) -> None:
        """The released gate knows no ramps.

        Raises:
            UserError: it was asked for with one.
        """
        if self.p_dino_gate == "released" and config.loss.gate != "hard":
            raise UserError(
                f"loss.p_dino_gate must be paper with loss.gate {config.loss.gate}: released knows only hard"
            )


@register
class PDINO(Term):
    """1 - cosine of the tokens of prediction and clean image (PixelGen, arXiv 2602.02493).

    With the released gate the published code's mask cancels: all samples count as soon as one passes, and the
    term is 1 if none does.
    """

    name = "p_dino"
    label = "P-DINO"
    Options = PDINOOptions
    needs = frozenset({"tokens"})
    is_perceptual = True
    if_none_passes = 1.0

    @property
    def sees(self) -> Literal["gated", "batch"]:
        """As the options say."""
        return "batch" if self.options.p_dino_gate == "released" else "gated"

    def forward(self, seen: Seen) -> Tensor:
        """The term of each sample, (K,) fp32."""
        return self.frame.ops.cosine_distance(seen.predicted.tokens, seen.target.tokens)
