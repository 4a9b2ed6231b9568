"""The discriminator of the adversarial term: what tells predicted from clean tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class Discriminator(nn.Module):
    """One logit per token of the frozen encoder, hinge loss, gradient penalty R1.

    The encoder projects images to features in which a small head suffices (projected GANs, arXiv 2111.01007);
    R1 (arXiv 1801.04406) keeps the head smooth around real tokens.

    Args:
        width: width D of the encoder's tokens.
        hidden_width: width of the head's two hidden layers.
        r1_weight: factor of the gradient penalty, as ``loss.adversarial_r1_weight``; 0 for none.
    """

    def __init__(self, width: int, hidden_width: int = 256, r1_weight: float = 1.0) -> None:
        super().__init__()
        self.r1_weight = r1_weight
        self.head = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_width, hidden_width),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_width, 1),
        )

    def generator_term(self, fake: Tensor) -> Tensor:
        """-D(fake) per sample, (B,) fp32: what the denoiser lowers. No gradient for the discriminator."""
        frozen = {name: parameter.detach() for name, parameter in self.head.named_parameters()}
        with _full_precision(fake):
            return -functional_call(self.head, frozen, (_normalised(fake),)).mean((1, 2))

    def discriminator_term(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's own loss per sample, (B,) fp32; no gradient for the tokens.

            relu(1 - D(real)) + relu(1 + D(fake)) + r1_weight / 2 |d D(real) / d real|^2

        Args:
            real: (B, T, D) tokens of clean images.
            fake: (B, T, D) tokens of predictions.
        """
        real = _normalised(real.detach()).requires_grad_(self.r1_weight > 0)
        with _full_precision(real):  # a second derivative
            on_real, on_fake = self.head(real), self.head(_normalised(fake.detach()))
            per_sample = F.relu(1 - on_real).mean((1, 2)) + F.relu(1 + on_fake).mean((1, 2))
            if self.r1_weight > 0:
                (gradient,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
                per_sample = per_sample + self.r1_weight / 2 * gradient.square().sum(2).mean(1)
        return per_sample


def _full_precision(tokens: Tensor) -> AbstractContextManager[object]:
    device = tokens.device.type
    # the meta device, on which FLOPs are counted, knows no autocast
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _normalised(tokens: Tensor) -> Tensor:
    """Tokens (B, T, D) with unit variance per token, fp32: frozen encoders differ in scale."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
