"""The training objective: the one place that gates, weights and sums the terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.losses.adversarial import Discriminator
from pixelgen.losses.alignment import Projector, alignment
from pixelgen.losses.balance import BalanceWeight
from pixelgen.losses.features import FeatureNetworks
from pixelgen.losses.flow_matching import flow_matching
from pixelgen.losses.gate import NoiseGate, Selection, masked_sum, select_samples, to_device
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.p_dino import p_dino


class Objective(nn.Module):
    """loss = flow matching + a * alignment + r * b * (l * LPIPS + p * P-DINO)   (PixelGen, arXiv 2602.02493).

    Flow matching and alignment are means over all samples. The perceptual terms, LPIPS and P-DINO, are means
    over the samples that pass the noise gate, times the gate's weight; the others are not run through their
    networks at all. b is 1 or the balance weight. A term of weight 0 is not computed. Everything trained or
    saved is in ``projector``, ``gate``, ``balance`` and ``discriminator``; the frozen encoders belong to
    neither parameters nor state dict, but follow ``.to(device)``.

    Args:
        feature_width: width C of the features that ``forward`` will be given.
        patch_size: patch size of the token layout.
        image_size: (H, W) of the images.
        encoder: frozen tokens for alignment and P-DINO: any module (B, C, H, W) -> (B, T, D) with an
            attribute ``width`` = D. May be None when no term needs it.
        lpips: ``LPIPS``, or any callable (x_pred, x) -> (B,) on images. May be None when its weight is 0.
        alignment_weight: a.
        alignment_schedule: (step, a) pairs in the order of steps: a from that step on. Before the first,
            ``alignment_weight`` holds.
        lpips_weight: l.
        p_dino_weight: p.
        perceptual_ratio: r.
        projector_width: hidden width of the alignment's projector.
        gate: the noise gate; by default hard at 0.3.
        p_dino_gate: ``"paper"``: the gate acts per sample. ``"released"``: as the released code's mask, which
            cancels: all samples count as soon as one passes, and the term is 1 if none does.
        balance: ``"off"``, or a form of ``BalanceWeight``.
        balance_start_step: first step that updates it.
        balance_every: steps between updates.
        adversarial_weight: weight of the experimental adversarial term; 0 for none.
        adversarial_start_step: first step of that term and of its discriminator's training.
        adversarial_r1_weight: gradient penalty of the discriminator.
        t_eps: floor of 1 - t.
        kernels: ``"auto"`` for the fused ops, ``"eager"`` for plain PyTorch.

    Raises:
        ValueError: a negative weight, a schedule out of order, an unknown mode, or a missing encoder.
    """

    def __init__(
        self,
        *,
        feature_width: int,
        patch_size: int,
        image_size: tuple[int, int],
        encoder: TokenEncoder | nn.Module | None = None,
        lpips: LPIPS | Callable[[Tensor, Tensor], Tensor] | None = None,
        alignment_weight: float = 0.5,
        alignment_schedule: Sequence[tuple[int, float]] = (),
        lpips_weight: float = 0.1,
        p_dino_weight: float = 0.01,
        perceptual_ratio: float = 1.0,
        projector_width: int = 2048,
        gate: NoiseGate | None = None,
        p_dino_gate: Literal["paper", "released"] = "paper",
        balance: Literal["off", "released", "global"] = "off",
        balance_start_step: int = 400_000,
        balance_every: int = 50,
        adversarial_weight: float = 0.0,
        adversarial_start_step: int = 0,
        adversarial_r1_weight: float = 1.0,
        t_eps: float = 0.05,
        kernels: Literal["auto", "eager"] = "auto",
    ) -> None:
        super().__init__()
        weights = {
            "alignment_weight": alignment_weight,
            "lpips_weight": lpips_weight,
            "p_dino_weight": p_dino_weight,
            "perceptual_ratio": perceptual_ratio,
            "adversarial_weight": adversarial_weight,
            **{f"alignment_schedule's weight of step {step}": a for step, a in alignment_schedule},
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"Objective: {name} must not be negative, got {value}")
        steps = [step for step, _ in alignment_schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"Objective: alignment_schedule's steps must increase, got {steps}")
        if p_dino_gate not in ("paper", "released"):
            raise ValueError(f"Objective: p_dino_gate must be 'paper' or 'released', got {p_dino_gate!r}")
        if p_dino_gate == "released" and gate is not None and gate.schedule != "hard":
            raise ValueError(
                f"Objective: p_dino_gate must be 'paper' with a gate that is not hard, got 'released' and "
                f"{gate.schedule!r}"
            )
        if balance not in ("off", "released", "global"):
            raise ValueError(f"Objective: balance must be 'off', 'released' or 'global', got {balance!r}")
        self.alignment_steps = ((-1, alignment_weight), *alignment_schedule)
        self.uses_alignment = any(weight > 0 for _, weight in self.alignment_steps)
        self.uses_lpips = lpips_weight * perceptual_ratio > 0
        self.uses_p_dino = p_dino_weight * perceptual_ratio > 0
        self.uses_adversarial = adversarial_weight > 0
        if encoder is None and (self.uses_alignment or self.uses_p_dino or self.uses_adversarial):
            raise ValueError(
                "Objective: encoder must be given for the alignment, P-DINO and adversarial terms, got None"
            )
        if lpips is None and self.uses_lpips:
            raise ValueError("Objective: lpips must be given for the LPIPS term, got None")
        self.lpips_weight = lpips_weight
        self.p_dino_weight = p_dino_weight
        self.perceptual_ratio = perceptual_ratio
        self.p_dino_gate = p_dino_gate
        self.adversarial_weight = adversarial_weight
        self.adversarial_start_step = adversarial_start_step
        self.t_eps = t_eps
        self.ops = select(kernels)
        self.gate = NoiseGate() if gate is None else gate
        # Identity has no parameters, so that optimizer and checkpoint need not ask whether a term is on.
        self.projector: nn.Module = nn.Identity()
        self.discriminator: nn.Module = nn.Identity()
        if self.uses_alignment:
            self.projector = Projector(feature_width, projector_width, int(encoder.width))  # type: ignore[union-attr, arg-type]
        if self.uses_adversarial:
            width = int(encoder.width)  # type: ignore[union-attr, arg-type]
            self.discriminator = Discriminator(width, r1_weight=adversarial_r1_weight)
        self.balance = (
            None if balance == "off" else BalanceWeight(balance_start_step, balance_every, form=balance)
        )
        # Not registered: VGG16 and DINOv2 must be in no checkpoint and no optimizer.
        self._networks = FeatureNetworks(
            encoder, lpips, patch_size=patch_size, image_size=image_size, ops=self.ops
        )
        #: The (B,) values of the last call's terms, detached: what to look at when a loss is not finite. 0
        #: for samples that the gate kept from the term's network.
        self.per_sample: dict[str, Tensor] = {}

    @property
    def encoder(self) -> Any:
        """The frozen token encoder, or None."""
        return self._networks.encoder

    @property
    def lpips(self) -> Any:
        """The LPIPS distance, or None."""
        return self._networks.lpips

    def speed_up_networks(self, *, half: bool, compiled: bool) -> None:
        """Frozen networks in bf16 and channels-last, and compiled; see ``FeatureNetworks.speed_up``."""
        self._networks.speed_up(half=half, compiled=compiled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._networks.apply(fn, recurse)
        return self

    def alignment_weight(self, step: int) -> float:
        """Weight of the alignment at a step."""
        return [weight for first, weight in self.alignment_steps if first <= step][-1]

    def forward(
        self,
        x_pred: Tensor,
        x: Tensor,
        t: Tensor,
        features: Tensor | None = None,
        *,
        step: int = 0,
        balance_parameter: Tensor | None = None,
        host_t: Tensor | None = None,
        whole_t: Tensor | None = None,
        update_balance: bool = True,
    ) -> dict[str, Tensor]:
        """All terms of one batch, or of the part of a batch that this process works on.

        Call it inside the autocast context of the denoiser: the encoders follow it, every distance is fp32.

        Args:
            x_pred: prediction, tokens (B, T, P*P*C) with the patch vector (row, column, channel) as the
                denoiser returns them, or images (B, C, H, W), in [-1, 1], not clamped.
            x: the clean images in the same layout.
            t: (B,) time.
            features: (B, T, C) of the denoiser, needed while the alignment's weight is not 0.
            step: training step; it matters for the schedules.
            balance_parameter: weight of the denoiser's last linear layer, needed for the balance.
            host_t: the values of t on the host. With them the perceptual networks run on the samples that
                pass the gate only; without, and with t on another device, they run on all.
            whole_t: (W,) the times of the whole batch where this is a part of it, on the host as ``host_t``.
                Sums over this part are then divided by the counts of the whole: the terms of all parts add up
                to those of the whole, and so do their gradients.
            update_balance: update the balance weight where it is due, before it is used.

        Returns:
            Scalars: ``loss`` with gradient, and what it is made of, before the weights of the terms and after
            those of the gate: ``flow_matching``, ``alignment``, ``lpips``, ``p_dino`` (only terms that were
            computed), ``gate_penalty`` (learned gate), ``adversarial``; ``discriminator``, whose gradient
            reaches the discriminator alone, is part of ``loss`` too. Then ``gated_fraction`` (share of the
            samples that pass the gate) and ``balance_weight`` (absent with ``balance="off"``). No host sync.

        Raises:
            ValueError: shapes that do not fit, or a missing argument.
        """
        if x_pred.shape != x.shape or x.ndim not in (3, 4):
            raise ValueError(
                f"Objective: x_pred and x must both be tokens (B, T, P*P*C) or images (B, C, H, W), "
                f"got {tuple(x_pred.shape)} and {tuple(x.shape)}"
            )
        for name, time in (("t", t), ("host_t", t if host_t is None else host_t)):
            if time.shape != (len(x),):
                raise ValueError(
                    f"Objective: {name} must have shape (B,) = ({len(x)},), got {tuple(time.shape)}"
                )
        own_t = t if host_t is None else host_t
        whole = _Whole.of(own_t if whole_t is None else whole_t, self.gate)
        flow = flow_matching(x_pred, x, t, t_eps=self.t_eps, ops=self.ops)
        self.per_sample = {"flow_matching": flow.detach()}
        passing = select_samples(own_t, self.gate, device=x_pred.device)
        seen = self._look(x_pred, x, passing, whole, step)
        terms = {"flow_matching": flow.sum() / whole.size}
        loss = terms["flow_matching"]

        if seen.target_of_all is not None:
            distance = self._alignment(features, seen.target_of_all)
            terms["alignment"] = distance.sum() / whole.size
            loss = loss + self.alignment_weight(step) * terms["alignment"]
        if self.uses_lpips or self.uses_p_dino:
            weight = self.gate(passing.rows(t))
            perceptual, penalty = self._perceptual(t, weight, passing, seen, whole, terms)
            ratio: float | Tensor = self.perceptual_ratio
            if self.balance is not None:
                if update_balance and self.balance.is_due(step):
                    seen_weight = torch.where(passing.is_real, weight.detach(), 0.0).sum()
                    self._update_balance(terms["flow_matching"], perceptual, balance_parameter, seen_weight)
                ratio = ratio * self.balance.weight
            perceptual = perceptual + penalty
            loss = loss + ratio * perceptual
        if self.balance is not None:
            terms["balance_weight"] = self.balance.weight
        if isinstance(self.discriminator, Discriminator) and seen.is_adversarial:
            adversarial = self._adversarial(self.discriminator, t, passing, seen, whole, terms)
            loss = loss + adversarial
        terms["gated_fraction"] = self.gate.passes(t).float().sum() / whole.size
        return {"loss": loss, **terms}

    def _look(self, x_pred: Tensor, x: Tensor, passing: Selection, whole: _Whole, step: int) -> _Seen:
        """Runs the frozen networks on the images that some term needs, and on no others."""
        everyone = Selection(len(x), None, passing.is_real.new_ones(len(x)))
        is_empty = passing.count == 0
        has_started = self.uses_adversarial and step >= self.adversarial_start_step
        is_adversarial = has_started and not whole.is_empty
        # With the released gate P-DINO sees every sample of a batch in which one passes.
        is_released = self.uses_p_dino and self.p_dino_gate == "released"
        of_tokens = everyone if is_released else passing
        sees_none = whole.is_empty if is_released else is_empty
        needs_tokens = (self.uses_p_dino and not sees_none) or (is_adversarial and not is_empty)
        of_maps = passing if self.uses_lpips and not is_empty else None
        is_aligned = self.alignment_weight(step) > 0
        of_target = everyone if is_aligned else of_tokens if needs_tokens else None
        with torch.no_grad():  # one encoding of the clean images serves every term
            clean = self._networks(x, of_target, of_maps)
        predicted = self._networks(x_pred, of_tokens if needs_tokens else None, of_maps)
        target = None
        if needs_tokens and clean.tokens is not None and of_target is not None:
            target = of_tokens.rows_of(of_target, clean.tokens)
        return _Seen(
            of_tokens=of_tokens,
            tokens=predicted.tokens,
            target=target,
            target_of_all=clean.tokens if is_aligned else None,
            maps=predicted.maps,
            target_maps=clean.maps,
            is_adversarial=is_adversarial,
        )

    def _alignment(self, features: Tensor | None, target: Tensor) -> Tensor:
        """REPA per sample, (B,)."""
        if features is None:
            raise ValueError("Objective: features must be given for the alignment term, got None")
        _check_tokens("features", features, target)
        # in the projector's dtype outside autocast too
        projected = self.projector(features.to(next(self.projector.parameters()).dtype))
        distance = alignment(projected, target, ops=self.ops)
        self.per_sample["alignment"] = distance.detach()
        return distance

    def _perceptual(
        self,
        t: Tensor,
        weight: Tensor,
        passing: Selection,
        seen: _Seen,
        whole: _Whole,
        terms: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Adds LPIPS and P-DINO to the terms; returns their weighted sum and the learned gate's penalty."""
        batch = len(t)
        nothing = torch.zeros((), device=t.device)
        # of each sample, weighted by all but the gate: what the learned gate is judged by
        total: Tensor = torch.zeros_like(weight)
        perceptual = nothing
        if self.uses_lpips:
            terms["lpips"] = nothing
            if seen.maps is not None and seen.target_maps is not None:
                distance = self._networks.lpips_distance(seen.maps, seen.target_maps)
                self.per_sample["lpips"] = passing.scatter(distance.detach(), batch)
                terms["lpips"] = masked_sum(weight * distance, passing.is_real) / whole.passing
                total = total + self.lpips_weight * distance
            perceptual = perceptual + self.lpips_weight * terms["lpips"]
        if self.uses_p_dino:
            is_released = self.p_dino_gate == "released"
            nothing_seen = nothing + batch / whole.size if is_released else nothing
            terms["p_dino"] = nothing_seen
            if seen.tokens is not None and seen.target is not None:
                distance = p_dino(seen.tokens, seen.target, ops=self.ops)
                self.per_sample["p_dino"] = seen.of_tokens.scatter(distance.detach(), batch)
                if is_released:
                    # where t is on the device alone, the host does not know whether a sample passes
                    mean = distance.sum() / whole.size
                    terms["p_dino"] = mean if whole.is_known else torch.where(whole.any, mean, nothing_seen)
                else:
                    terms["p_dino"] = masked_sum(weight * distance, passing.is_real) / whole.passing
                    total = total + self.p_dino_weight * distance
            perceptual = perceptual + self.p_dino_weight * terms["p_dino"]
        if self.gate.schedule == "learned":
            share = masked_sum(total, passing.is_real) / whole.passing
            terms["gate_penalty"] = self.gate.penalty(to_device(whole.t, t.device), share)
            return perceptual, terms["gate_penalty"]
        return perceptual, nothing

    def _update_balance(
        self, flow: Tensor, perceptual: Tensor, parameter: Tensor | None, gate: Tensor
    ) -> None:
        if parameter is None:
            raise ValueError("Objective: balance_parameter must be given with a balance, got None")
        assert self.balance is not None
        self.balance.update(flow, perceptual, parameter, gate)

    def _adversarial(
        self,
        discriminator: Discriminator,
        t: Tensor,
        passing: Selection,
        seen: _Seen,
        whole: _Whole,
        terms: dict[str, Tensor],
    ) -> Tensor:
        """Adds both sides of the adversarial game to the terms; returns their weighted sum."""
        if seen.tokens is None or seen.target is None:  # none of this part passes, but others do
            terms["adversarial"] = terms["discriminator"] = torch.zeros((), device=t.device)
            return terms["discriminator"]
        fake = passing.rows_of(seen.of_tokens, seen.tokens)
        real = passing.rows_of(seen.of_tokens, seen.target)
        weight, batch = self.gate(passing.rows(t)).detach(), len(t)
        of_generator = discriminator.generator_term(fake)
        of_discriminator = discriminator.discriminator_term(real, fake)
        self.per_sample["adversarial"] = passing.scatter(of_generator.detach(), batch)
        self.per_sample["discriminator"] = passing.scatter(of_discriminator.detach(), batch)
        terms["adversarial"] = masked_sum(weight * of_generator, passing.is_real) / whole.passing
        terms["discriminator"] = masked_sum(of_discriminator, passing.is_real) / whole.passing
        return self.adversarial_weight * terms["adversarial"] + terms["discriminator"]


@dataclass(frozen=True)
class _Whole:
    """What the terms need to know of the whole batch, of which this may be a part."""

    t: Tensor
    size: int
    passes: Tensor  # (W,) bool
    passing: int | Tensor  # how many pass, at least 1
    is_known: bool  # whether the host knows, without waiting, which samples pass

    @classmethod
    def of(cls, t: Tensor, gate: NoiseGate) -> _Whole:
        """From the times of the whole batch."""
        passes = gate.passes(t)
        is_known = t.device.type == "cpu"
        count = passes.sum().clamp_min(1)
        return cls(t, len(t), passes, int(count) if is_known else count, is_known)

    @property
    def any(self) -> Tensor:
        """Whether some sample passes."""
        return self.passes.any()

    @property
    def is_empty(self) -> bool:
        """Whether the host knows that no sample passes."""
        return self.is_known and not bool(self.any)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Frozen features of one batch; None for what no term needs."""

    of_tokens: Selection  # the rows of tokens and target
    tokens: Tensor | None
    target: Tensor | None
    target_of_all: Tensor | None  # for the alignment
    maps: list[Tensor] | None
    target_maps: list[Tensor] | None
    is_adversarial: bool


def _check_tokens(name: str, tokens: Tensor, target: Tensor) -> None:
    if tokens.ndim != 3 or tokens.shape[:2] != target.shape[:2]:
        raise ValueError(
            f"Objective: {name} must have one row per token of the encoder, (B, T, C) with (B, T) = "
            f"{tuple(target.shape[:2])}, got {tuple(tokens.shape)}"
        )
