"""Exponential moving average of the weights, in fp32."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """ema = decay * ema + (1 - decay) * weights after every optimizer step; starts as a copy of the weights.

    Args:
        model: the model in training; its parameters are averaged, its buffers are constant and copied once.
        decay: the decay at the end of warm-up, in [0, 1).
        warmup: use min(decay, (1 + n) / (10 + n)) in update n, so that short runs forget their first steps.
    """

    def __init__(self, model: Model, decay: float, warmup: bool) -> None:
        self.decay, self.warmup, self.num_updates = decay, warmup, 0
        self.model: Model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the weights of ``model``; enqueues on the current stream, never synchronises."""
        self.num_updates += 1
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        averages: list[Tensor] = list(self.model.parameters())
        weights = [parameter.detach().float() for parameter in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def state_dict(self) -> dict:
        """Averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        """Restores what ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        self.num_updates = state["num_updates"]
