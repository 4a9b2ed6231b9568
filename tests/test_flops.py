"""FLOPs of a training step: against PyTorch's counter, and against what is published of the models."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pixelgen.config import load_config
from pixelgen.flow import logit_normal_time, shift_time
from pixelgen.losses.discriminator import Discriminator
from pixelgen.losses.gate import NoiseGate
from pixelgen.models.embeddings import TimestepEmbedder
from pixelgen.models.jit import JiT
from pixelgen.models.sizes import SIZES, ModelConfig
from pixelgen.planning.counting import denoiser_flops
from pixelgen.planning.devices import peak_flops
from pixelgen.planning.flops import expected_gate_share, train_step_flops

# with a bottleneck and in-context tokens in two of three blocks; with neither
MODELS = {
    "tiny/4": SIZES["tiny/4"],
    "plain": replace(SIZES["tiny/2"], in_context_len=0, image_size=12, width=48),
}
B = 3
# FLOPs of a pass over an image of the published recipes, 256 pixels a side, forward and back to the image.
VGG16 = 40_089_157_632
DINOV2_B, DINOV2_B_BACK = 46_322_454_528, 48_757_284_864
SCHEDULES = ("hard", "cosine", "sigmoid", "snr", "learned")


def counted(model: ModelConfig, is_trained: bool) -> int:
    """What PyTorch counts: matrix products, with attention as matrix products."""
    tokens = torch.randn(B, model.num_tokens, model.patch_dim)
    t, y = torch.rand(B), torch.zeros(B, dtype=torch.int64)
    denoiser = JiT(model, "eager")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x_pred, _ = denoiser.forward_tokens(tokens, model.grid, t, {"label": y})
        if is_trained:
            x_pred.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_forward_pass_is_what_pytorch_counts(model):
    assert B * denoiser_flops(model) == counted(model, is_trained=False)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_training_is_three_forward_passes_but_for_the_gradients_of_the_data(model):
    inner = model.bottleneck_dim or model.width
    of_the_data = 2 * (
        model.num_tokens * model.patch_dim * inner + TimestepEmbedder.num_features * model.width
    )
    assert B * (3 * denoiser_flops(model) - of_the_data) == counted(model, is_trained=True)


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


def per_image(*options):
    """StepFlops of one image in GFLOP, of a published recipe."""
    config = load_config(["--config", "pixelgen-xl-256", "--name", "test", *options])[0]
    flops = train_step_flops(config)
    scale = 1e9 * config.train.batch_size
    return flops.denoiser / scale, flops.projector / scale, flops.frozen / scale


def test_a_step_of_the_published_xl_model():
    """DESIGN: 780 GFLOP for the denoiser, three passes of about 40 and 46, 938 in all or 1,040 ungated."""
    denoiser, projector, frozen = per_image()
    assert denoiser == pytest.approx(780, rel=1e-3)
    assert projector == 3 * 2 * 256 * (1152 * 2048 + 2048**2 + 2048 * 768) / 1e9
    assert denoiser + frozen == pytest.approx(938, rel=3e-3)
    denoiser, _, frozen = per_image("--loss.gate_t", "0")
    assert denoiser + frozen == pytest.approx(1040, rel=3e-3)


def test_only_what_the_objective_runs_is_counted():
    vgg, vit, back = VGG16 / 1e9, DINOV2_B / 1e9, DINOV2_B_BACK / 1e9
    share = 0.52357
    no_lpips, no_p_dino = ("--loss.lpips_weight", "0"), ("--loss.p_dino_weight", "0")
    unaligned = ("--loss.alignment_weight", "0")
    assert per_image(*no_lpips, *no_p_dino)[2] == pytest.approx(vit, rel=1e-9)  # targets of all
    assert per_image(*no_p_dino, *unaligned)[1:] == (0, pytest.approx(3 * share * vgg, rel=1e-4))
    assert per_image(*no_lpips)[2] == pytest.approx(vit + share * (vit + back), rel=1e-4)
    assert per_image(*no_lpips, *unaligned)[2] == pytest.approx(share * (2 * vit + back), rel=1e-4)
    released = per_image(*no_lpips, *unaligned, "--loss.p_dino_gate", "released")
    assert released[2] == pytest.approx(2 * vit + back, rel=1e-9)
    assert per_image("--loss.perceptual_ratio", "0", *unaligned)[1:] == (0, 0)


def test_schedules_of_terms():
    schedule = ("--loss.alignment_schedule", "[[10, 0.1], [20, 0]]")
    game = ("--loss.adversarial_weight", "0.1", "--loss.adversarial_start_step", "5")
    config = load_config([*schedule, *game, "--name", "test"])[0]
    at = {step: train_step_flops(config, step) for step in (0, 4, 5, 10, 19, 20)}
    assert at[0] == at[4] and at[5] == at[10] == at[19]
    assert at[5].projector > at[4].projector and at[20].projector < at[19].projector
    assert at[20].frozen < at[19].frozen and at[20].denoiser == at[0].denoiser
    assert at[0].total == at[0].denoiser + at[0].projector + at[0].frozen


@pytest.mark.parametrize(
    ("option", "make", "shape"),
    [
        ("stages", lambda: torchvision.models.vgg16(weights=None).features[:30], (1, 3, 256, 256)),
        ("tokens", lambda: timm.create_model("vit_base_patch14_dinov2", img_size=224, num_classes=0), None),
    ],
)
def test_frozen_networks_are_what_pytorch_counts(option, make, shape):
    """Forward, and back to the image; of the recipes about 40 and 46 GFLOP."""
    with torch.device("meta"):
        network = make().requires_grad_(False).eval()
        x = torch.empty(shape or (1, 3, 224, 224), requires_grad=True)
    run = network if option == "stages" else network.forward_features
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = run(x)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    expected = (VGG16, VGG16) if option == "stages" else (DINOV2_B, DINOV2_B_BACK)
    assert (counter.get_total_flops(), backward.get_total_flops()) == expected


def test_an_embedded_trunk_runs_once_for_both_kinds_of_features():
    config = load_config(["--name", "test"])[0]
    share = expected_gate_share(config)
    # 3x3 convolutions of 8x8 and, with stride 2, 4x4 maps; a token for each of 4x4 patches
    trunk = 2 * 9 * (64 * 1 * 16 + 16 * 16 * 32 + 16 * 32 * 48)
    head = 2 * 16 * 48 * 64
    flops = train_step_flops(config).frozen / config.train.batch_size
    assert flops == pytest.approx((1 + 2 * share) * (trunk + head))
    alone = replace(config, loss=replace(config.loss, alignment_weight=0.0, p_dino_weight=0.0))
    assert train_step_flops(alone).frozen / config.train.batch_size == pytest.approx(3 * share * trunk)


class Products(TorchDispatchMode):
    """Counts as FlopCounterMode, whose hooks on modules do not bear a second derivative."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("r1_weight", [0.0, 1.0])
def test_the_discriminator_is_what_pytorch_counts(r1_weight):
    config = load_config(["--name", "test"])[0]
    loss = replace(
        config.loss, alignment_weight=0.0, adversarial_weight=0.1, adversarial_r1_weight=r1_weight, gate_t=0.0
    )
    config = replace(config, loss=loss)
    discriminator = Discriminator(64, r1_weight=r1_weight)
    fake = torch.randn(1, 16, 64, requires_grad=True)
    with Products() as products:
        term = discriminator.generator_term(fake).sum()
        term = term + discriminator.discriminator_term(torch.randn(1, 16, 64), fake).sum()
        term.backward()
    flops = train_step_flops(config).projector / config.train.batch_size
    assert flops == pytest.approx(products.flops, rel=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timeshift", ["0.5", "1", "3"])
@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
def test_the_share_above_the_gate_is_that_of_drawn_times(schedule, distribution, timeshift):
    time = ("--time.distribution", distribution, "--time.timeshift", timeshift)
    config = load_config(["--loss.gate", schedule, *time, "--name", "test"])[0]
    if distribution == "uniform":
        drawn = torch.rand(400_000)
    else:
        drawn = logit_normal_time(torch.randn(400_000), -0.8, 0.8)
    gate = NoiseGate(schedule, config.loss.gate_t, config.loss.gate_width)
    share = gate.passes(shift_time(drawn, config.time.timeshift)).double().mean().item()
    assert expected_gate_share(config) == pytest.approx(share, abs=0.003)  # four deviations


def test_the_share_of_the_published_gate():
    config = load_config(["--name", "test"])[0]
    assert expected_gate_share(config) == pytest.approx(0.524, abs=5e-4)
    always, never = (load_config(["--loss.gate_t", t, "--name", "test"])[0] for t in ("0", "1"))
    assert (expected_gate_share(always), expected_gate_share(never)) == (1, 0)


def test_peaks_of_known_devices():
    expected = {
        "NVIDIA H200": 989.5,
        "NVIDIA H100 80GB HBM3": 989.5,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H800": 989.5,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA B200": 2250,
        "NVIDIA B300 SXM6 AC": 2250,
        "NVIDIA GB200": 2500,
        "NVIDIA GB300": 2500,
        "NVIDIA RTX 6000 Ada Generation": 364.2,
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
        "NVIDIA L40S": 362,
        "NVIDIA L4": 121,
        "NVIDIA GeForce RTX 4090": 165.2,
    }
    for name, tflops in expected.items():
        assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == tflops * 1e12, name
        assert peak_flops(name, "fp32") == pytest.approx(tflops * 1e12 / 2, rel=0.02), name  # TF32
    for name in ("AMD EPYC", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000"):
        assert peak_flops(name, "bf16") is None
    assert peak_flops("NVIDIA GeForce RTX 4090 D", "bf16") is None
