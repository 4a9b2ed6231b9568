"""FLOPs of a training step: against PyTorch's counter, and against what is published of the models."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixelgen.config import LossConfig, TrainConfig
from pixelgen.flops import TIME_FEATURES, denoiser_flops, peak_flops, projector_flops, train_step_flops
from pixelgen.losses.alignment import Projector
from pixelgen.models.jit import JiT
from pixelgen.models.layers import TimestepEmbedder
from pixelgen.models.sizes import SIZES, ModelConfig

# with a bottleneck and in-context tokens in two of three blocks; with neither
MODELS = {
    "tiny/4": SIZES["tiny/4"],
    "plain": replace(SIZES["tiny/2"], in_context_len=0, image_size=12, width=48),
}
B = 3


def counted(model: ModelConfig, is_trained: bool) -> int:
    """What PyTorch counts: matrix products, with attention as matrix products."""
    tokens = torch.randn(B, model.num_tokens, model.patch_dim)
    t, y = torch.rand(B), torch.zeros(B, dtype=torch.int64)
    denoiser = JiT(model, "eager")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x_pred, _ = denoiser.forward_tokens(tokens, t, y)
        if is_trained:
            x_pred.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_forward_pass_is_what_pytorch_counts(model):
    assert B * denoiser_flops(model) == counted(model, is_trained=False)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_training_is_three_forward_passes_but_for_the_gradients_of_the_data(model):
    inner = model.bottleneck_dim or model.width
    of_the_data = 2 * (model.num_tokens * model.patch_dim * inner + TIME_FEATURES * model.width)
    assert B * (3 * denoiser_flops(model) - of_the_data) == counted(model, is_trained=True)


def test_the_projector_is_what_pytorch_counts():
    model = SIZES["tiny/4"]
    projector = Projector(model.width, 40, 24)
    with FlopCounterMode(display=False) as counter:
        projector(torch.randn(B, model.num_tokens, model.width))
    assert B * projector_flops(model, 40, 24) == counter.get_total_flops()


def test_the_timestep_embedder_has_the_features_that_are_counted():
    assert TimestepEmbedder.num_features == TIME_FEATURES


# PixelGen-XL: 780 GFLOP per image for forward and backward, 260 forward; JiT in billions of multiply-adds
# (arXiv 2511.13720); within one of the unit they are printed in.
@pytest.mark.parametrize(
    ("size", "gflops", "within"),
    [
        ("PixelGen-XL/16", 260, 1),
        ("JiT-B/16", 2 * 25, 2),
        ("JiT-L/16", 2 * 88, 2),
        ("JiT-H/16", 2 * 182, 2),
        ("JiT-G/16", 2 * 383, 2),
    ],
)
def test_published_sizes(size, gflops, within):
    assert abs(denoiser_flops(SIZES[size]) / 1e9 - gflops) < within


def test_a_step_of_the_published_xl_model_is_780_gflop_per_image():
    flow = LossConfig(alignment_weight=0)
    config = TrainConfig(loss=flow)
    config = replace(
        config,
        data=replace(config.data, image_size=256, channels=3, num_classes=1000),
        model=replace(config.model, size="PixelGen-XL/16"),
        train=replace(config.train, batch_size=64),
    )
    assert train_step_flops(config) / 64 == pytest.approx(780e9, rel=1e-3)
    aligned = replace(config, loss=LossConfig(alignment_weight=0.5, alignment_layer=8, projector_width=2048))
    extra = train_step_flops(aligned, encoder_width=768) - train_step_flops(config)
    assert extra == 64 * 3 * projector_flops(config.model_config(), 2048, 768)
    with pytest.raises(ValueError, match="encoder_width must be given"):
        train_step_flops(aligned)


def test_peaks_of_known_devices():
    expected = {
        "NVIDIA H200": 989.5,
        "NVIDIA H100 80GB HBM3": 989.5,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H800": 989.5,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA B200": 2250,
        "NVIDIA L40S": 362,
        "NVIDIA L4": 121,
        "NVIDIA GeForce RTX 4090": 165.2,
    }
    for name, tflops in expected.items():
        assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == tflops * 1e12, name
        assert peak_flops(name, "fp32") == pytest.approx(tflops * 1e12 / 2, rel=0.02), name  # TF32


@pytest.mark.parametrize(
    "name",
    [
        "AMD EPYC",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A1000",
    ],
)
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops(name, "bf16") is None


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be bf16, fp16 or fp32, got 'fp8'"):
        peak_flops("NVIDIA H200", "fp8")


def test_counting_needs_no_torch():
    code = "import sys, pixelgen.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
