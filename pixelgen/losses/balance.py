"""Balance of perceptual and flow matching terms by gradient norm, as released code does late in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BalanceWeight(nn.Module):
    """A factor for the perceptual terms, kept in a buffer so that a resumed run continues with it.

    At steps from ``start_step`` on that ``every`` divides:
    w = clamp(|d flow_matching / d W| / (|d perceptual / d W| + 1e-4), 0, 100), weight = 0.8 weight + 0.2 w
    (PixelGen, arXiv 2602.02493, App. B.2; constants of the released code). It starts at 1.

    Args:
        start_step: first step that may update the weight; 400000 in the released code.
        every: steps between updates; 50 there.
    """

    weight: Tensor

    def __init__(self, start_step: int = 400_000, every: int = 50) -> None:
        super().__init__()
        if start_step < 0 or every < 1:
            raise ValueError(
                f"BalanceWeight: start_step must be >= 0 and every >= 1, got {start_step} and {every}"
            )
        self.start_step = start_step
        self.every = every
        self.register_buffer("weight", torch.ones(()))

    def is_due(self, step: int) -> bool:
        """Whether this step updates the weight; each costs two extra partial backward passes."""
        return step >= self.start_step and step % self.every == 0

    def update(self, flow_matching: Tensor, perceptual: Tensor, parameter: Tensor) -> None:
        """Move the weight towards the ratio of the two gradient norms. No host sync.

        Args:
            flow_matching: scalar loss.
            perceptual: scalar, the weighted sum of the perceptual terms without this factor.
            parameter: W, the weight of the denoiser's last linear layer; both losses must depend on it.
        """
        (grad_flow,) = torch.autograd.grad(flow_matching, parameter, retain_graph=True)
        (grad_perceptual,) = torch.autograd.grad(perceptual, parameter, retain_graph=True)
        with torch.no_grad():
            ratio = grad_flow.float().norm() / (grad_perceptual.float().norm() + 1e-4)
            # Out of place: the loss of the step before may still hold the old value for its backward pass.
            self.weight = 0.8 * self.weight + 0.2 * ratio.clamp(0, 100)
