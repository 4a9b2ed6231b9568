"""Memory of a training step on one GPU, item by item, worked out from the configuration: docs/planning.md.

Parameters are counted and activations measured, of tensors without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pixelgen.config.train_config import TrainConfig
from pixelgen.losses.build import build_skeleton
from pixelgen.losses.gate import BUCKETS
from pixelgen.models.families import Architecture, build_denoiser
from pixelgen.planning.activations import Checkpointing, activation_bytes, objective_bytes
from pixelgen.planning.devices import GIB
from pixelgen.planning.flops import expected_gate_share

__all__ = ["Parameters", "count_parameters", "step_memory"]

OPTIMIZER_LABELS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
# An allowance for the CUDA context, NCCL's buffers, and the workspaces of cuBLAS and cuDNN.
WORKSPACE = 2 * GIB


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; ``block`` is one of the denoiser's, ``adaln`` the AdaLN layers of all.

    ``with_one_average``: those of which the optimizer keeps one average, of the others two.
    """

    denoiser: int
    projector: int
    block: int
    adaln: int
    stages: int
    tokens: int
    with_one_average: int = 0

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizers keep of all that they move."""
        return 8 * self.trained - 4 * self.with_one_average

    @property
    def trained(self) -> int:
        """What the optimizer moves."""
        return self.denoiser + self.projector


def count_parameters(config: TrainConfig) -> Parameters:
    """Counts all networks of a run, without memory for them."""
    loss, model = config.loss, config.model_config()

    def count(module: nn.Module | None) -> int:
        return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        denoiser = build_denoiser(model, "eager")
        objective = build_skeleton(loss, denoiser)
    adaln = [
        parameter.numel() for name, parameter in denoiser.named_parameters() if "adaLN_modulation" in name
    ]
    is_muon = config.optimizer.name == "muon"
    return Parameters(
        denoiser=count(denoiser),
        projector=sum(map(count, objective.trained_with_the_denoiser().values())),
        block=count(denoiser.fsdp_units()[0]),
        adaln=sum(adaln),
        stages=count(objective.networks.lpips),
        tokens=count(objective.networks.encoder),
        with_one_average=sum(
            parameter.numel()
            for block in denoiser.fsdp_units()
            for parameter in block.parameters()
            if is_muon and parameter.ndim == 2
        ),
    )


def recomputed_bytes(model: Architecture, size: int, checkpointing: Checkpointing) -> float:
    """Bytes of one image that come back while a block's forward pass is run again for its backward pass."""
    everything, kept = (activation_bytes(model, size, kind) for kind in ("none", checkpointing))
    return (everything - kept) / model.depth


def selected(config: TrainConfig, images: int) -> int:
    """Images of a pass that the perceptual networks see at most, but for one pass in a thousand."""
    share = expected_gate_share(config)
    count = images * share + 3 * math.sqrt(images * share * (1 - share))
    bucket = -(-images // BUCKETS)
    return min(-(-math.ceil(count) // bucket) * bucket, images)


def step_memory(
    config: TrainConfig, parameters: Parameters, *, gpus: int, shards: int, images: int
) -> dict[str, float]:
    """Bytes on one GPU at the end of a forward pass, by what they hold.

    Args:
        config: of the run.
        parameters: from ``count_parameters``.
        gpus: that work together.
        shards: parts into which the trained state is cut; 1 for all of it on every GPU.
        images: in one pass.
    """
    model, loss, parallel = config.model_config(), config.loss, config.parallel
    size = 2 if config.dtype == "bfloat16" else 4
    shard, averages = parameters.trained / shards, len(config.ema.decays) + len(config.ema.power)
    if gpus > 1:  # FSDP's: blocks come and go, the rest stays
        rest = parameters.trained - model.depth * parameters.block
        gathered = min(model.depth, 1 + parallel.prefetch) if parallel.reshard_after_forward else model.depth
        label = "gathered weights, a block's gradient"
        working = (rest + gathered * parameters.block) * size + parameters.block * (size + 4)
    elif size < 4:  # autocast's copies, which live until the backward pass
        label, working = "weights in bf16", parameters.trained * size
    else:
        label, working = "packed AdaLN weights", parameters.adaln * size
    checkpointing = config.train.activation_checkpointing
    activations: float = activation_bytes(model, size, checkpointing)
    activations += recomputed_bytes(model, size, checkpointing)
    of_any, of_passing = objective_bytes(loss, model, size)
    seen = selected(config, images)
    perceptual = seen * (of_passing - of_any)
    activations += of_any
    return {
        "weights": shard * 4,
        label: working,
        "gradients": shard * 4,
        OPTIMIZER_LABELS[config.optimizer.name]: parameters.optimizer_bytes / shards,
        f"EMA x {averages}": averages * parameters.denoiser / shards * 4,
        "frozen networks": (parameters.stages + parameters.tokens) * size,
        f"activations, {images} images": images * activations,
        f"perceptual activations, {seen} images": perceptual,
        "CUDA and workspaces (allowance)": WORKSPACE,
    }
