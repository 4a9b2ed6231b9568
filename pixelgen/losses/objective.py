"""The training objective: the one place that gates, weights and sums the terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.encoders.base import TokenEncoder
from pixelgen.encoders.embedded import EmbeddedStages, EmbeddedTokens
from pixelgen.losses.alignment import Projector, alignment
from pixelgen.losses.balance import BalanceWeight
from pixelgen.losses.flow_matching import flow_matching
from pixelgen.losses.gate import gate, masked_mean, released_mean
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.p_dino import p_dino


class Objective(nn.Module):
    """loss = flow matching + a * alignment + r * b * (l * LPIPS + p * P-DINO)   (PixelGen, arXiv 2602.02493).

    Flow matching and alignment are means over all samples, LPIPS and P-DINO over those with ``t >= gate_t``;
    b is 1 or the balance weight. A term of weight 0 is not computed. Everything trained or saved is in
    ``projector`` and ``balance``; the frozen encoders belong to neither parameters nor state dict, but follow
    ``.to(device)``.

    Args:
        feature_width: width C of the features that ``forward`` will be given.
        patch_size: patch size of the token layout.
        image_size: (H, W) of the images.
        encoder: frozen tokens for alignment and P-DINO: any module (B, C, H, W) -> (B, T, D) with an
            attribute ``width`` = D. May be None when both weights are 0.
        lpips: ``LPIPS``, or any callable (x_pred, x) -> (B,) on images. May be None when its weight is 0.
        alignment_weight: a.
        lpips_weight: l.
        p_dino_weight: p.
        perceptual_ratio: r.
        projector_width: hidden width of the alignment's projector.
        gate_t: threshold of the noise gate; 0 for no gate.
        p_dino_gate: ``"paper"``: the gate acts per sample. ``"released"``: as the released code's mask, which
            cancels: all samples count as soon as one passes, and the term is 1 if none does.
        balance: ``"off"``, or ``"released"`` for the released code's balance weight.
        balance_start_step: first step that updates it.
        balance_every: steps between updates.
        t_eps: floor of 1 - t.
        kernels: ``"auto"`` for the fused ops, ``"eager"`` for plain PyTorch.

    Raises:
        ValueError: a negative weight, a gate outside [0, 1], an unknown mode, or a missing encoder.
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
        lpips_weight: float = 0.1,
        p_dino_weight: float = 0.01,
        perceptual_ratio: float = 1.0,
        projector_width: int = 2048,
        gate_t: float = 0.3,
        p_dino_gate: Literal["paper", "released"] = "paper",
        balance: Literal["off", "released"] = "off",
        balance_start_step: int = 400_000,
        balance_every: int = 50,
        t_eps: float = 0.05,
        kernels: Literal["auto", "eager"] = "auto",
    ) -> None:
        super().__init__()
        weights = {
            "alignment_weight": alignment_weight,
            "lpips_weight": lpips_weight,
            "p_dino_weight": p_dino_weight,
            "perceptual_ratio": perceptual_ratio,
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"Objective: {name} must not be negative, got {value}")
        if not 0 <= gate_t <= 1:
            raise ValueError(f"Objective: gate_t must lie in [0, 1], got {gate_t}")
        if p_dino_gate not in ("paper", "released"):
            raise ValueError(f"Objective: p_dino_gate must be 'paper' or 'released', got {p_dino_gate!r}")
        if balance not in ("off", "released"):
            raise ValueError(f"Objective: balance must be 'off' or 'released', got {balance!r}")
        self.uses_alignment = alignment_weight > 0
        self.uses_lpips = lpips_weight * perceptual_ratio > 0
        self.uses_p_dino = p_dino_weight * perceptual_ratio > 0
        if encoder is None and (self.uses_alignment or self.uses_p_dino):
            raise ValueError("Objective: encoder must be given for the alignment and P-DINO terms, got None")
        if lpips is None and self.uses_lpips:
            raise ValueError("Objective: lpips must be given for the LPIPS term, got None")
        self.alignment_weight = alignment_weight
        self.lpips_weight = lpips_weight
        self.p_dino_weight = p_dino_weight
        self.perceptual_ratio = perceptual_ratio
        self.gate_t = gate_t
        self.p_dino_gate = p_dino_gate
        self.patch_size = patch_size
        self.image_size = image_size
        self.t_eps = t_eps
        self.ops = select(kernels)
        # Identity has no parameters, so that optimizer and checkpoint need not ask whether the term is on.
        self.projector: nn.Module = nn.Identity()
        if self.uses_alignment:
            self.projector = Projector(feature_width, projector_width, int(encoder.width))  # type: ignore[union-attr, arg-type]
        self.balance = BalanceWeight(balance_start_step, balance_every) if balance == "released" else None
        # In a tuple, not registered: VGG16 and DINOv2 must be in no checkpoint and no optimizer.
        self._frozen = (encoder, lpips)
        self._shares_trunk = self.uses_lpips and _share_trunk(encoder, lpips)
        #: The (B,) values of the last call's terms, detached: what to look at when a loss is not finite.
        self.per_sample: dict[str, Tensor] = {}

    @property
    def encoder(self) -> Any:
        """The frozen token encoder, or None."""
        return self._frozen[0]

    @property
    def lpips(self) -> Any:
        """The LPIPS distance, or None."""
        return self._frozen[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for module in self._frozen:
            if isinstance(module, nn.Module):
                module._apply(fn, recurse)
        return self

    def forward(
        self,
        x_pred: Tensor,
        x: Tensor,
        t: Tensor,
        features: Tensor | None = None,
        *,
        step: int = 0,
        balance_parameter: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All terms of one batch.

        Call it inside the autocast context of the denoiser: the encoders follow it, every distance is fp32.

        Args:
            x_pred: prediction, tokens (B, T, P*P*C) with channels last in a patch, or images (B, C, H, W).
            x: the clean images in [-1, 1] in the same layout.
            t: (B,) time after the shift.
            features: (B, T, C) of the denoiser, for alignment; one per token of the encoder.
            step: training step, for the balance weight.
            balance_parameter: weight of the denoiser's last linear layer; needed with ``balance="released"``.

        Returns:
            Scalars on the device: ``loss`` (carries the graph), ``flow_matching``, ``alignment``, ``lpips``
            and ``p_dino`` (unweighted; absent where the weight is 0), ``gated_fraction`` (the share of
            samples that pass the gate) and ``balance_weight`` (absent with ``balance="off"``). No host sync.

        Raises:
            ValueError: shapes that do not fit, or a missing argument.
        """
        if x_pred.shape != x.shape or x.ndim not in (3, 4):
            raise ValueError(
                f"Objective: x_pred and x must both be tokens (B, T, P*P*C) or images (B, C, H, W), "
                f"got {tuple(x_pred.shape)} and {tuple(x.shape)}"
            )
        if t.shape != (len(x),):
            raise ValueError(f"Objective: t must have shape (B,) = ({len(x)},), got {tuple(t.shape)}")
        per_sample = self._per_sample_terms(x_pred, x, t, features)
        self.per_sample = {name: term.detach() for name, term in per_sample.items()}

        keep = gate(t, self.gate_t) if self.gate_t > 0 else torch.ones_like(t, dtype=torch.bool)
        terms = {"flow_matching": per_sample["flow_matching"].mean()}
        loss = terms["flow_matching"]
        if self.uses_alignment:
            terms["alignment"] = per_sample["alignment"].mean()
            loss = loss + self.alignment_weight * terms["alignment"]
        perceptual: Tensor | None = None
        if self.uses_lpips:
            terms["lpips"] = masked_mean(per_sample["lpips"], keep)
            perceptual = self.lpips_weight * terms["lpips"]
        if self.uses_p_dino:
            reduce = released_mean if self.p_dino_gate == "released" else masked_mean
            terms["p_dino"] = reduce(per_sample["p_dino"], keep)
            weighted = self.p_dino_weight * terms["p_dino"]
            perceptual = weighted if perceptual is None else perceptual + weighted
        if perceptual is not None:
            ratio: float | Tensor = self.perceptual_ratio
            if self.balance is not None:
                self._update_balance(terms["flow_matching"], perceptual, balance_parameter, step)
                ratio = ratio * self.balance.weight
            loss = loss + ratio * perceptual
        if self.balance is not None:
            terms["balance_weight"] = self.balance.weight
        terms["gated_fraction"] = keep.float().mean()
        return {"loss": loss, **terms}

    def _per_sample_terms(
        self, x_pred: Tensor, x: Tensor, t: Tensor, features: Tensor | None
    ) -> dict[str, Tensor]:
        """Every term of non-zero weight, ungated and unweighted, as (B,) fp32."""
        terms = {"flow_matching": flow_matching(x_pred, x, t, t_eps=self.t_eps, ops=self.ops)}
        if not (self.uses_alignment or self.uses_lpips or self.uses_p_dino):
            return terms
        image = self._image(x)
        with torch.no_grad():  # one encoding of the clean image serves alignment and P-DINO
            target_maps, target = self._encode(image, tokens=self.uses_alignment or self.uses_p_dino)
        if self.uses_alignment:
            if features is None:
                raise ValueError("Objective: features must be given for the alignment term, got None")
            _check_tokens("features", features, target)
            terms["alignment"] = alignment(self._project(features), target, ops=self.ops)
        if self.uses_lpips or self.uses_p_dino:
            image_pred = self._image(x_pred)
            maps, tokens = self._encode(image_pred, tokens=self.uses_p_dino)
            if self.uses_lpips:
                shared = self._shares_trunk
                terms["lpips"] = (
                    self.lpips.distance(maps, target_maps) if shared else self.lpips(image_pred, image)
                )
                if terms["lpips"].shape != t.shape:
                    raise ValueError(
                        f"Objective: lpips must return (B,) = ({len(t)},), got {tuple(terms['lpips'].shape)}"
                    )
            if self.uses_p_dino:
                terms["p_dino"] = p_dino(tokens, target, ops=self.ops)
        return terms

    def _image(self, x: Tensor) -> Tensor:
        """Tokens (B, T, P*P*C) or images to images (B, C, H, W), fp32 (fp64 if x is)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (
            x
            if x.ndim == 4
            else self.ops.unpatchify(x, self.patch_size, self.image_size, channel_order="last")
        )

    def _encode(self, image: Tensor, *, tokens: bool) -> tuple[Any, Any]:
        """LPIPS' feature maps where the tokens are made from them, else None; the tokens if asked for."""
        if self._shares_trunk:
            maps = self.lpips.encode(image)
            return maps, self.encoder.from_stages(maps) if tokens else None
        return None, self.encoder(image) if tokens else None

    def _project(self, features: Tensor) -> Tensor:
        """Features (B, T, C) through the projector, outside autocast too."""
        return self.projector(features.to(next(self.projector.parameters()).dtype))

    def _update_balance(self, flow: Tensor, perceptual: Tensor, parameter: Tensor | None, step: int) -> None:
        if self.balance is None or not self.balance.is_due(step):
            return
        if parameter is None:
            raise ValueError("Objective: balance_parameter must be given with balance='released', got None")
        self.balance.update(flow, perceptual, parameter)


def _share_trunk(encoder: object, lpips: object) -> bool:
    """Whether LPIPS and tokens read one embedded network, which then runs once per image, not twice."""
    return (
        isinstance(encoder, EmbeddedTokens)
        and isinstance(lpips, LPIPS)
        and lpips.resize_from_patch is None
        and isinstance(lpips.stages, EmbeddedStages)
        and lpips.stages.features is encoder.features
    )


def _check_tokens(name: str, tokens: Tensor, target: Tensor) -> None:
    if tokens.ndim != 3 or tokens.shape[:2] != target.shape[:2]:
        raise ValueError(
            f"Objective: {name} must have one row per token of the encoder, (B, T, C) with (B, T) = "
            f"{tuple(target.shape[:2])}, got {tuple(tokens.shape)}"
        )
