"""What a batch of images is conditioned on, such as class labels: named tensors, one row per image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# "label": (B,) int64 class indices; a family of denoisers may read others.
Condition = Mapping[str, Tensor]


def part_of(condition: Condition, start: int, stop: int) -> Condition:
    """The condition of some consecutive images."""
    return {name: value[start:stop] for name, value in condition.items()}


def moved(condition: Condition, device: torch.device, *, non_blocking: bool = False) -> Condition:
    """The condition on a device."""
    return {name: value.to(device, non_blocking=non_blocking) for name, value in condition.items()}


def joined(first: Condition, second: Condition) -> Condition:
    """The rows of two conditions of the same names, one after the other."""
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def dropped(condition: Condition, null: Condition, is_dropped: Tensor) -> Condition:
    """The condition, with the rows of ``null`` (same names and shapes) where ``is_dropped`` (B,) is set."""

    def choose(value: Tensor, nothing: Tensor) -> Tensor:
        return torch.where(is_dropped.view(-1, *[1] * (value.dim() - 1)), nothing, value)

    return {name: choose(value, null[name]) for name, value in condition.items()}
