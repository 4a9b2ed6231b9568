"""Balance of perceptual and flow matching terms by the norms of their gradients, late in training."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BalanceWeight(nn.Module):
    """A factor for the perceptual terms, kept in a buffer so that a resumed run continues with it.

    At steps from ``start_step`` on that ``every`` divides:
    w = clamp(|d flow_matching / d W| / (|d perceptual / d W| + 1e-4), 0, 100), weight = 0.8 weight + 0.2 w
    (PixelGen, arXiv 2602.02493, App. B.2; constants of the released code). It starts at 1.

    Args:
        start_step: first step that may update the weight; 400000 in the released code.
        every: steps between updates; 50 there.
        form: ``"released"`` is the released code's: each rank by its own part of the batch, and one without a
            gated sample moves w to its bound. ``"global"`` takes the gradients of the whole batch, so that
            all ranks agree, and moves less far, 0.2 s instead of 0.2, where the weights that the gate gives
            to all samples sum to s below 1: an empty gate says nothing.
        parts: of a process's batch that ``update`` is called with; the weight moves after the last one.
    """

    weight: Tensor

    def __init__(
        self,
        start_step: int = 400_000,
        every: int = 50,
        form: Literal["released", "global"] = "released",
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.start_step = start_step
        self.every = every
        self.form = form
        self.register_buffer("weight", torch.ones(()))
        self._seen: list[tuple[Tensor, Tensor]] = []  # of the parts so far: the two gradients, the gate's sum

    def is_due(self, step: int) -> bool:
        """Whether this step updates the weight; each costs two extra partial backward passes."""
        return step >= self.start_step and step % self.every == 0

    def update(self, flow_matching: Tensor, perceptual: Tensor, parameter: Tensor, gate: Tensor) -> None:
        """Move the weight towards the ratio of the two gradient norms. No host sync.

        Args:
            flow_matching: scalar loss, of this part of the batch.
            perceptual: scalar, the weighted sum of the perceptual terms without this factor; without a
                gradient where nothing passed the gate.
            parameter: W, the weight of the denoiser's last linear layer, on which the losses depend.
            gate: scalar tensor, the sum of the gate's weights over the samples.
        """
        if not perceptual.requires_grad:
            # Zeros by the same way: a backward pass gathers sharded weights, in all processes or in none.
            perceptual = perceptual + 0 * flow_matching
        (grad_flow,) = torch.autograd.grad(flow_matching, parameter, retain_graph=True)
        (grad_perceptual,) = torch.autograd.grad(perceptual, parameter, retain_graph=True)
        with torch.no_grad():
            self._seen.append((torch.stack([grad_flow.float(), grad_perceptual.float()]), gate.float()))
            if len(self._seen) < self.parts:
                return
            grads = torch.stack([grads for grads, _ in self._seen]).sum(0)
            gate = torch.stack([gate for _, gate in self._seen]).sum()
            self._seen.clear()
            rate = torch.full_like(self.weight, 0.2)
            if self.form == "global":
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(grads)
                    dist.all_reduce(gate)
                rate *= gate.clamp(max=1)
            flow_norm, perceptual_norm = torch.linalg.vector_norm(grads.flatten(1), dim=1)
            ratio = flow_norm / (perceptual_norm + 1e-4)
            # Out of place: the loss of the step before may still hold the old value for its backward pass.
            self.weight = (1 - rate) * self.weight + rate * ratio.clamp(0, 100)
