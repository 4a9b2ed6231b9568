"""AdamW with its state from the start, so that what a checkpoint holds never depends on what has happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def adamw(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW.

    By itself AdamW makes the state of a parameter at its first gradient. Parameters of a term that starts
    later would then be missing in a checkpoint that is saved before, and PyTorch's functions for checkpoints
    would fill the gap by a step of their own.

    Args:
        groups: ``{"params": parameters}`` with options of their own; groups without parameters are left out.
        lr, betas, weight_decay: as in ``torch.optim.AdamW``.
    """
    listed = [{**group, "params": list(group["params"])} for group in groups]
    optimizer = torch.optim.AdamW(
        [group for group in listed if group["params"]],
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = _state(parameter)
    return optimizer


def _state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW makes at the first gradient."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
