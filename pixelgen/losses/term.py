"""What a loss term is: its options, what it compares, which samples it sees. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pixelgen.options import Section

if TYPE_CHECKING:
    from pixelgen_kernels import Ops
    from torch import Tensor, nn

    from pixelgen.config.train_config import TrainConfig
    from pixelgen.losses.features import Seen

Need = Literal["patches", "features", "target_tokens", "tokens", "maps", "images"]


@dataclass(frozen=True, kw_only=True)
class TermOptions(Section):
    """Options of a term, each one of the ``loss`` section; those called ``..._weight`` are 0 or more."""

    SECTION = "loss."
    #: The option that holds the weight of the term.
    WEIGHT: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._require_choices()
        for item in fields(self):
            if item.name.endswith("_weight"):
                self._require(item.name, getattr(self, item.name) >= 0, "be 0 or more")

    @property
    def schedule(self) -> tuple[tuple[int, float], ...]:
        """Steps in rising order, the first 0, and the weight of the term from each on; 0 leaves it out."""
        return ((0, getattr(self, self.WEIGHT)),)

    def weight(self, step: int) -> float:
        """The weight at a step."""
        return [weight for first, weight in self.schedule if first <= step][-1]

    @property
    def is_used(self) -> bool:
        """Whether the term has a weight at any step."""
        return any(weight > 0 for _, weight in self.schedule)

    def check(self, config: TrainConfig) -> None:
        """Refuses what does not fit the other sections.

        Raises:
            UserError: it does not.
        """

    def trained(self) -> dict[str, object]:
        """What must not change at a resume, by the names of the options that would change it."""
        return {}


@dataclass(frozen=True)
class Frame:
    """What a term is built for.

    Attributes:
        feature_width: width of the denoiser's features.
        token_width: width of the frozen tokens; None where no term needs them.
        t_eps: floor of 1 - t.
        lpips: has ``distance``, the LPIPS of two lists of maps, (K,) fp32; None where no term needs maps.
        ops: the kernels to use.
    """

    feature_width: int
    token_width: int | None
    t_eps: float
    lpips: Any
    ops: Ops


class Term(ABC):
    """One term of the objective.

    The objective calls ``forward`` where the weight of the step is above 0, for the samples that the term
    sees, and reduces what comes back:

        all     the mean over the batch.
        gated   the mean over the samples that pass the noise gate, times the gate's weight; the others are
                not run through the term's networks. 0 where none passes.
        batch   the mean over the batch as soon as one sample passes, and ``if_none_passes`` where none does.

    Means are over the whole batch: a process divides the sum over its own part by the number of samples of
    all, so that the terms of all processes add up to the batch's.

    Args:
        options: the term's own.
        frame: what it is built for.
    """

    name: ClassVar[str]
    Options: ClassVar[type[TermOptions]]
    #: What the loss curve's axis is called.
    label: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    #: Whether ``loss.perceptual_ratio`` and the balance scale the term; such terms also train a learned gate.
    is_perceptual: ClassVar[bool] = False
    if_none_passes: ClassVar[float] = 0.0
    #: Under which name the network that the term trains is saved; None where there is none.
    trains: ClassVar[str | None] = None
    #: Name of the network's own loss, if it has one: it is then trained by an optimizer of its own.
    own_loss_name: ClassVar[str | None] = None
    #: Options to lower where the term's figures alone are not finite.
    remedy: ClassVar[str | None] = None

    def __init__(self, options: Any, frame: Frame) -> None:
        self.options, self.frame = options, frame
        self.network: nn.Module | None = None

    @property
    def sees(self) -> Literal["all", "gated", "batch"]:
        """Which samples."""
        return "gated"

    @property
    def feature_layer(self) -> int | None:
        """The block of the denoiser whose input it needs as ``features``."""
        return None

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """The term of each sample, (K,) fp32."""

    def own_loss(self, seen: Seen) -> Tensor:
        """What the term's network lowers by its own optimizer, (K,) fp32, with gradients for it alone."""
        raise NotImplementedError(f"{type(self).__name__}.own_loss")

    def own_optimizer(self) -> dict[str, Any]:
        """``lr`` and ``betas`` of that optimizer, an AdamW without decay."""
        raise NotImplementedError(f"{type(self).__name__}.own_optimizer")

    @property
    def figures(self) -> tuple[str, ...]:
        """Names under which the term appears in the log."""
        own = self.own_loss_name
        return (self.name,) if own is None else (self.name, own, f"{own}_grad_norm")


TERMS: dict[str, type[Term]] = {}


def register(term: type[Term]) -> type[Term]:
    """Makes a term known; its options then belong to the ``loss`` section. For use as a decorator.

    Raises:
        ValueError: another one has its name.
    """
    if TERMS.setdefault(term.name, term) is not term:
        raise ValueError(f"loss term {term.name} is registered already")
    return term
