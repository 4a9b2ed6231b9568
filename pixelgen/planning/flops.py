"""What MFU is made of: the arithmetic of a training step, and what a device could do.

Counted is what the algorithm needs: matrix products, convolutions and attention, two FLOPs for a
multiply-add. The backward pass of a trained layer is twice its forward, that of a frozen one the gradient of
its input alone. Not counted: norms, activations, the optimizer, padding of selected samples, the balance's
two extra backward passes every `loss.balance_every` steps, and what is computed again to save memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from pixelgen.config.train_config import TrainConfig
from pixelgen.losses.options import LossConfig
from pixelgen.models.families import Architecture, build_denoiser

__all__ = [
    "StepFlops",
    "denoiser_flops",
    "expected_gate_share",
    "peak_flops",
    "projector_flops",
    "train_step_flops",
]

# Channels in and out of VGG16's 3x3 convolutions up to relu5_3; a 2x2 pooling stands between two stages.
VGG16_STAGES = (
    ((3, 64), (64, 64)),
    ((64, 128), (128, 128)),
    ((128, 256), (256, 256), (256, 256)),
    ((256, 512), (512, 512), (512, 512)),
    ((512, 512), (512, 512), (512, 512)),
)
# The embedded network: widths of its trunk and of its tokens.
EMBEDDED_STAGES, EMBEDDED_TOKENS = (16, 32, 48), 64
DISCRIMINATOR_WIDTH = 256


@dataclass(frozen=True)
class ViT:
    """A DINOv2. The MLP has 8 width^2 weights, the giant's SwiGLU of inner width 4096 = 8/3 width too."""

    width: int
    depth: int

    def flops(self, num_patches: int, layer: int | None = None, *, is_backward: bool = False) -> int:
        """FLOPs of one pass for one image: forward, or backward to the image with frozen weights.

        Attention multiplies two things that both depend on the image, so its backward is twice its forward.
        """
        C, T = self.width, num_patches + 1  # with the class token
        linear = T * 12 * C * C
        attention = 2 * T * T * C * (2 if is_backward else 1)
        blocks = (layer or self.depth) * (linear + attention)
        return 2 * (num_patches * 3 * 14**2 * C + blocks)


DINOV2 = {
    "dinov2_vits14": ViT(384, 12),
    "dinov2_vitb14": ViT(768, 12),
    "dinov2_vitl14": ViT(1024, 24),
    "dinov2_vitg14": ViT(1536, 40),
}
# Below its centre the sigmoid gate is cut off at this many widths, as in `losses.gate`.
_SIGMOID_REACH = 0.75

# TFLOP/s of dense matrix products, from the vendor's data sheets: bf16 and fp16 with fp32 accumulation, then
# fp32 through TF32. The first name that matches counts. Sparsity is left out: it doubles what is advertised.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    (r"GB[23]00", 2500, 1250),
    (r"B[23]00", 2250, 1125),
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
    (r"RTX 6000 Ada Generation", 364.2, 182.1),
    (r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 251.9),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71, 35.6),
)
# Parts of a name that make it another, slower device: a slice, a notebook's chip, a cut-down variant.
_OTHER_DEVICE = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti|SUPER)\b")


@lru_cache(maxsize=16)
def denoiser_flops(model: Architecture) -> int:
    """FLOPs of one forward pass of the denoiser for one image, as PyTorch counts them.

    Those of matrix products, with attention as the two products that it is.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        denoiser = build_denoiser(model, "eager").to("meta")  # tables too, wherever they were computed
        tokens, t = torch.empty(1, model.num_tokens, model.patch_dim), torch.empty(1)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            denoiser.forward_tokens(tokens, model.grid, t, denoiser.example_condition(1))
    return counter.get_total_flops()


def projector_flops(model: Architecture, hidden_width: int, encoder_width: int) -> int:
    """FLOPs of one forward pass of the alignment's projector for one image."""
    widths = model.width * hidden_width + hidden_width**2 + hidden_width * encoder_width
    return 2 * model.num_tokens * widths


def vgg16_flops(height: int, width: int) -> int:
    """FLOPs of one pass of VGG16 up to relu5_3 for one image; forward, or backward to the image."""
    total = 0
    for stage in VGG16_STAGES:
        total += height * width * sum(9 * before * after for before, after in stage)
        height, width = height // 2, width // 2
    return 2 * total


def embedded_flops(model: Architecture) -> tuple[int, int]:
    """FLOPs of one pass of the embedded network for one image: its trunk, and the head that makes tokens."""
    height, width = model.image_height_width
    total, before = 0, model.channels
    for after, divisor in zip(EMBEDDED_STAGES, (1, 2, 4), strict=True):
        stride = 2 if divisor > 1 and model.patch_size % divisor == 0 else 1
        height, width = height // stride, width // stride
        total += height * width * 9 * before * after
        before = after
    return 2 * total, 2 * height * width * before * EMBEDDED_TOKENS


def token_width(loss: LossConfig) -> int:
    """Width of the frozen tokens that `loss.tokens` names, which the projector ends in."""
    return EMBEDDED_TOKENS if loss.tokens == "embedded" else DINOV2[loss.tokens].width


@dataclass(frozen=True)
class StepFlops:
    """Useful FLOPs of one optimizer step, for the whole global batch.

    Attributes:
        denoiser: forward and backward.
        projector: the alignment's projector and, if there is one, the discriminator.
        frozen: the stage and token networks: targets, predictions, and from these back to the image.
    """

    denoiser: float
    projector: float
    frozen: float

    @property
    def total(self) -> float:
        """The sum: what MFU divides by the time and the peak."""
        return self.denoiser + self.projector + self.frozen


@dataclass(frozen=True)
class FrozenShares:
    """Shares of a batch that go through a frozen network in one step."""

    maps: float  # targets and predictions through the stage network
    target_tokens: float
    predicted_tokens: float


def frozen_shares(config: TrainConfig, step: int = 0) -> FrozenShares:
    """Expected shares at a step, as `losses.objective` chooses the samples of each network."""
    loss = config.loss
    passing = expected_gate_share(config)
    is_adversarial = loss.adversarial_weight > 0 and step >= loss.adversarial_start_step
    tokens = passing if is_adversarial else 0.0
    if loss.p_dino_weight * loss.perceptual_ratio > 0:
        # the released gate opens for a whole batch as soon as one of its samples passes
        tokens = 1.0 if loss.p_dino_gate == "released" and passing else passing
    maps = passing if loss.lpips_weight * loss.perceptual_ratio > 0 else 0.0
    return FrozenShares(maps, 1.0 if alignment_weight(loss, step) > 0 else tokens, tokens)


def alignment_weight(loss: LossConfig, step: int) -> float:
    """Weight of the alignment at a step."""
    steps = ((-1, loss.alignment_weight), *loss.alignment_schedule)
    return [weight for first, weight in steps if first <= step][-1]


def train_step_flops(config: TrainConfig, step: int = 0) -> StepFlops:
    """Useful FLOPs of one optimizer step of a run.

    Exact but for the denoiser's two layers that read data, patches and time features: their inputs need no
    gradient, less than 0.1 % at the published sizes.

    Args:
        config: of the run; its batch is the step's.
        step: matters where alignment or the adversarial term have a schedule.
    """
    model, loss, batch = config.model_config(), config.loss, config.train.batch_size
    projector = 0.0
    if alignment_weight(loss, step) > 0:
        projector = 3 * projector_flops(model, loss.projector_width, token_width(loss))
    if loss.adversarial_weight > 0 and step >= loss.adversarial_start_step:
        projector += expected_gate_share(config) * _discriminator_flops(model, loss)
    frozen = _frozen_flops(model, loss, frozen_shares(config, step))
    return StepFlops(batch * 3.0 * denoiser_flops(model), batch * projector, batch * frozen)


def _discriminator_flops(model: Architecture, loss: LossConfig) -> int:
    """FLOPs of the adversarial game for one image that passes the gate: both players, and R1."""
    first = 2 * model.num_tokens * token_width(loss) * DISCRIMINATOR_WIDTH
    head = first + 2 * model.num_tokens * DISCRIMINATOR_WIDTH * (DISCRIMINATOR_WIDTH + 1)
    of_generator = 2 * head  # forward, and back to the tokens
    of_discriminator = 2 * (3 * head - first)  # real and fake; their tokens need no gradient
    # the gradient of D by the real tokens, and its own backward pass through the same products
    of_r1 = 3 * head if loss.adversarial_r1_weight > 0 else 0
    return of_generator + of_discriminator + of_r1


def _frozen_flops(model: Architecture, loss: LossConfig, share: FrozenShares) -> float:
    """FLOPs of the frozen networks for one image, on average."""
    total = 0.0
    trunk, head = embedded_flops(model)
    of_targets, of_predictions = share.target_tokens, share.predicted_tokens
    if loss.stages == "vgg16":
        # patches are resized to 16 pixels
        height, width = ((side * 16) // model.patch_size for side in model.image_height_width)
        total += 3 * share.maps * vgg16_flops(height, width)
    elif loss.tokens != "embedded":
        total += 3 * share.maps * trunk
    if loss.tokens == "embedded":
        total += (of_targets + 2 * of_predictions) * head
        if loss.stages == "embedded":  # one trunk for both
            of_targets, of_predictions = max(of_targets, share.maps), max(of_predictions, share.maps)
        return total + (of_targets + 2 * of_predictions) * trunk
    vit, layer = DINOV2[loss.tokens], loss.p_dino_layer
    forward = vit.flops(model.num_tokens, layer)
    backward = vit.flops(model.num_tokens, layer, is_backward=True)
    return total + (of_targets + of_predictions) * forward + of_predictions * backward


def expected_gate_share(config: TrainConfig) -> float:
    """Share of the samples that the noise gate lets pass: P(t >= first_t) under the distribution of t."""
    loss, time = config.loss, config.time
    first_t = loss.gate_t - (_SIGMOID_REACH * loss.gate_width if loss.gate == "sigmoid" else 0.0)
    if not 0 < first_t < 1:
        return 1.0 if first_t <= 0 else 0.0
    # t = s / (s + (1 - s) timeshift) rises with s, the time before the shift
    first_s = first_t * time.timeshift / (1 - first_t + first_t * time.timeshift)
    if time.distribution == "uniform":
        return 1 - first_s
    return 1 - NormalDist(time.mean, time.std).cdf(math.log(first_s / (1 - first_s)))


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
