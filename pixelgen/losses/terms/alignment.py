"""REPA: features of the denoiser, projected, point where the encoder's features of the clean image point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixelgen.errors import UserError
from pixelgen.losses.term import Frame, Term, TermOptions, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pixelgen.config.train_config import TrainConfig
    from pixelgen.losses.features import Seen


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(TermOptions):
    """Alignment of the denoiser's features with a frozen network's tokens.

    Args:
        alignment_weight: weight of the alignment of the denoiser's features with the token network's (REPA).
        alignment_schedule: changes of that weight, as pairs of a step and the weight from it on; for example
            [[100000, 0.1], [200000, 0]]. Alignment helps early and can hurt late.
        alignment_layer: number of blocks after which the denoiser's features are taken.
        projector_width: inner width of the projector between the two.
    """

    alignment_weight: float = 0.5
    alignment_schedule: tuple[tuple[int, float], ...] = ()
    alignment_layer: int = 2
    projector_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = [step for step, _ in self.alignment_schedule]
        is_schedule = steps == sorted(set(steps)) and all(
            step >= 0 and weight >= 0 for step, weight in self.alignment_schedule
        )
        self._require("alignment_schedule", is_schedule, "have rising steps and weights of 0 or more")
        self._require("projector_width", self.projector_width >= 1, "be at least 1")

    @property
    def schedule(self) -> tuple[tuple[int, float], ...]:
        """``alignment_weight``, then the changes."""
        return ((0, self.alignment_weight), *self.alignment_schedule)

    def check(self, config: TrainConfig) -> None:
        """The features must be those of a block.

        Raises:
            UserError: the layer is not inside the model.
        """
        last = config.model_config().last_tap
        if self.is_used and not 1 <= self.alignment_layer <= last:
            raise UserError(
                f"loss.alignment_layer must be at least 1 and at most {last}, got {self.alignment_layer}"
            )

    def trained(self) -> dict[str, object]:
        """The projector: whether there is one, and its width."""
        return {
            "loss.alignment_weight or its schedule": self.is_used,
            "loss.projector_width": self.is_used and self.projector_width,
        }


def projector(feature_width: int, hidden_width: int, token_width: int) -> nn.Sequential:
    """Linear, SiLU, Linear, SiLU, Linear from the denoiser's width to the tokens'.

    State-dict keys ``{0,2,4}.{weight,bias}`` are the released
    ``diffusion_trainer.proj.0.{0,2,4}.{weight,bias}``.
    """
    from torch import nn

    return nn.Sequential(
        nn.Linear(feature_width, hidden_width),
        nn.SiLU(),
        nn.Linear(hidden_width, hidden_width),
        nn.SiLU(),
        nn.Linear(hidden_width, token_width),
    )


def resized_to(tokens: Tensor, count: int) -> Tensor:
    """Tokens of a square grid on a smaller or larger square grid.

    To fewer by adaptive average pooling, to more bilinearly, pixel centres at half positions. As many are
    left as they are, whatever their grid.

    Args:
        tokens: (B, T, D) in raster order, floating.
        count: tokens wanted.

    Returns:
        (B, count, D) in the dtype of ``tokens``.

    Raises:
        ValueError: the counts differ and are not both squares.
    """
    import torch.nn.functional as F

    B, T, D = tokens.shape
    if count == T:
        return tokens
    side, wanted = math.isqrt(T), math.isqrt(count)
    if side * side != T or wanted * wanted != count or count == 0:
        raise ValueError(
            f"Alignment: features of the denoiser and tokens of the encoder must be on square grids where "
            f"their numbers differ, got {T} and {count}"
        )
    image = tokens.transpose(1, 2).reshape(B, D, side, side)
    if wanted < side:
        image = F.adaptive_avg_pool2d(image, (wanted, wanted))
    else:
        image = F.interpolate(image, (wanted, wanted), mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)


@register
class Alignment(Term):
    """1 - cosine of projected features and tokens of the clean image (REPA, arXiv 2410.06940).

    Where the encoder has another number of tokens, the projected features are resized to its grid.
    """

    name = "alignment"
    label = "alignment (REPA)"
    Options = AlignmentOptions
    needs = frozenset({"features", "target_tokens"})
    sees = "all"
    trains = "projector"

    def __init__(self, options: Any, frame: Frame) -> None:
        super().__init__(options, frame)
        assert frame.token_width is not None
        self.network = projector(frame.feature_width, options.projector_width, frame.token_width)

    @property
    def feature_layer(self) -> int:
        """As the options say."""
        return self.options.alignment_layer

    def forward(self, seen: Seen) -> Tensor:
        """The term of each sample, (K,) fp32.

        Raises:
            ValueError: a grid that cannot be resized to the encoder's.
        """
        features, target = seen.features, seen.target.tokens
        assert self.network is not None
        # in the projector's dtype outside autocast too
        projected = self.network(features.to(next(self.network.parameters()).dtype))
        return self.frame.ops.cosine_distance(resized_to(projected, target.shape[1]), target)
