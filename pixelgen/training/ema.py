"""Averages of the weights, several at once, in fp32 and sharded like the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixelgen.training.options import EmaConfig
from pixelgen.training.processes.shard import give_up_gathered, local


class Averages:
    """average = decay * average + (1 - decay) * weights after every optimizer step; starts as a copy of them.

    The averages by constant decays come first, under the decay's number as a name, such as ``"0.9999"``; then
    those whose profile is a power of the step, such as ``"power-0.05"``. For these (arXiv 2312.02696, eq. 2),
    step n has decay (1 - 1 / n)^(gamma + 1), so that the weights of step i count in proportion to i^gamma.

    Args:
        model: the model in training; its parameters are averaged, its buffers are constant.
        config: decays, widths of the power profiles, and warm-up: min(decay, (1 + n) / (10 + n)) in update n
            for the constant decays, so that short runs forget their first steps.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.warmup, self.num_updates = config.warmup, 0
        settings = average_settings(config)
        self._decays = {name: value for name, (kind, value) in settings.items() if kind == "decay"}
        self._gammas = {
            name: power_gamma(value) for name, (kind, value) in settings.items() if kind == "power"
        }
        self.values: dict[str, dict[str, Tensor]] = {
            name: {
                key: parameter.detach().to(torch.float32, copy=True)
                for key, parameter in model.named_parameters()
            }
            for name in settings
        }

    @property
    def names(self) -> list[str]:
        """Names of the averages; the first is the one that is used by default."""
        return list(self.values)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the weights of ``model``; enqueues on the current stream, never synchronises."""
        self.num_updates += 1
        n = self.num_updates
        weights = [local(parameter.detach()).float() for parameter in model.parameters()]
        for name, average in self.values.items():
            if name in self._gammas:
                decay = (1 - 1 / n) ** (self._gammas[name] + 1)
            else:
                decay = self._decays[name]
                decay = min(decay, (1 + n) / (10 + n)) if self.warmup else decay
            torch._foreach_lerp_([local(value) for value in average.values()], weights, 1.0 - decay)

    @contextmanager
    def exchanged(self, model: nn.Module, name: str) -> Iterator[None]:
        """Inside, ``model`` has the weights of an average, and that the model's: no copy is made.

        The model must be fp32, or the average would lose digits on the way back.
        """
        average = self.values[name]
        give_up_gathered(model)
        pairs = [(local(parameter), local(average[key])) for key, parameter in model.named_parameters()]
        _exchange(pairs)
        try:
            yield
        finally:
            give_up_gathered(model)
            _exchange(pairs)

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
def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for weight, average in pairs:
        held = weight.clone()
        weight.copy_(average)
        average.copy_(held)


def power_gamma(width: float) -> float:
    """The exponent of the profile with a relative width (arXiv 2312.02696, appendix C).

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.
    """
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def average_settings(config: EmaConfig) -> dict[str, tuple[str, float]]:
    """The averages of a configuration by name: ``("decay", decay)`` or ``("power", width)``."""
    settings = {str(decay): ("decay", decay) for decay in config.decays}
    return settings | {f"power-{width}": ("power", width) for width in config.power}
