"""The training objective: the one place that gates, weights and sums the terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.losses.balance import BalanceWeight
from pixelgen.losses.features import FeatureNetworks, ImageFeatures, Seen, SelectedFeatures
from pixelgen.losses.gate import NoiseGate, Selection, masked_sum, select_samples
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.term import TERMS, Frame, Term
from pixelgen.losses.times import Times, to_device

if TYPE_CHECKING:
    from pixelgen.losses.options import LossConfig


class Outcome(NamedTuple):
    """The loss of a batch, or of the part of it that a process works on, and what it is made of.

    Attributes:
        loss: scalar with gradient; the parts of a batch add up to the batch's.
        terms: what it is made of, scalars before the weights of the terms and after those of the gate, of
            which parts add up too: the terms that were computed, ``discriminator``, ``gate_penalty`` (learned
            gate), ``gated_fraction`` (share of the samples that pass the gate).
        per_sample: (B,) values of the terms, detached: what to look at when a loss is not finite. 0 for
            samples that the gate kept from the term's network.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    per_sample: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _GatedBatch:
    """Which of the local samples pass the gate, and what is known of the whole batch."""

    every: Selection
    passing: Selection
    t: Tensor  # (K,) of those that pass
    weight: Tensor  # (K,) that the gate gives them
    size: int  # samples of the whole batch
    num_passing: int  # of the whole batch, at least 1
    is_empty: bool  # whether none of the whole batch passes

    def rows(self, term: Term) -> Selection | None:
        """The local samples that a term sees; None where there are none."""
        if term.sees == "all" or (term.sees == "batch" and not self.is_empty):
            return self.every
        return self.passing if term.sees == "gated" and len(self.passing) else None

    def reduced(self, term: Term, values: Tensor, *, is_weighted: bool = True) -> Tensor:
        """Values of the samples that a term sees as a share of the batch's term, as ``Term`` says."""
        if term.sees != "gated":
            return values.sum() / self.size
        if is_weighted:
            # only the perceptual terms train a learned gate
            values = (self.weight if term.is_perceptual else self.weight.detach()) * values
        return masked_sum(values, self.passing.is_real) / self.num_passing


class Look(NamedTuple):
    """What the terms of a step see of a batch: ``active`` ones, of which ``seen`` are those that see any."""

    step: int
    times: Times
    batch: _GatedBatch
    active: list[Term]
    seen: dict[str, Seen]


class Objective(nn.Module):
    """loss = flow matching + sum of w * term + r * b * sum of w * perceptual term.

    (PixelGen, arXiv 2602.02493.) Terms, their weights w and which samples they see:
    ``pixelgen.losses.terms``. r is ``loss.perceptual_ratio``, b is 1 or the balance weight. A term of weight
    0 is not computed. Everything that is trained or saved is in ``gate``, ``balance`` and the networks of the
    terms (``projector``, ``discriminator``); the frozen encoders belong to neither parameters nor state dict,
    but follow ``.to(device)``.

    Args:
        loss: the section of the configuration.
        feature_width: width of the features that ``forward`` will be given.
        patch_size: patch size of the token layout.
        encoder: frozen tokens: any module (B, C, H, W) -> (B, T, D) with an attribute ``width`` = D. May be
            None when no term needs it.
        lpips: ``LPIPS``, or what has its ``encode`` and ``distance``. May be None when no term needs it.
        channel_order: order of the values of a patch: whether the channel comes first or last.
        prediction: what the denoiser predicts: ``"x"``, clean patches, or ``"velocity"``, x - noise.
        t_eps: floor of 1 - t, for ``"x"``.
        micro_batches: calls of a step, for the balance.
        balance_parameter: gives the parameter by whose gradients the balance is found; needed for one.
        kernels: ``"auto"`` for the fused ops, ``"eager"`` for plain PyTorch.

    Raises:
        ValueError: an encoder or the balance's parameter is missing, or terms want features of two blocks.
    """

    def __init__(
        self,
        loss: LossConfig,
        *,
        feature_width: int,
        patch_size: int,
        encoder: TokenEncoder | nn.Module | None = None,
        lpips: LPIPS | nn.Module | None = None,
        channel_order: Literal["first", "last"] = "last",
        prediction: Literal["x", "velocity"] = "x",
        t_eps: float = 0.05,
        micro_batches: int = 1,
        balance_parameter: Callable[[], Tensor] | None = None,
        kernels: Literal["auto", "eager"] = "auto",
    ) -> None:
        super().__init__()
        if encoder is None and loss.needs("tokens", "target_tokens"):
            raise ValueError("Objective: encoder must be given for a term that needs tokens, got None")
        if lpips is None and loss.needs("maps"):
            raise ValueError("Objective: lpips must be given for a term that needs maps, got None")
        if balance_parameter is None and loss.balance != "off":
            raise ValueError("Objective: balance_parameter must be given with a balance, got None")
        self.loss, self.patch_size, self.channel_order = loss, patch_size, channel_order
        self.prediction = prediction
        self.ops = select(kernels)
        width: Any = getattr(encoder, "width", None)
        frame = Frame(feature_width, None if width is None else int(width), t_eps, lpips, self.ops)
        self._by_name = {name: TERMS[name](options, frame) for name, options in loss.used_terms().items()}
        self.terms = list(self._by_name.values())
        layers = {term.feature_layer for term in self.terms} - {None}
        if len(layers) > 1:
            raise ValueError(f"Objective: terms must want features of one block, got {layers}")
        for term in self.terms:
            if term.trains is not None and term.network is not None:
                self.add_module(term.trains, term.network)
        self.gate = NoiseGate(loss.gate, loss.gate_t, loss.gate_width)
        self.balance = (
            None
            if loss.balance == "off"
            else BalanceWeight(loss.balance_start_step, loss.balance_every, loss.balance, micro_batches)
        )
        self._balance_parameter = balance_parameter
        # Not registered: VGG16 and DINOv2 must be in no checkpoint and no optimizer.
        self.networks = FeatureNetworks(encoder, lpips)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.networks.apply(fn, recurse)
        return self

    # --- what a trainer asks ---

    def trained_with_the_denoiser(self) -> dict[str, nn.Module]:
        """Networks of the terms that the denoiser's optimizer trains, by the names they are saved under."""
        return {name: self.get_submodule(name) for name, term in self._trained() if not term.own_loss_name}

    def trained_alone(self) -> dict[str, Term]:
        """Terms whose network has an optimizer of its own, by the name that it is saved under."""
        return {name: term for name, term in self._trained() if term.own_loss_name}

    def _trained(self) -> list[tuple[str, Term]]:
        return [(term.trains, term) for term in self.terms if term.trains is not None]

    def remedy(self, figures: set[str]) -> str | None:
        """What to lower where only these figures of a step are not finite; None where that is not known."""
        return next((t.remedy for t in self.terms if t.remedy and figures <= set(t.figures)), None)

    def feature_layer(self, step: int) -> int | None:
        """The block of the denoiser whose input is needed at a step; None for none."""
        return next((t.feature_layer for t in self._active(step) if "features" in t.needs), None)

    # --- one batch ---

    def forward(
        self,
        prediction: Tensor,
        clean: Tensor,
        images: Tensor,
        times: Times,
        features: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        step: int = 0,
        update_balance: bool = True,
    ) -> Outcome:
        """All terms of one batch, or of the part of it that a process works on: its local samples.

        Call it inside the autocast context of the denoiser: the encoders follow it, every distance is fp32.
        No host sync.

        Args:
            prediction: (B, T, P*P*C) the denoiser's output in raster order, values in ``channel_order``:
                clean patches in [-1, 1], not clamped, or their velocity.
            clean: the clean patches in the same layout.
            images: (B, C, H, W) the clean images, uint8, or floating in [-1, 1].
            times: of the batch, with B local samples.
            features: (B, T, width) of the denoiser's block ``feature_layer(step)``.
            noise: fp32 noise patches, times the noise scale, in the layout of ``clean``; used for a velocity
                alone.
            step: training step; it matters for the schedules.
            update_balance: update the balance weight where it is due, before it is used.

        Raises:
            ValueError: shapes that do not fit, or features or noise that are missing.
        """
        seen = self.look(prediction, clean, images, times, features, noise=noise, step=step)
        return self.evaluate(seen, update_balance=update_balance)

    def look(
        self,
        prediction: Tensor,
        clean: Tensor,
        images: Tensor,
        times: Times,
        features: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        step: int = 0,
    ) -> Look:
        """What the terms of a step see; arguments as of ``forward``."""
        count = len(clean)
        if prediction.shape != clean.shape or clean.ndim != 3 or len(images) != count or images.ndim != 4:
            raise ValueError(
                f"Objective: prediction and clean must be tokens (B, T, P*P*C) and images (B, C, H, W), "
                f"got {tuple(prediction.shape)}, {tuple(clean.shape)} and {tuple(images.shape)}"
            )
        if times.t.shape != (count,):
            raise ValueError(f"Objective: times must have {count} local samples, got {len(times.t)}")
        if self.prediction != "velocity":
            noise = None
        elif noise is None or noise.shape != clean.shape:
            raise ValueError(
                f"Objective: noise must be given for a velocity, in the shape of clean {tuple(clean.shape)}, "
                f"got {None if noise is None else tuple(noise.shape)}"
            )
        height, width = images.shape[-2:]

        def predicted_images(rows: Selection) -> Tensor:
            patches = _at_least_float32(rows.rows(prediction))
            if noise is not None:
                # x_t + (1 - t) velocity, in which x_t is not rounded to the dtype of the denoiser's input
                t = rows.rows(times.t)[:, None, None]
                patches = t * rows.rows(clean) + (1 - t) * (rows.rows(noise) + patches)
            return self.ops.unpatchify(
                patches, self.patch_size, (height, width), channel_order=self.channel_order
            )

        predicted = ImageFeatures(self.networks, predicted_images, has_gradient=True)
        target = ImageFeatures(self.networks, lambda rows: _in_range(rows.rows(images)), has_gradient=False)
        batch = self._gate(times)
        # A network that is trained alone steps in all processes or in none.
        active = [t for t in self._active(step) if not (t.own_loss_name and batch.is_empty)]
        seen = {}
        # Those that see all samples first: their features serve the others.
        for term in sorted(active, key=lambda term: batch.rows(term) is not batch.every):
            rows = batch.rows(term)
            if rows is None:
                continue
            inputs: dict[str, Any] = {}
            if "patches" in term.needs:
                inputs |= {"prediction": rows.rows(prediction), "clean": rows.rows(clean)}
                if noise is not None:
                    inputs["noise"] = rows.rows(noise)
            if "features" in term.needs:
                if features is None:
                    raise ValueError(f"Objective: features must be given for {term.name}, got None")
                if features.ndim != 3 or features.shape[:2] != clean.shape[:2]:
                    raise ValueError(
                        f"Objective: features must have one row per patch, (B, T, C) with (B, T) = "
                        f"{tuple(clean.shape[:2])}, got {tuple(features.shape)}"
                    )
                inputs["features"] = rows.rows(features)
            own_t = times.t if rows is batch.every else batch.t
            sides = SelectedFeatures(predicted, rows), SelectedFeatures(target, rows)
            seen[term.name] = Seen(own_t, *sides, **inputs)
        return Look(step, times, batch, active, seen)

    def evaluate(self, look: Look, *, update_balance: bool = True) -> Outcome:
        """The terms and the loss of what ``look`` gave."""
        step, batch, count = look.step, look.batch, len(look.times.t)
        nothing = torch.zeros((), device=look.times.t.device)
        terms: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}  # of the samples that each term sees
        per_sample: dict[str, Tensor] = {}

        def reduce(name: str, term: Term, value: Tensor, *, is_weighted: bool = True) -> None:
            values[name] = value
            terms[name] = batch.reduced(term, value, is_weighted=is_weighted)
            rows = batch.rows(term)
            assert rows is not None
            per_sample[name] = rows.scatter(value.detach(), count)

        for term in look.active:
            terms[term.name] = nothing
            if term.sees == "batch" and batch.is_empty:
                terms[term.name] = nothing + term.if_none_passes * count / batch.size
        for name, seen in look.seen.items():
            term = self._by_name[name]
            reduce(name, term, term.forward(seen))
        loss = terms["flow_matching"]
        for term in look.active:
            if not term.is_perceptual and term.own_loss_name is None and term.name != "flow_matching":
                loss = loss + term.options.weight(step) * terms[term.name]
        if any(term.is_perceptual for term in look.active):
            loss = loss + self._perceptual(look, terms, values, nothing, update_balance)
        for term in look.active:
            if term.own_loss_name is not None:
                terms[term.own_loss_name] = nothing
                if term.name in look.seen:
                    reduce(term.own_loss_name, term, term.own_loss(look.seen[term.name]), is_weighted=False)
                loss = loss + (term.options.weight(step) * terms[term.name] + terms[term.own_loss_name])
        share = int(self.gate.passes(look.times.host).sum()) / batch.size
        terms["gated_fraction"] = torch.full((), share, device=nothing.device)
        return Outcome(loss, terms, per_sample)

    def _perceptual(
        self,
        look: Look,
        terms: dict[str, Tensor],
        values: dict[str, Tensor],
        nothing: Tensor,
        update_balance: bool,
    ) -> Tensor:
        """r * b * the weighted sum of the perceptual terms, with what a learned gate pays."""
        batch, total, penalty = look.batch, nothing, nothing
        weights = {term.name: term.options.weight(look.step) for term in look.active if term.is_perceptual}
        for name, weight in weights.items():
            total = total + weight * terms[name]
        if self.loss.gate == "learned":
            # judged by each sample's terms, weighted by all but the gate
            judged = torch.zeros_like(batch.weight)
            for name, weight in weights.items():
                if name in values and self._by_name[name].sees == "gated":
                    judged = judged + weight * values[name]
            share = masked_sum(judged, batch.passing.is_real) / batch.num_passing
            penalty = self.gate.penalty(to_device(look.times.whole, nothing.device), share)
            terms["gate_penalty"] = penalty
        ratio: float | Tensor = self.loss.perceptual_ratio
        if self.balance is not None:
            if update_balance and self.balance.is_due(look.step):
                assert self._balance_parameter is not None
                gate_sum = torch.where(batch.passing.is_real, batch.weight.detach(), 0.0).sum()
                self.balance.update(terms["flow_matching"], total, self._balance_parameter(), gate_sum)
            ratio = ratio * self.balance.weight
        return ratio * (total + penalty)

    def _active(self, step: int) -> list[Term]:
        return [term for term in self.terms if term.options.weight(step) > 0]

    def _gate(self, times: Times) -> _GatedBatch:
        passing = select_samples(times, self.gate)
        count = int(self.gate.passes(times.whole).sum())
        t = passing.rows(times.t)
        every = Selection(None, torch.ones_like(times.t, dtype=torch.bool))
        return _GatedBatch(every, passing, t, self.gate(t), len(times.whole), max(1, count), count == 0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_range(images: Tensor) -> Tensor:
    """uint8 images to [-1, 1] as ``noise_patchify`` has them; floating ones are there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else _at_least_float32(images)
