"""Averages of the weights, several at once, in fp32 and sharded like the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixelgen.training.options import EmaConfig
from pixelgen.training.processes.shard import give_up_gathered, local


class Averages:
    """average = decay * average + (1 - decay) * weights after every optimizer step; starts as a copy of them.

    ``values`` holds the averaged parameters of each average by its name; the first one is used by default.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.num_updates = 0
        self._decays = decay_schedules(config)
        self.values: dict[str, dict[str, Tensor]] = {
            name: {
                key: parameter.detach().to(torch.float32, copy=True)
                for key, parameter in model.named_parameters()
            }
            for name in self._decays
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the weights of ``model``; on the current CUDA stream, without synchronising."""
        self.num_updates += 1
        weights = [local(parameter.detach()).float() for parameter in model.parameters()]
        for name, average in self.values.items():
            decay = self._decays[name](self.num_updates)
            torch._foreach_lerp_([local(value) for value in average.values()], weights, 1.0 - decay)

    @contextmanager
    def exchanged(self, model: nn.Module, name: str) -> Iterator[None]:
        """Inside, ``model`` has the weights of an average, and the average the model's: no copy is made.

        The model must be fp32, or the average would lose digits on the way back.
        """
        _exchange(model, self.values[name])
        try:
            yield
        finally:
            _exchange(model, self.values[name])

    def state_dict(self) -> dict[str, Any]:
        """Averages by name, and the number of updates."""
        return {"values": self.values, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        for name, average in self.values.items():
            for key, value in average.items():
                value.copy_(state["values"][name][key])
        self.num_updates = state["num_updates"]


@torch.no_grad()
def _exchange(model: nn.Module, average: dict[str, Tensor]) -> None:
    give_up_gathered(model)
    for key, parameter in model.named_parameters():
        weight, averaged = local(parameter), local(average[key])
        old_weight = weight.clone()
        weight.copy_(averaged)
        averaged.copy_(old_weight)


def power_gamma(width: float) -> float:
    """The exponent of the profile with a relative width (arXiv 2312.02696, appendix C).

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.
    """
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def decay_schedules(config: EmaConfig) -> dict[str, Callable[[int], float]]:
    """The decay of update n, from 1, for each average of a configuration.

    Averages with a constant decay come first, named like ``"0.9999"``; warm-up makes it
    min(decay, (1 + n) / (10 + n)). Then those whose profile is a power of the step, like ``"power-0.05"``:
    with decay (1 - 1 / n)^(gamma + 1) the weights of step i count in proportion to i^gamma (arXiv 2312.02696,
    eq. 2).
    """

    def constant(decay: float) -> Callable[[int], float]:
        return lambda n: min(decay, (1 + n) / (10 + n)) if config.warmup else decay

    def power(width: float) -> Callable[[int], float]:
        gamma = power_gamma(width)
        return lambda n: (1 - 1 / n) ** (gamma + 1)

    schedules = {str(decay): constant(decay) for decay in config.decays}
    return schedules | {f"power-{width}": power(width) for width in config.power}
