"""Frozen feature networks: values against their definitions, what they refuse, embedded features."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from op_testing import assert_as_accurate, draw
from pixelgen_kernels import select
from safetensors.torch import load_file
from torch import Tensor

from pixelgen.data import Digits
from pixelgen.encoders.base import StageEncoder, TokenEncoder, as_rgb
from pixelgen.encoders.dinov2 import DINOv2, interpolate_position_table
from pixelgen.encoders.embedded import (
    FILE_NAME,
    EmbeddedConfig,
    EmbeddedFeatures,
    EmbeddedTokens,
    embedded_features,
    train_embedded,
)
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.errors import UserError
from pixelgen.losses.features import FeatureNetworks
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
    data = Digits()
    return data.batch(range(len(data)))


CONFIG = EmbeddedConfig(channels=1, patch_size=2, num_classes=10, seed=0)


def never() -> tuple[Tensor, Tensor]:
    raise AssertionError("the kept features must be read, not trained again")


@pytest.fixture(scope="module")
def embedded(embedded_file: Path) -> EmbeddedFeatures:
    return embedded_features(embedded_file.parent, CONFIG, never)


@pytest.fixture(params=["vgg", "dino", "stages", "tokens"])
def encoder(
    request: pytest.FixtureRequest, vgg: VGG16, dino: DINOv2, embedded: EmbeddedFeatures
) -> StageEncoder | TokenEncoder:
    own = {"stages": embedded, "tokens": EmbeddedTokens(embedded)}
    return {"vgg": vgg, "dino": dino, **own}[request.param]


def few_steps(steps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", int(steps * 8192))


def to_images(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# --- what all of them promise ---


def test_is_frozen_and_lets_gradients_through_to_the_image(encoder):
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


def test_as_rgb_repeats_grey_and_refuses_other_channels():
    grey = torch.randn(2, 1, 4, 4)
    assert torch.equal(as_rgb(grey, "f"), grey.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"f: x must have shape \(B, 1 or 3, H, W\), got \(2, 2, 4, 4\)"):
        as_rgb(torch.zeros(2, 2, 4, 4), "f")


def test_follows_the_dtype_and_refuses_images_it_cannot_take(encoder):
    x = torch.rand(1, 1, 16, 16) * 2 - 1
    expected = encoder(x)[-1]
    for dtype in (torch.uint8, torch.int64, torch.float64):
        with pytest.raises(
            TypeError, match=rf"x must be images in \[-1, 1\], of torch.float32 .*, got {dtype}"
        ):
            encoder(x.to(dtype))
    assert encoder(x.bfloat16())[-1].dtype == torch.float32  # narrower images are widened

    wide = copy.deepcopy(encoder).double()
    features = wide(x.double())[-1]
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), expected, rtol=1e-4, atol=1e-4)
    narrow = copy.deepcopy(encoder).to(torch.bfloat16)
    features = narrow(x.bfloat16())[-1]
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float().flatten(), expected.flatten(), dim=0) > 0.999
    with pytest.raises(TypeError, match=r"of torch.bfloat16 .*, got torch.float32"):
        narrow(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow(x)[-1].isfinite().all()
        with pytest.raises(TypeError, match=r"got torch.float64"):
            narrow(x.double())


def test_follows_the_device(encoder):
    encoder = copy.deepcopy(encoder).to("meta")
    features = encoder(torch.zeros(2, 1, 32, 32, device="meta"))
    assert features[-1].device.type == "meta"
    assert not [key for key, value in encoder.state_dict().items() if value.device.type != "meta"]


@pytest.mark.parametrize("name", ["vgg", "dino"])
def test_compiles_in_one_graph_forward_and_backward(name, request):
    encoder = request.getfixturevalue(name)
    # Without a code generator, which takes long.
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x = draw(1, 3, 16, 32)  # not the number of patches of the position table
    results = []
    for network in (compiled, encoder):
        leaf = x.clone().requires_grad_()
        features = network(leaf)
        maps = features if isinstance(features, list) else [features]
        total = sum((m * draw(*m.shape, seed=i)).sum() for i, m in enumerate(maps))
        results.append([*(m.detach() for m in maps), *torch.autograd.grad(total, leaf)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_half_precision_networks_are_channels_last_and_close_to_float32(vgg, dino):
    networks = FeatureNetworks(copy.deepcopy(dino), LPIPS(copy.deepcopy(vgg), ops=select("auto")))
    networks.speed_up(half=True, compiled=False)
    x, x_pred = draw(2, 2, 3, 32, 32).clamp(-1, 1)
    images = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        maps, tokens = networks.lpips.encode(images), networks.encoder(images)
        distance = networks.lpips(x_pred, x)
    for ours, exact in zip([*maps, tokens], [*vgg(x), dino(x)], strict=True):
        assert F.cosine_similarity(ours.float().flatten(), exact.flatten(), dim=0) > 0.999
    assert all(m.dtype == torch.bfloat16 for m in maps)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, LPIPS(vgg, ops=select("auto"))(x_pred, x), rtol=2e-2, atol=0)
    (sum(m.float().square().mean() for m in maps) + tokens.float()[..., 0].sum()).backward()
    assert images.grad is not None and images.grad.isfinite().all() and (images.grad != 0).any()


# --- VGG16 and LPIPS ---


@pytest.fixture(scope="module")
def package(vgg: VGG16) -> torch.nn.Module:
    """The lpips package's network with the weights of ``vgg``."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by deprecated arguments
        network = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    slices = [layer for i in range(5) for layer in getattr(network.net, f"slice{i + 1}")]
    for ours, theirs in zip(vgg.features, slices, strict=True):
        theirs.load_state_dict(ours.state_dict())
    return network


def distance_and_gradient(fn: Callable[[Tensor, Tensor], Tensor], x_pred: Tensor, x: Tensor) -> list[Tensor]:
    leaf = x_pred.clone().requires_grad_()  # clone keeps the memory layout
    distance = fn(leaf, x)
    return [distance.detach().flatten(), *torch.autograd.grad(distance.sum(), leaf)]


@pytest.mark.parametrize(
    ("batch", "height", "width", "memory_format"),
    [
        (3, 16, 16, torch.contiguous_format),
        (2, 33, 48, torch.contiguous_format),
        (2, 33, 48, torch.channels_last),
        (1, 128, 128, torch.channels_last),
    ],
)
def test_lpips_is_as_accurate_as_the_lpips_package(vgg, package, batch, height, width, memory_format):
    # Beyond [-1, 1], which must not be clamped.
    x, x_pred = (
        (torch.rand(batch, 3, height, width) * 2.4 - 1.2).to(memory_format=memory_format) for _ in range(2)
    )
    package64 = copy.deepcopy(package).double()
    oracle = distance_and_gradient(package64, x_pred.double(), x.double())
    theirs = distance_and_gradient(package, x_pred, x)
    ours = distance_and_gradient(LPIPS(vgg, ops=select("auto")), x_pred, x)
    assert ours[0].shape == (batch,) and ours[0].dtype == torch.float32
    for name, *values in zip(("distance", "gradient"), ours, theirs, oracle, strict=True):
        assert_as_accurate(*values, name=name)


def test_lpips_refuses_images_and_maps_that_do_not_fit(vgg):
    lpips = LPIPS(vgg, ops=select("auto"))
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"LPIPS: .* one shape, got \(1, 3, 16, 32\) and \(1, 3, 16, 16\)"):
        lpips(torch.zeros(1, 3, 16, 32), x)
    with pytest.raises(ValueError, match=r"LPIPS: x must be images in \[-1, 1\], got values from 0 to 255; "):
        lpips(x, torch.linspace(0, 255, x.numel()).view_as(x))
    with pytest.raises(TypeError, match=r"VGG16: x must be images .* got torch.uint8"):
        lpips(x.byte(), x.byte())
    told = r"target must have shape .* = \(1, 64, 16, 16\), got \(1, 64, 16, 32\)"
    with pytest.raises(ValueError, match=told):
        lpips.distance(lpips.encode(x), lpips.encode(torch.zeros(1, 3, 16, 32)))
    assert lpips(torch.full_like(x, math.nan), x).isnan().all()
    assert lpips(x * 0 + 300, x).isfinite().all()  # a prediction may lie anywhere


def test_vgg_refuses_images_below_16_pixels(vgg):
    vgg(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"sides must be at least 16, got \(8, 32\).*loss.stages=embedded"):
        vgg(torch.zeros(1, 3, 8, 32))
    lpips = LPIPS(vgg, ops=select("auto"), resize_from_patch=4)
    assert lpips.encode(torch.zeros(1, 3, 4, 8))[0].shape == (1, 64, 16, 32)
    with pytest.raises(ValueError, match=r"VGG16: image sides must be at least 16, got \(12, 32\)"):
        lpips.encode(torch.zeros(1, 3, 3, 8))
    lpips = LPIPS(vgg, ops=select("auto"), resize_from_patch=32)
    with pytest.raises(ValueError, match=r"LPIPS: image sides must be at least 2 to be .*, got \(1, 40\)"):
        lpips.encode(torch.zeros(1, 3, 1, 40))


def test_vgg_random_weights_are_seeded_and_warned_about(vgg):
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"loss.stages_weights: VGG16 has random weights"):
        again = VGG16("random", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vgg.parameters(), strict=True))
    assert not torch.equal(VGG16("random", seed=4).features[0].weight, vgg.features[0].weight)


# --- DINOv2 ---


def bicubic_matrix(old: int, new: int, scale: float) -> Tensor:
    """(new, old) float64: bicubic (a = -0.75) at (i + 0.5) / scale - 0.5, not antialiased, edges repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d, a = abs(centre - tap), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += near if d <= 1 else far
    return matrix


def hub_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, 1 + rows * columns, D): the hub's table, sampled at the scale (side + 0.1) / old side."""
    old = math.isqrt(table.shape[1] - 1)
    rows, columns = (bicubic_matrix(old, new, (new + 0.1) / old) for new in grid)
    patches = table[0, 1:].double().view(old, old, -1)
    patches = torch.einsum("ia,jb,abc->ijc", rows, columns, patches).flatten(0, 1)
    return torch.cat([table[:, :1].double(), patches[None]], 1)


def hub_patch_tokens(state: dict[str, Tensor], x: Tensor, *, depth: int, heads: int) -> Tensor:
    """What PixelGen takes from the hub's ViT, from images (B, 3, H, W) in [-1, 1] and a hub state dict."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    image = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    rows, columns = (bicubic_matrix(side, side * 14 // 16, 14 / 16) for side in x.shape[2:])
    image = torch.einsum("ia,jb,ncab->ncij", rows, columns, image)
    kernel, bias = state["patch_embed.proj.weight"].flatten(1), state["patch_embed.proj.bias"]
    tokens = F.unfold(image, 14, stride=14).transpose(1, 2) @ kernel.T + bias
    B, T, C = tokens.shape
    tokens = torch.cat([state["cls_token"].expand(B, -1, -1), tokens], 1)
    tokens = tokens + hub_position_table(state["pos_embed"], (x.shape[2] // 16, x.shape[3] // 16))

    def norm(tokens: Tensor, name: str) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(tokens: Tensor, name: str) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i in range(depth):
        qkv = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        # each (B, heads, 1 + T, C / heads)
        q, k, v = qkv.view(B, 1 + T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) * (C // heads) ** -0.5).softmax(-1) @ v
        attended = linear(attended.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        tokens = tokens + state[f"blocks.{i}.ls1.gamma"] * attended
        hidden = linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + state[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(tokens, "norm")[:, 1:]


def test_dino_equals_the_hub_model_written_out(dino):
    network = copy.deepcopy(dino).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # fresh biases are 0 and layer scales 1e-5: nothing would show
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    x = torch.rand(2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    expected = hub_patch_tokens(network.vit.state_dict(), x, depth=2, heads=6)
    actual = network(x)
    assert actual.shape == (2, 6, dino.width) and dino.width == 384
    # The position table is interpolated in float32, by the hub too.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_position_table_is_sampled_as_the_hub_does():
    table = torch.randn(1, 1 + 5 * 5, 2)
    for grid in ((3, 4), (5, 6), (9, 2)):
        actual = interpolate_position_table(table, grid)
        assert torch.equal(actual[:, 0], table[:, 0])
        torch.testing.assert_close(actual.double(), hub_position_table(table, grid), rtol=1e-5, atol=1e-5)
    assert interpolate_position_table(table, (5, 5)) is table


def test_dino_refuses_bad_arguments(dino):
    for sides in ((40, 32), (8, 8), (0, 16)):
        with pytest.raises(ValueError, match=rf"multiples of patch_size 16, got \({sides[0]}, {sides[1]}\)"):
            dino(torch.zeros(1, 3, *sides))
    told = r"DINOv2: x must have shape \(B, 1 or 3, H, W\), got \(1, 4, 16, 16\)"
    with pytest.raises(ValueError, match=told):
        dino(torch.zeros(1, 4, 16, 16))
    with pytest.raises(UserError, match=r"name must be one of dinov2_vits14, .*got 'dino'"):
        DINOv2("dino", "random")
    with pytest.raises(UserError, match=r"layer must lie in \[1, 12\] for dinov2_vits14, got 13"):
        DINOv2("dinov2_vits14", "random", layer=13)
    with pytest.raises(UserError, match=r"patch_size must be at least 1, got 0"):
        DINOv2("dinov2_vits14", "random", patch_size=0)


# --- embedded ---


def test_embedded_is_small_and_shaped_for_the_denoiser(embedded):
    x = torch.randn(3, 1, 8, 8)
    stages, tokens = embedded, EmbeddedTokens(embedded)
    assert [tuple(stage.shape) for stage in stages(x)] == [(3, 16, 8, 8), (3, 32, 4, 4), (3, 48, 4, 4)]
    assert tokens(x).shape == (3, 16, tokens.width)
    assert torch.equal(tokens.from_stages(stages(x)), tokens(x))
    assert sum(parameter.numel() for parameter in embedded.parameters()) < 60_000


def test_embedded_separates_classes_and_keeps_variety_within_them(embedded, digits):
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


def test_embedded_lpips_puts_unrelated_images_at_the_distance_of_vgg(embedded, digits):
    x = to_images(digits[0][:300])
    distance = LPIPS(embedded, ops=select("auto"))
    assert 0.6 < float(distance(x, x.roll(1, 0)).mean()) < 0.8
    assert float(distance(x, x).abs().max()) < 1e-6


def test_embedded_is_deterministic_and_leaves_the_global_generator_alone(digits, monkeypatch):
    few_steps(12, monkeypatch)
    before = torch.get_rng_state()
    first = train_embedded(CONFIG, *digits).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = train_embedded(CONFIG, *digits).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = train_embedded(replace(CONFIG, seed=6), *digits)
    assert not torch.equal(other.state_dict()["head.weight"], first["head.weight"])


def test_embedded_is_kept_in_the_run_folder(tmp_path, digits, monkeypatch):
    few_steps(5, monkeypatch)
    trained = embedded_features(tmp_path / "run", CONFIG, lambda: digits)
    start = time.perf_counter()
    read = embedded_features(tmp_path / "run", CONFIG, never)
    assert time.perf_counter() - start < 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]
    assert load_file(tmp_path / "run" / FILE_NAME).keys() == read.state_dict().keys()  # tensors only
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(EmbeddedTokens(read)(x), EmbeddedTokens(trained)(x))
    weights = zip(read.layer_weights, trained.layer_weights, strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert not any(parameter.requires_grad for parameter in read.parameters())

    with pytest.raises(UserError, match=r'trained for .*"patch_size": 2.* this run needs .*"patch_size": 4'):
        embedded_features(tmp_path / "run", replace(CONFIG, patch_size=4), never)
    file = tmp_path / "run" / FILE_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is it truncated"):
        embedded_features(tmp_path / "run", CONFIG, never)


@pytest.mark.parametrize(
    ("channels", "size", "patch_size"),
    [(3, 32, 4), (3, 64, 16), (3, 64, 32), (1, 6, 1), (3, 15, 5), (1, 28, 14)],
)
def test_embedded_fits_other_images_and_patches(channels, size, patch_size, monkeypatch):
    few_steps(1e-3, monkeypatch)
    images = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
    config = EmbeddedConfig(channels=channels, patch_size=patch_size)
    features = train_embedded(config, images, torch.zeros(8, dtype=torch.int64))
    tokens = EmbeddedTokens(features)(to_images(images))
    assert tokens.shape == (8, (size // patch_size) ** 2, 64) and tokens.isfinite().all()
    assert all(stage.isfinite().all() for stage in features(to_images(images)))


def test_embedded_refuses_what_does_not_fit(embedded):
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, H, W\), got \(2, 3, 8, 8\)"):
        EmbeddedTokens(embedded)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"multiples of patch_size 2, got \(7, 8\)"):
        embedded(torch.zeros(2, 1, 7, 8))
