"""Memory of a training step on one GPU, item by item, worked out from the configuration: docs/planning.md.

Parameters are counted and activations measured, of tensors without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pixelgen.config.resolve import check_batch, num_shards, resolve_mode
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.losses.build import build_skeleton
from pixelgen.losses.gate import BUCKETS
from pixelgen.models.families import build_denoiser
from pixelgen.planning.counting import activation_bytes, objective_bytes
from pixelgen.planning.devices import GIB, GPUS_PER_NODE, Machine
from pixelgen.planning.flops import expected_gate_share

OPTIMIZER_LABELS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
# An allowance for the CUDA context, NCCL's buffers, and the workspaces of cuBLAS and cuDNN.
WORKSPACE = 2 * GIB


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: ``blocks`` of the denoiser's one by one, ``adaln`` of what is packed.

    ``optimizer_bytes`` are what the optimizers keep of all that they move.
    """

    denoiser: int
    projector: int
    blocks: tuple[int, ...]
    adaln: int
    stages: int
    tokens: int
    optimizer_bytes: int

    @property
    def trained(self) -> int:
        """What the optimizer moves."""
        return self.denoiser + self.projector


def count_parameters(config: TrainConfig) -> Parameters:
    """Counts all networks of a run, without memory for them."""
    with torch.device("meta"):
        denoiser = build_denoiser(config.model_config(), "eager")
        objective = build_skeleton(config.loss, denoiser)

    def count(module: nn.Module | None) -> int:
        return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

    blocks, projector = denoiser.fsdp_units(), sum(map(count, objective.trained_with_the_denoiser().values()))
    optimizer_bytes = 8 * (count(denoiser) + projector)  # two averages
    if config.optimizer.name == "muon":  # one of the matrices of the blocks
        optimizer_bytes -= 4 * sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    return Parameters(
        denoiser=count(denoiser),
        projector=projector,
        blocks=tuple(map(count, blocks)),
        adaln=sum(map(count, denoiser.adaln_modules())),
        stages=count(objective.networks.lpips),
        tokens=count(objective.networks.encoder),
        optimizer_bytes=optimizer_bytes,
    )


@dataclass(frozen=True)
class Layout:
    """How the GPUs share a run: ``shards`` of the state, in so many copies, and images per GPU and pass."""

    mode: str
    gpus: int
    shards: int
    images: int
    images_per_pass: int

    @property
    def copies(self) -> int:
        """Copies of the state."""
        return self.gpus // self.shards


def resolve_layout(config: TrainConfig, machine: Machine, parameters: Parameters) -> Layout:
    """The layout that ``parallel`` and ``train`` lead to on a machine.

    Raises:
        UserError: the batch cannot be divided among the GPUs and micro-batches, or shards among the GPUs.
    """
    gpus, train = machine.gpus, config.train
    check_batch(config, gpus)
    on_node = min(gpus, GPUS_PER_NODE)
    mode = resolve_mode(config.parallel, size=gpus, local_size=on_node, num_parameters=parameters.denoiser)
    shards = num_shards(mode, config.parallel, size=gpus, local_size=on_node)
    if gpus % shards:
        raise UserError(f"parallel.shard_size must divide the {gpus} GPUs, got {shards}")
    images = train.batch_size // gpus
    return Layout(mode, gpus, shards, images, images // train.micro_batches)


def images_past_gate(config: TrainConfig, images: int) -> int:
    """Images of a pass that the perceptual networks see at most, but for one pass in a thousand."""
    share = expected_gate_share(config)
    count = images * share + 3 * math.sqrt(images * share * (1 - share))
    bucket = -(-images // BUCKETS)
    return min(-(-math.ceil(count) // bucket) * bucket, images)


def step_memory(config: TrainConfig, parameters: Parameters, layout: Layout) -> dict[str, float]:
    """Bytes on one GPU at the end of a forward pass, by what they hold."""
    model, parallel, images = config.model_config(), config.parallel, layout.images_per_pass
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    size = dtype.itemsize
    shard, averages = parameters.trained / layout.shards, len(config.ema.decays) + len(config.ema.power)
    if layout.gpus > 1:  # FSDP's: blocks come and go, the rest stays
        blocks = sorted(parameters.blocks, reverse=True)
        rest = parameters.trained - sum(blocks)
        gathered = sum(blocks[: 1 + parallel.prefetch] if parallel.reshard_after_forward else blocks)
        label = "gathered weights, a block's gradient"
        working = (rest + gathered) * size + blocks[0] * (size + 4)
    elif size < 4:  # autocast's copies, which live until the backward pass
        label, working = "weights in bf16", parameters.trained * size
    else:
        label, working = "packed AdaLN weights", parameters.adaln * size
    kept = activation_bytes(model, dtype, config.train.activation_checkpointing)
    # what comes back while a block's forward pass is run again for its backward pass
    recomputed = (activation_bytes(model, dtype) - kept) / len(parameters.blocks)
    objective, perceptual = objective_bytes(config.loss, model, dtype)
    seen = images_past_gate(config, images)
    return {
        "weights": shard * 4,
        label: working,
        "gradients": shard * 4,
        OPTIMIZER_LABELS[config.optimizer.name]: parameters.optimizer_bytes / layout.shards,
        f"EMA x {averages}": averages * parameters.denoiser / layout.shards * 4,
        "frozen networks": (parameters.stages + parameters.tokens) * size,
        f"activations, {images} images": images * (kept + recomputed + objective),
        f"perceptual activations, {seen} images": seen * perceptual,
        "CUDA and workspaces (allowance)": WORKSPACE,
    }
