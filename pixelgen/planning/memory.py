"""Memory of a training step on one GPU, item by item, worked out from the configuration: docs/planning.md.

PyTorch is imported to count parameters and activations, of tensors without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pixelgen.config.train_config import TrainConfig
from pixelgen.models.families import Architecture, build_denoiser
from pixelgen.planning.flops import (
    DINOV2,
    EMBEDDED_STAGES,
    EMBEDDED_TOKENS,
    VGG16_STAGES,
    expected_gate_share,
    frozen_shares,
    token_width,
)

__all__ = ["Parameters", "count_parameters", "step_memory"]

Checkpointing = Literal["none", "selective", "full"]
GIB = 2**30
# An allowance for the CUDA context, NCCL's buffers, and the workspaces of cuBLAS and cuDNN.
WORKSPACE = 2 * GIB
BUCKETS = 8  # sizes that a selection may have, as in `losses.gate`


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
    """Counts denoiser and projector on the meta device, and the frozen networks by their tables."""
    import torch

    from pixelgen.losses.alignment import Projector

    loss, model = config.loss, config.model_config()

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        denoiser = build_denoiser(model, "eager")
        projector = 0
        if loss.uses_alignment:
            projector = count(Projector(model.width, loss.projector_width, token_width(loss)))
    adaln = [
        parameter.numel() for name, parameter in denoiser.named_parameters() if "adaLN_modulation" in name
    ]
    stages = tokens = 0
    if loss.lpips_weight * loss.perceptual_ratio > 0 and loss.stages == "vgg16":
        stages = vgg16_parameters()
    needs_tokens = loss.p_dino_weight * loss.perceptual_ratio > 0 or loss.adversarial_weight > 0
    if (needs_tokens or loss.uses_alignment) and loss.tokens != "embedded":
        tokens = dinov2_parameters(loss.tokens, loss.p_dino_layer)
    return Parameters(
        denoiser=count(denoiser),
        projector=projector,
        block=count(denoiser.fsdp_units()[0]),
        adaln=sum(adaln),
        stages=stages,
        tokens=tokens,
        with_one_average=sum(
            parameter.numel()
            for block in denoiser.fsdp_units()
            for parameter in block.parameters()
            if config.optimizer.name == "muon" and parameter.ndim == 2
        ),
    )


def vgg16_parameters() -> int:
    """Of its convolutions up to relu5_3."""
    return sum((9 * before + 1) * after for stage in VGG16_STAGES for before, after in stage)


def dinov2_parameters(name: str, layer: int | None = None) -> int:
    """Of the blocks that run, the embeddings for 37x37 patches and a class token, and the final norm."""
    C = DINOV2[name].width
    mlp = 4 * C + C if name != "dinov2_vitg14" else 2 * 4096 + C  # biases
    block = 12 * C * C + 3 * C + C + mlp + 2 * C + 4 * C  # weights; biases; layer scales; norms
    return 3 * 14**2 * C + C + (37**2 + 1) * C + C + (layer or DINOV2[name].depth) * block + 2 * C


def denoiser_activations(model: Architecture, size: int, checkpointing: Checkpointing = "none") -> int:
    """Bytes of one image that are kept between the denoiser's forward and backward pass; see ``measure``."""
    from pixelgen.planning.activations import activation_bytes

    return activation_bytes(model, size, checkpointing)


def recomputed_bytes(model: Architecture, size: int, checkpointing: Checkpointing) -> float:
    """Bytes of one image that come back while a block's forward pass is run again for its backward pass."""
    everything, kept = (denoiser_activations(model, size, kind) for kind in ("none", checkpointing))
    return (everything - kept) / model.depth


def stage_activations(config: TrainConfig, size: int) -> float:
    """Bytes kept of one image for the way back through the stage network, and the maps of its target."""
    model = config.model_config()
    if config.loss.stages == "embedded":
        return embedded_activations(model, size) * 1.5
    height, width = ((side * 16) // model.patch_size for side in model.image_height_width)
    total = 3 * height * width * 4  # the image, as the scaling gets it
    for index, stage in enumerate(VGG16_STAGES):
        pixels = height * width
        if index:
            total += pixels * stage[0][0] * (size + 8)  # pooling keeps 64-bit indices
        total += pixels * (sum(after for _, after in stage) + stage[-1][1]) * size  # and the target's map
        height, width = height // 2, width // 2
    return total


def embedded_activations(model: Architecture, size: int) -> float:
    """Bytes kept of one image for the way back through the embedded trunk: maps before and after SiLU."""
    height, width = model.image_height_width
    total = 0
    for channels, divisor in zip(EMBEDDED_STAGES, (1, 2, 4), strict=True):
        stride = 2 if divisor > 1 and model.patch_size % divisor == 0 else 1
        height, width = height // stride, width // stride
        total += 2 * height * width * channels * size
    return total


def token_activations(config: TrainConfig, size: int) -> float:
    """Bytes kept of one image for the way back through the token network.

    A DINOv2 block keeps, per token: both norms' inputs in fp32 (2 C), qkv (3 C), attention's output (C) and
    the MLP's hidden layer (4 C); the giant's SwiGLU its two halves and the SiLU of one (8 C).
    """
    model, loss = config.model_config(), config.loss
    if loss.tokens == "embedded":
        # of one trunk with the stages, which have been counted
        has_trunk = loss.stages == "embedded" and loss.lpips_weight * loss.perceptual_ratio > 0
        trunk = 0 if has_trunk else embedded_activations(model, size)
        return trunk + model.num_tokens * EMBEDDED_TOKENS * 8
    vit = DINOV2[loss.tokens]
    hidden = 8 if loss.tokens == "dinov2_vitg14" else 4
    block = vit.width * (2 * 4 + (4 + hidden) * size)
    # patches in; the last norm's input, and its output for image and target
    ends = 3 * 14**2 * size + 3 * 4 * vit.width
    return (model.num_tokens + 1) * (block * (loss.p_dino_layer or vit.depth) + ends)


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
    activations: float = denoiser_activations(model, size, checkpointing)
    activations += recomputed_bytes(model, size, checkpointing)
    if loss.uses_alignment:
        activations += model.num_tokens * (4 * loss.projector_width * size + token_width(loss) * (size + 4))
    share, seen = frozen_shares(config), selected(config, images)
    perceptual = seen * stage_activations(config, size) if share.maps else 0.0
    if share.predicted_tokens:
        rows = images if share.predicted_tokens == 1 else seen
        perceptual += rows * token_activations(config, size)
    return {
        "weights": shard * 4,
        label: working,
        "gradients": shard * 4,
        {"adamw": "AdamW", "muon": "Muon and AdamW"}[config.optimizer.name]: parameters.optimizer_bytes
        / shards,
        f"EMA x {averages}": averages * parameters.denoiser / shards * 4,
        "frozen networks": (parameters.stages + parameters.tokens) * size,
        f"activations, {images} images": images * activations,
        f"perceptual activations, {seen} images": perceptual,
        "CUDA and workspaces (allowance)": WORKSPACE,
    }
