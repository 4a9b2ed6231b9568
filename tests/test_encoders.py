"""Frozen feature networks: values against their definitions, embedded features."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pixelgen.encoders.base import StageEncoder, TokenEncoder, as_rgb
from pixelgen.encoders.build import build_stage_encoder, build_token_encoder
from pixelgen.encoders.dinov2 import DINOv2, interpolate_position_table
from pixelgen.encoders.embedded import (
    FILE_NAME,
    EmbeddedConfig,
    EmbeddedFeatures,
    EmbeddedStages,
    EmbeddedTokens,
    embedded_features,
    load_embedded,
    train_embedded,
)
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.errors import UserError
from pixelgen.losses.lpips import LPIPS

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")


@pytest.fixture(scope="module")
def vgg() -> VGG16:
    return VGG16("random", seed=3)


@pytest.fixture(scope="module")
def dino() -> DINOv2:
    return DINOv2("dinov2_vits14", "random", layer=2, seed=3)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images / 16 * 255).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target).long()


CONFIG = EmbeddedConfig(channels=1, patch_size=2, num_classes=10, seed=5)


@pytest.fixture(scope="module")
def embedded(digits: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> EmbeddedFeatures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 300 * 8192)  # 600 steps in a real run
        return embedded_features(tmp_path_factory.mktemp("run"), CONFIG, lambda: digits)


def to_images(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# --- what all of them promise ---


@pytest.mark.parametrize("name", ["vgg", "dino", "stages", "tokens"])
def test_is_frozen_and_lets_gradients_through_to_the_image(
    name: str, vgg: VGG16, dino: DINOv2, embedded: EmbeddedFeatures
) -> None:
    encoder = {
        "vgg": vgg,
        "dino": dino,
        "stages": EmbeddedStages(embedded),
        "tokens": EmbeddedTokens(embedded),
    }[name]
    assert isinstance(encoder, StageEncoder | TokenEncoder)
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    features = encoder(x)
    total = sum(m.square().sum() for m in features) if isinstance(features, list) else features.square().sum()
    total.backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_as_rgb_repeats_grey_and_refuses_other_channels() -> None:
    grey = torch.randn(2, 1, 4, 4)
    assert torch.equal(as_rgb(grey, "f"), grey.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"f: x must have shape \(B, 1 or 3, H, W\), got \(2, 2, 4, 4\)"):
        as_rgb(torch.zeros(2, 2, 4, 4), "f")


# --- VGG16 and LPIPS ---


def test_lpips_equals_the_lpips_package(vgg: VGG16) -> None:
    import lpips
    from pixelgen_kernels import select

    package = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    slices = [layer for i in range(5) for layer in getattr(package.net, f"slice{i + 1}")]
    for ours, theirs in zip(vgg.features, slices, strict=True):
        theirs.load_state_dict(ours.state_dict())
    x, x_pred = torch.rand(2, 2, 3, 36, 52) * 2.4 - 1.2  # beyond [-1, 1], which must not be clamped
    x_pred.requires_grad_()
    expected = package(x_pred, x).flatten()
    (expected_grad,) = torch.autograd.grad(expected.sum(), x_pred)
    actual = LPIPS(vgg, ops=select("auto"))(x_pred, x)
    (grad,) = torch.autograd.grad(actual.sum(), x_pred)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4 * float(expected_grad.abs().max()))


def test_vgg_taps_have_the_widths_and_strides_of_lpips(vgg: VGG16) -> None:
    stages = vgg(torch.zeros(1, 3, 32, 48))
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (64, 32, 48),
        (128, 16, 24),
        (256, 8, 12),
        (512, 4, 6),
        (512, 2, 3),
    ]
    assert [len(weight) for weight in vgg.layer_weights] == [64, 128, 256, 512, 512]
    assert all((weight >= 0).all() and weight.sum() > 0 for weight in vgg.layer_weights)


def test_vgg_refuses_images_below_16_pixels(vgg: VGG16) -> None:
    vgg(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"sides must be at least 16, got \(8, 32\).*loss.stages=embedded"):
        vgg(torch.zeros(1, 3, 8, 32))


def test_vgg_random_weights_are_seeded_and_warned_about(vgg: VGG16) -> None:
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"loss.stages_weights: VGG16 has random weights"):
        again = VGG16("random", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vgg.parameters(), strict=True))
    assert not torch.equal(VGG16("random", seed=4).features[0].weight, vgg.features[0].weight)


# --- DINOv2 ---


def test_dino_is_the_definition_written_out(dino: DINOv2) -> None:
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (((x + 1) / 2).movedim(1, -1) - mean) / std
    resized = F.interpolate(normalised.movedim(-1, 1), size=(28, 42), mode="bicubic")  # 14/16 of each side
    vit = dino.vit
    tokens = vit.patch_embed(resized).flatten(1, 2)
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], 1)
    tokens = vit.norm(vit.blocks(tokens + interpolate_position_table(vit.pos_embed, (2, 3))))
    actual = dino(x)
    assert actual.shape == (2, 6, dino.width) and dino.width == 384
    torch.testing.assert_close(actual, tokens[:, 1:])


def test_dino_equals_timm_where_nothing_is_interpolated() -> None:
    """On 37x37 patches the position table is used as it is, so timm's own forward is an oracle."""
    dino = DINOv2("dinov2_vits14", "random", patch_size=1, layer=1)
    x = torch.rand(1, 3, 37, 37) * 2 - 1
    pixels = F.interpolate(((x + 1) / 2 - dino.mean) / dino.std, size=(518, 518), mode="bicubic")
    expected = dino.vit.forward_features(pixels)[:, dino.vit.num_prefix_tokens :]
    torch.testing.assert_close(dino(x), expected)


def test_position_table_is_sampled_as_the_hub_does() -> None:
    """Bicubic (a = -0.75) at (i + 0.5) / scale - 0.5 with scale = (side + 0.1) / old side, edges repeated."""
    old, new = 5, (3, 4)
    table = torch.randn(1, 1 + old * old, 2)

    def weights(size: int) -> Tensor:
        matrix = torch.zeros(size, old, dtype=torch.float64)
        for i in range(size):
            centre = (i + 0.5) / ((size + 0.1) / old) - 0.5
            for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
                d, a = abs(centre - tap), -0.75
                near = (a + 2) * d**3 - (a + 3) * d**2 + 1
                far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                matrix[i, min(max(tap, 0), old - 1)] += near if d <= 1 else far
        return matrix

    grid = table[0, 1:].double().view(old, old, 2)
    expected = torch.einsum("ia,jb,abc->ijc", weights(new[0]), weights(new[1]), grid).reshape(-1, 2)
    actual = interpolate_position_table(table, new)
    assert torch.equal(actual[:, 0], table[:, 0])
    torch.testing.assert_close(actual[0, 1:].double(), expected, rtol=1e-5, atol=1e-5)
    assert interpolate_position_table(table, (5, 5)) is table


def test_dino_refuses_bad_arguments(dino: DINOv2) -> None:
    with pytest.raises(ValueError, match=r"multiples of patch_size 16, got \(40, 32\)"):
        dino(torch.zeros(1, 3, 40, 32))
    with pytest.raises(UserError, match=r"name must be one of dinov2_vits14, .*got 'dino'"):
        DINOv2("dino", "random")
    with pytest.raises(UserError, match=r"layer must lie in \[1, 12\] for dinov2_vits14, got 13"):
        DINOv2("dinov2_vits14", "random", layer=13)


# --- embedded ---


def test_embedded_is_small_and_shaped_for_the_denoiser(embedded: EmbeddedFeatures) -> None:
    x = torch.randn(3, 1, 8, 8)
    stages, tokens = EmbeddedStages(embedded), EmbeddedTokens(embedded)
    assert [tuple(stage.shape) for stage in stages(x)] == [(3, 16, 8, 8), (3, 32, 4, 4), (3, 48, 4, 4)]
    assert tokens(x).shape == (3, 16, tokens.width)
    assert torch.equal(tokens.from_stages(stages(x)), tokens(x))
    assert sum(parameter.numel() for parameter in embedded.parameters()) < 60_000


def test_embedded_separates_classes_and_keeps_variety_within_them(
    embedded: EmbeddedFeatures, digits: tuple[Tensor, Tensor]
) -> None:
    from sklearn.linear_model import LogisticRegression

    x, labels = to_images(digits[0]), digits[1]
    tokens = EmbeddedTokens(embedded)(x)
    pooled = tokens.mean(1).numpy()
    probe = LogisticRegression(max_iter=500).fit(pooled[:900], labels[:900])
    assert probe.score(pooled[900:], labels[900:]) > 0.93
    # Pixels can still be read from the tokens, and two images of one class stay apart.
    flat, target = tokens.flatten(0, 1), F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).flatten(0, 1)
    flat = torch.cat([flat, torch.ones(len(flat), 1)], 1)
    residual = target - flat @ torch.linalg.lstsq(flat, target).solution
    assert residual.var() < 0.1 * target.var()

    def distance(a: Tensor, b: Tensor) -> float:
        return float((1 - F.cosine_similarity(a, b, dim=-1)).mean())

    unrelated = distance(tokens, tokens.roll(1, 0))
    same = sum(distance(tokens[labels == k], tokens[labels == k].roll(1, 0)) for k in range(10)) / 10
    assert 0.1 < same < 0.6 * unrelated


def test_embedded_lpips_puts_unrelated_images_at_the_distance_of_vgg(
    embedded: EmbeddedFeatures, digits: tuple[Tensor, Tensor]
) -> None:
    from pixelgen_kernels import select

    x = to_images(digits[0][:300])
    distance = LPIPS(EmbeddedStages(embedded), ops=select("auto"))
    assert 0.6 < float(distance(x, x.roll(1, 0)).mean()) < 0.8
    assert float(distance(x, x).abs().max()) < 1e-6


def test_embedded_is_deterministic_and_leaves_the_global_generator_alone(
    embedded: EmbeddedFeatures, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 20 * 8192)
    before = torch.get_rng_state()
    first = train_embedded(CONFIG, *digits).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = train_embedded(CONFIG, *digits).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = train_embedded(EmbeddedConfig(channels=1, patch_size=2, num_classes=10, seed=6), *digits)
    assert not torch.equal(other.state_dict()["head.weight"], first["head.weight"])


def test_embedded_is_kept_in_the_run_folder(
    tmp_path: Path, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 5 * 8192)
    trained = embedded_features(tmp_path / "run", CONFIG, lambda: digits)

    def never() -> tuple[Tensor, Tensor]:
        raise AssertionError("the kept features must be read, not trained again")

    start = time.perf_counter()
    read = embedded_features(tmp_path / "run", CONFIG, never)
    assert time.perf_counter() - start < 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(EmbeddedTokens(read)(x), EmbeddedTokens(trained)(x))
    weights = zip(EmbeddedStages(read).layer_weights, EmbeddedStages(trained).layer_weights, strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert not any(parameter.requires_grad for parameter in read.parameters())

    with pytest.raises(
        UserError, match=r'was trained for .*"patch_size": 2.* this run needs .*"patch_size": 4'
    ):
        load_embedded(
            tmp_path / "run" / FILE_NAME, EmbeddedConfig(channels=1, patch_size=4, num_classes=10, seed=5)
        )
    file = tmp_path / "run" / FILE_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is it truncated"):
        embedded_features(tmp_path / "run", CONFIG, never)


@pytest.mark.parametrize(
    ("channels", "size", "patch_size"),
    [(3, 32, 4), (3, 64, 16), (3, 64, 32), (1, 6, 1), (3, 15, 5), (1, 28, 14)],
)
def test_embedded_fits_other_images_and_patches(
    channels: int, size: int, patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 1)
    images = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
    config = EmbeddedConfig(channels=channels, patch_size=patch_size)
    features = train_embedded(config, images, torch.zeros(8, dtype=torch.int64))
    tokens = EmbeddedTokens(features)(to_images(images))
    assert tokens.shape == (8, (size // patch_size) ** 2, 64) and tokens.isfinite().all()
    assert all(stage.isfinite().all() for stage in EmbeddedStages(features)(to_images(images)))


def test_embedded_refuses_what_does_not_fit(embedded: EmbeddedFeatures) -> None:
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4)
    with pytest.raises(UserError, match=r"images must be uint8 \(N, 1, H, W\) with N > 0, got torch.float32"):
        train_embedded(CONFIG, images.float(), labels)
    with pytest.raises(UserError, match="with N > 0"):
        train_embedded(CONFIG, images[:0], labels[:0])
    with pytest.raises(UserError, match=r"multiples of patch_size 2, got \(7, 8\)"):
        train_embedded(CONFIG, images[:, :, 1:], labels)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 10\), got 7 to 10"):
        train_embedded(CONFIG, images, labels + 7)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, H, W\), got \(2, 3, 8, 8\)"):
        EmbeddedTokens(embedded)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"multiples of patch_size 2, got \(7, 8\)"):
        EmbeddedStages(embedded)(torch.zeros(2, 1, 7, 8))


# --- names ---


def test_build_by_name(embedded: EmbeddedFeatures) -> None:
    assert isinstance(build_stage_encoder("vgg16", weights="random"), VGG16)
    assert isinstance(build_stage_encoder("embedded", embedded=embedded), EmbeddedStages)
    assert isinstance(build_token_encoder("embedded", patch_size=2, embedded=embedded), EmbeddedTokens)
    dino = build_token_encoder("dinov2_vits14", weights="random", patch_size=32, layer=1)
    assert dino(torch.zeros(1, 3, 64, 32)).shape == (1, 2, 384)


def test_build_refuses_unknown_names_and_missing_features(embedded: EmbeddedFeatures) -> None:
    with pytest.raises(UserError, match=r"loss.stages: must be one of vgg16, embedded, got 'alex'"):
        build_stage_encoder("alex")
    with pytest.raises(UserError, match=r"loss.tokens: must be one of dinov2_vits14.*, embedded, got 'clip'"):
        build_token_encoder("clip", patch_size=16)
    with pytest.raises(UserError, match="embedded features must be given"):
        build_stage_encoder("embedded")
    with pytest.raises(UserError, match="patch_size must be that of the embedded features, 2, got 4"):
        build_token_encoder("embedded", patch_size=4, embedded=embedded)


def test_lpips_weights_come_from_the_package_and_are_its_v0_1() -> None:
    spec = importlib.util.find_spec("lpips")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "weights/v0.1/vgg.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    weights = VGG16("random").layer_weights
    assert all(torch.equal(weights[i], state[f"lin{i}.model.1.weight"].flatten()) for i in range(5))


def test_embedded_file_holds_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 1)
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    config = EmbeddedConfig(channels=1, patch_size=2)
    features = embedded_features(tmp_path, config, lambda: (images, torch.zeros(8, dtype=torch.int64)))
    assert load_file(tmp_path / FILE_NAME).keys() == features.state_dict().keys()
