"""The optimizers of a run, by name and with their state from the start; learning rate; clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor.experimental import implicit_replication

from pixelgen.config.train_config import TrainConfig
from pixelgen.losses.objective import Objective
from pixelgen.models.denoiser import Denoiser
from pixelgen.training.options import OptimizerConfig
from pixelgen.training.processes.shard import local, whole
from pixelgen.training.processes.world import World

Groups = list[dict[str, Any]]  # parameter groups as in torch.optim


def _fused_adamw(groups: Groups, **options: Any) -> torch.optim.AdamW:
    """Fused AdamW for the groups that have parameters, with its state from the start.

    By itself AdamW makes the state of a parameter at its first gradient. Parameters of a term that starts
    later would then be missing in a checkpoint that is saved before, and PyTorch's functions for checkpoints
    would fill the gap by an optimizer step.
    """
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], **options, fused=True)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def adamw(options: OptimizerConfig, groups: Groups, matrices: set[int]) -> list[torch.optim.Optimizer]:
    """AdamW for everything."""
    return [_fused_adamw(groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)]


def muon_and_adamw(
    options: OptimizerConfig, groups: Groups, matrices: set[int]
) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for the rest.

    A step of Muon is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's
    (arXiv 2502.16982).
    """
    chosen = [p for group in groups for p in group["params"] if id(p) in matrices]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
    muon = torch.optim.Muon(
        chosen, lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for parameter in chosen:
        muon.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return [muon, *adamw(options, rest, matrices)]


# optimizer.name -> (options, groups, ids of the matrices of the blocks) -> the optimizers of all groups
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Groups, set[int]], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon_and_adamw,
}


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step ``step``, from 0: linear warm-up, then constant, or cosine down to zero.

    From the first of ``optimizer.lr_changes`` on, the rate of the last change.
    """
    optimizer = config.optimizer
    changed = [rate for first, rate in optimizer.lr_changes if first <= step]
    if changed:
        return changed[-1]
    warm = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    if optimizer.schedule == "cosine":
        remaining = max(1, config.train.max_steps - optimizer.warmup_steps)
        progress = min(1.0, max(0, step - optimizer.warmup_steps) / remaining)
        return optimizer.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * warm


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales gradients down to a norm, if given; returns the norm over all shards before. No host sync."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds: dict[type, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault(type(grad), []).append(grad)
    norms = [whole(nn.utils.get_total_norm(same, foreach=True)) for same in kinds.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        torch._foreach_mul_([local(grad) for grad in grads], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Optimizers:
    """The optimizers of a run, made once the weights are sharded: ``main`` for the denoiser, what is trained
    with it and the gate; in ``alone`` one for each network of a loss term that is trained alone.
    """

    def __init__(self, config: TrainConfig, model: Denoiser, objective: Objective, world: World) -> None:
        self._config, self._world = config, world
        together = objective.trained_with_the_denoiser()
        # What main moves, by the names in checkpoints.
        self.trained = nn.ModuleDict({"model": model, **together, "gate": objective.gate})
        # Too small to be sharded: their gradients are summed one by one.
        self._gate_parameters = list(objective.gate.parameters())
        gate_ids = {id(p) for p in self._gate_parameters}
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        groups: Groups = [
            {"params": [p for p in self.parameters if id(p) not in gate_ids]},
            # Decay would pull the gate's learned weights to 1.
            {"params": self._gate_parameters, "weight_decay": 0.0},
        ]
        block_parameters = [p for block in model.fsdp_units() for p in block.parameters()]
        matrices = {id(p) for p in block_parameters if p.ndim == 2}
        self.main = OPTIMIZERS[config.optimizer.name](config.optimizer, groups, matrices)
        self._terms = objective.trained_alone()
        self._networks = {name: objective.get_submodule(name) for name in self._terms}
        self.alone: dict[str, torch.optim.Optimizer] = {}
        for name, term in self._terms.items():
            parameters = list(self._networks[name].parameters())
            self.alone[name] = _fused_adamw(
                [{"params": parameters}], **term.own_optimizer(), weight_decay=0.0
            )
        # Steps left out because of a gradient above optimizer.skip_grad_norm.
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for optimizer in (*self.main, *self.alone.values()):
            optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, computed: Container[str]) -> dict[str, Tensor]:
        """Sums what is not sharded over the processes, clips and moves all parameters. No host sync.

        Networks that are trained alone step only where their loss is among the ``computed`` ones, which are
        the same in all processes. Returns ``grad_norm`` and the norms of these networks.
        """
        options = self._config.optimizer
        self._world.sum_gradients(self._gate_parameters)
        norm = clip_gradients(self.parameters, options.max_grad_norm)
        figures = {"grad_norm": norm}
        lr = learning_rate(self._config, step)
        for group in (group for optimizer in self.main for group in optimizer.param_groups):
            group["lr"] = lr
        if options.skip_grad_norm is not None:
            is_spike = norm > options.skip_grad_norm
            self.skipped += is_spike
            for optimizer in self.main:
                # What a gradient scaler sets: the fused step reads it on the device and then changes nothing.
                optimizer.found_inf = is_spike.float()  # type: ignore[attr-defined]
        with implicit_replication():
            for optimizer in self.main:
                optimizer.step()
        for name, optimizer in self.alone.items():
            own = self._terms[name].own_loss_name
            if own in computed:
                parameters = list(self._networks[name].parameters())
                self._world.sum_gradients(parameters)
                figures[f"{own}_grad_norm"] = clip_gradients(parameters, options.max_grad_norm)
                optimizer.step()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The state of all optimizers, this process's shards of it, and the number of skipped steps."""
        state = {"optimizer": get_optimizer_state_dict(self.trained, self.main), "skipped": self.skipped}
        for name, optimizer in self.alone.items():
            state[f"{name}_optimizer"] = get_optimizer_state_dict(self._networks[name], optimizer)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave; the options stay those of this run's configuration."""
        _load(self.trained, self.main, state["optimizer"])
        for name, optimizer in self.alone.items():
            _load(self._networks[name], [optimizer], state[f"{name}_optimizer"])
        self.skipped.copy_(state["skipped"])


def _load(module: nn.Module, optimizers: list[torch.optim.Optimizer], state: Any) -> None:
    """Restores the state of optimizers, but not their options."""
    before = [dict(group) for optimizer in optimizers for group in optimizer.param_groups]
    set_optimizer_state_dict(module, optimizers, state)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, options in zip(groups, before, strict=True):
        group.update(options)
