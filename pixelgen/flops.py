"""What MFU is made of: the arithmetic of a training step, and what a device could do. Imports no torch.

Counted is what the algorithm needs: matrix products and attention, two FLOPs for a multiply-add, forward and
backward, each layer's backward twice its forward. Not counted: norms, activations, the optimizer, frozen
encoders, and anything computed a second time to save memory.
"""

from __future__ import annotations

import re

from pixelgen.config import TrainConfig
from pixelgen.models.sizes import ModelConfig

__all__ = ["denoiser_flops", "peak_flops", "projector_flops", "train_step_flops"]

TIME_FEATURES = 256  # of the timestep embedder

# TFLOP/s of dense matrix products, from the vendor's data sheets: bf16 and fp16 with fp32 accumulation, then
# fp32 through TF32. The first name that matches counts. Sparsity is left out: it doubles what is advertised.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250, 1125),
    (r"H200 NVL", 835.5, 417.5),
    (r"H200|GH200", 989.5, 494.5),
    (r"H[18]00 PCIe", 756, 378),
    (r"H100 NVL", 835.5, 417.5),
    (r"H[18]00", 989.5, 494.5),
    (r"H20", 148, 74),
    (r"A[18]00", 312, 156),
    (r"A40", 149.7, 74.8),
    (r"A30", 165, 82),
    (r"A10", 125, 62.5),
    (r"L40S", 362, 183),
    (r"L40", 181, 90.5),
    (r"L4", 121, 60),
    (r"RTX A6000", 154.8, 77.4),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71, 35.6),
)
# Parts of a name that make it another, slower device: a slice, a notebook's chip, a cut-down variant.
_OTHER_DEVICE = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti|SUPER)\b")


def denoiser_flops(model: ModelConfig) -> int:
    """FLOPs of one forward pass of the denoiser for one image.

    In-context tokens count in the blocks that see them; the AdaLN projections and the timestep embedder work
    on one vector per image.
    """
    C, T = model.width, model.num_tokens
    inner = model.bottleneck_dim
    embed = T * (model.patch_dim * inner + inner * C if inner else model.patch_dim * C)
    embed += TIME_FEATURES * C + C * C
    blocks = 0
    for index in range(model.depth):
        tokens = T + (model.in_context_len if index >= model.in_context_start else 0)
        linear = 4 * C * C + 3 * C * model.mlp_width  # qkv and proj; w12 and w3
        attention = 2 * tokens * C  # q k^T and the weighted sum of v, per token
        blocks += tokens * (linear + attention) + 6 * C * C
    final = T * C * model.patch_dim + 2 * C * C
    return 2 * (embed + blocks + final)


def projector_flops(model: ModelConfig, hidden_width: int, encoder_width: int) -> int:
    """FLOPs of one forward pass of the alignment's projector for one image."""
    widths = model.width * hidden_width + hidden_width**2 + hidden_width * encoder_width
    return 2 * model.num_tokens * widths


def train_step_flops(config: TrainConfig, encoder_width: int | None = None) -> int:
    """FLOPs of one training step of the denoiser and the projector: three times their forward passes.

    That is exact but for the two layers that read data, patches and time features: their inputs need no
    gradient, less than 0.1 % at the published sizes.

    Args:
        config: of the run; its batch is the step's.
        encoder_width: width of the frozen encoder's tokens, which the projector ends in; needed where
            `loss.alignment_weight` is not 0.

    Raises:
        ValueError: encoder_width is needed and missing.
    """
    model = config.model_config()
    forward = denoiser_flops(model)
    if config.loss.alignment_weight:
        if encoder_width is None:
            raise ValueError(
                "train_step_flops: encoder_width must be given when loss.alignment_weight is not 0, got None"
            )
        forward += projector_flops(model, config.loss.projector_width, encoder_width)
    return 3 * forward * config.train.batch_size


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of dense matrix products that the vendor states, MFU's denominator.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: "bf16", "fp16", or "fp32" for TF32.

    Returns:
        None for a device that is not in the table, a slice of one (MIG) included.

    Raises:
        ValueError: unknown dtype.
    """
    if dtype not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"peak_flops: dtype must be bf16, fp16 or fp32, got {dtype!r}")
    if _OTHER_DEVICE.search(device_name):
        return None
    for name, half, tf32 in _PEAK_TFLOPS:
        if re.search(rf"\b(?:{name})\b", device_name):
            return (tf32 if dtype == "fp32" else half) * 1e12
    return None
