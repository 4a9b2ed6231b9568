"""The training objective: the one place that gates, weights and sums the terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.losses.balance import BalanceWeight
from pixelgen.losses.features import FeatureNetworks, Wanted
from pixelgen.losses.gate import NoiseGate, Selection, masked_sum, select_samples
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.term import TERMS, Frame, Seen, Term
from pixelgen.losses.times import Times, to_device

if TYPE_CHECKING:
    from pixelgen.losses.options import LossConfig


class Outcome(NamedTuple):
    """What the objective says of a batch, or of the part of it that is at work.

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
class _Gated:
    """Which of the samples at work pass the gate, and what is known of the whole batch."""

    every: Selection
    passing: Selection
    t: Tensor  # (K,) of those that pass
    weight: Tensor  # (K,) that the gate gives them
    size: int  # samples of the whole batch
    num_passing: int  # of the whole batch, at least 1
    passes_none: bool  # of the whole batch

    def rows(self, term: Term) -> Selection | None:
        """The samples that a term sees; None where there are none."""
        if term.sees == "all" or (term.sees == "batch" and not self.passes_none):
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

    def scatter(self, term: Term, values: Tensor, batch: int) -> Tensor:
        """The same values, detached, for all samples at work; zeros where the term was not computed."""
        rows = self.rows(term)
        assert rows is not None
        return rows.scatter(values.detach(), batch)


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
        t_eps: floor of 1 - t.
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
        t_eps: float = 0.05,
        micro_batches: int = 1,
        balance_parameter: Callable[[], Tensor] | None = None,
        kernels: Literal["auto", "eager"] = "auto",
    ) -> None:
        super().__init__()
        if encoder is None and loss.needs("tokens", "clean_tokens"):
            raise ValueError("Objective: encoder must be given for a term that needs tokens, got None")
        if lpips is None and loss.needs("maps"):
            raise ValueError("Objective: lpips must be given for a term that needs maps, got None")
        if balance_parameter is None and loss.balance != "off":
            raise ValueError("Objective: balance_parameter must be given with a balance, got None")
        self.loss, self.patch_size, self.channel_order = loss, patch_size, channel_order
        self.ops = select(kernels)
        width: Any = getattr(encoder, "width", None)
        frame = Frame(feature_width, None if width is None else int(width), t_eps, self.ops)
        self.terms = [TERMS[name](options, frame) for name, options in loss.used_terms().items()]
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
        needing = (term for term in self.terms if "features" in term.needs and term.options.weight(step) > 0)
        return next((term.feature_layer for term in needing), None)

    # --- one batch ---

    def forward(
        self,
        prediction: Tensor,
        clean: Tensor,
        images: Tensor,
        times: Times,
        features: Tensor | None = None,
        *,
        step: int = 0,
        update_balance: bool = True,
    ) -> Outcome:
        """All terms of one batch, or of the part of a batch that is at work.

        Call it inside the autocast context of the denoiser: the encoders follow it, every distance is fp32.
        No host sync.

        Args:
            prediction: (B, T, P*P*C) predicted patches in raster order, values in ``channel_order``, in
                [-1, 1], not clamped.
            clean: the clean patches in the same layout.
            images: (B, C, H, W) the clean images, uint8, or floating in [-1, 1].
            times: of the batch, with B samples at work.
            features: (B, T, width) of the denoiser's block ``feature_layer(step)``.
            step: training step; it matters for the schedules.
            update_balance: update the balance weight where it is due, before it is used.

        Raises:
            ValueError: shapes that do not fit, or features that are missing.
        """
        batch = len(clean)
        if prediction.shape != clean.shape or clean.ndim != 3 or len(images) != batch or images.ndim != 4:
            raise ValueError(
                f"Objective: prediction and clean must be tokens (B, T, P*P*C) and images (B, C, H, W), "
                f"got {tuple(prediction.shape)}, {tuple(clean.shape)} and {tuple(images.shape)}"
            )
        if times.t.shape != (batch,):
            raise ValueError(f"Objective: times must have {batch} samples at work, got {len(times.t)}")
        gated = self._gate(times)
        active = self._active(step, gated)
        seen = self._look(active, gated, prediction, clean, images, features, times.t)
        nothing = torch.zeros((), device=clean.device)
        terms: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}  # of the samples that each term sees
        per_sample: dict[str, Tensor] = {}
        for term in active:
            if term.name in seen:
                values[term.name] = term.forward(seen[term.name])
                terms[term.name] = gated.reduced(term, values[term.name])
                per_sample[term.name] = gated.scatter(term, values[term.name], batch)
            else:
                of_none = term.if_none_passes if term.sees == "batch" else 0.0
                terms[term.name] = nothing + of_none * batch / gated.size
        loss = flow = terms["flow_matching"]
        perceptual = []
        for term in active:
            if term.is_perceptual:
                perceptual.append(term)
            elif term.own_loss_name is None and term.name != "flow_matching":
                loss = loss + term.options.weight(step) * terms[term.name]
        if perceptual:
            total, penalty = nothing, nothing
            for term in perceptual:
                total = total + term.options.weight(step) * terms[term.name]
            if self.loss.gate == "learned":
                penalty = terms["gate_penalty"] = self._gate_penalty(perceptual, values, times, gated, step)
            if self.balance is not None and update_balance and self.balance.is_due(step):
                assert self._balance_parameter is not None
                weight = torch.where(gated.passing.is_real, gated.weight.detach(), 0.0).sum()
                self.balance.update(flow, total, self._balance_parameter(), weight)
            ratio: float | Tensor = self.loss.perceptual_ratio
            loss = loss + (ratio if self.balance is None else ratio * self.balance.weight) * (total + penalty)
        for term in active:
            if term.own_loss_name is not None:
                own = term.own_loss_name
                terms[own] = nothing
                if term.name in seen:
                    value = term.own_loss(seen[term.name])
                    terms[own] = gated.reduced(term, value, is_weighted=False)
                    per_sample[own] = gated.scatter(term, value, batch)
                loss = loss + (term.options.weight(step) * terms[term.name] + terms[own])
        share = int(self.gate.passes(times.host).sum()) / gated.size
        terms["gated_fraction"] = torch.full((), share, device=clean.device)
        return Outcome(loss, terms, per_sample)

    def look(
        self,
        prediction: Tensor,
        clean: Tensor,
        images: Tensor,
        times: Times,
        features: Tensor | None = None,
        *,
        step: int = 0,
    ) -> dict[str, Seen]:
        """What each term sees of a batch, by its name; arguments as of ``forward``."""
        gated = self._gate(times)
        return self._look(self._active(step, gated), gated, prediction, clean, images, features, times.t)

    def _active(self, step: int, gated: _Gated) -> list[Term]:
        """The terms that are computed; a network that is trained alone steps in all processes or in none."""
        return [
            term
            for term in self.terms
            if term.options.weight(step) > 0 and not (term.own_loss_name and gated.passes_none)
        ]

    def _gate(self, times: Times) -> _Gated:
        passing = select_samples(times, self.gate)
        count = int(self.gate.passes(times.whole).sum())
        t = passing.rows(times.t)
        every = Selection(None, torch.ones_like(times.t, dtype=torch.bool))
        return _Gated(every, passing, t, self.gate(t), len(times.whole), max(1, count), count == 0)

    def _look(
        self,
        active: list[Term],
        gated: _Gated,
        prediction: Tensor,
        clean: Tensor,
        images: Tensor,
        features: Tensor | None,
        t: Tensor,
    ) -> dict[str, Seen]:
        """What each term sees; the frozen networks run on the images that some term needs, on no others."""
        rows = {term.name: gated.rows(term) for term in active}

        def widest(*kinds: str) -> Selection | None:
            found = [rows[term.name] for term in active if term.needs.intersection(kinds)]
            some = [selection for selection in found if selection is not None]
            return gated.every if gated.every in some else some[0] if some else None

        height, width = images.shape[-2:]

        def image(selected: Selection) -> Tensor:
            patches = _at_least_float32(selected.rows(prediction))
            return self.ops.unpatchify(
                patches, self.patch_size, (height, width), channel_order=self.channel_order
            )

        wanted = Wanted(widest("tokens"), widest("maps"), widest("images"))
        of_clean = replace(wanted, tokens=widest("tokens", "clean_tokens"))
        with torch.no_grad():  # one encoding of the clean images serves every term
            found_clean = self.networks(lambda selected: _in_range(selected.rows(images)), of_clean)
        found = self.networks(image, wanted)
        seen: dict[str, Seen] = {}
        for term in active:
            own = rows[term.name]
            if own is None:
                continue
            parts: dict[str, Any] = {"t": t if own is gated.every else gated.t}
            if "patches" in term.needs:
                parts |= {"prediction": own.rows(prediction), "clean": own.rows(clean)}
            if "features" in term.needs:
                if features is None:
                    raise ValueError(f"Objective: features must be given for {term.name}, got None")
                parts["features"] = own.rows(features)
            if "tokens" in term.needs:
                parts["tokens"] = found.tokens(own)
            if term.needs & {"tokens", "clean_tokens"}:
                parts["clean_tokens"] = found_clean.tokens(own)
            if "maps" in term.needs:
                parts |= {"maps": found.maps(own), "clean_maps": found_clean.maps(own)}
                parts["distance"] = self.networks.lpips.distance
            if "images" in term.needs:
                parts |= {"images": found.images(own), "clean_images": found_clean.images(own)}
            seen[term.name] = Seen(**parts)
        return seen

    def _gate_penalty(
        self, terms: list[Term], values: dict[str, Tensor], times: Times, gated: _Gated, step: int
    ) -> Tensor:
        """What the learned gate pays, judged by each sample's terms, weighted by all but the gate."""
        total = torch.zeros_like(gated.weight)
        for term in terms:
            if term.sees == "gated" and term.name in values:
                total = total + term.options.weight(step) * values[term.name]
        share = masked_sum(total, gated.passing.is_real) / gated.num_passing
        return self.gate.penalty(to_device(times.whole, gated.t.device), share)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_range(images: Tensor) -> Tensor:
    """uint8 images to [-1, 1] as ``noise_patchify`` has them; floating ones are there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else _at_least_float32(images)
