"""Optimizers by name, with their state from the start; their learning rate; clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen.config.train_config import TrainConfig
from pixelgen.training.options import OptimizerConfig
from pixelgen.training.processes.shard import local, whole

Groups = list[dict[str, Any]]  # {"params": a list of parameters} with options of their own


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


def muon(parameters: list[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Muon:
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices, with its state from the start.

    A step is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's (arXiv 2502.16982).
    """
    optimizer = torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    for parameter in parameters:
        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return optimizer


def _adamw_alone(options: OptimizerConfig, groups: Groups, matrices: set[int]) -> list[torch.optim.Optimizer]:
    return [adamw(groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)]


def _muon_and_adamw(
    options: OptimizerConfig, groups: Groups, matrices: set[int]
) -> list[torch.optim.Optimizer]:
    of_muon = [p for group in groups for p in group["params"] if id(p) in matrices]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
    first = muon(of_muon, lr=options.lr, weight_decay=options.weight_decay)
    return [first, *_adamw_alone(options, rest, matrices)]


# optimizer.name -> (options, groups, ids of the matrices of the blocks) -> the optimizers of all groups
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Groups, set[int]], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw_alone,
    "muon": _muon_and_adamw,
}


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step ``step``, from 0: linear warm-up, then constant, or cosine down to zero."""
    optimizer = config.optimizer
    warm = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    if optimizer.schedule == "cosine":
        remaining = max(1, config.train.max_steps - optimizer.warmup_steps)
        progress = min(1.0, max(0, step - optimizer.warmup_steps) / remaining)
        return optimizer.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * warm


def _state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """What AdamW makes at the first gradient."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales gradients down to a norm, if one is given; returns that of all shards before. No host sync."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds: dict[type, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault(type(grad), []).append(grad)
    norms = [whole(nn.utils.get_total_norm(same, foreach=True)) for same in kinds.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        torch._foreach_mul_([local(grad) for grad in grads], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
