"""Perceptual features without a download: a small network trained on the run's own images in seconds.

The network is a convolutional trunk with three stages (for LPIPS) and a head with one token per patch of the
denoiser (for REPA and P-DINO). It learns two things at once from slightly noisy, shifted images: the class
(where there is more than one), which separates what must not be confused, and the clean pixels of every
patch, which keeps the variety within a class visible. It is trained on the CPU for a number of steps that
depends on shapes only, so a seed gives the same features again, and it is kept in the run's folder, so a
resumed run uses the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pixelgen.encoders.base import StageEncoder, TokenEncoder, check_dtype
from pixelgen.encoders.weights import load_strictly, read_state_dict
from pixelgen.errors import UserError
from pixelgen.files import replacing

FILE_NAME = "embedded_features.safetensors"

_STAGE_WIDTHS = (16, 32, 48)
_TOKEN_WIDTH = 64
# Two unrelated images end up at this LPIPS distance, as unrelated photographs do with VGG16, so that the
# published weight of the term keeps its meaning.
_UNRELATED_DISTANCE = 0.7
# Work: 4.9 million pixels are 600 steps on 128 images of 8x8, 3 to 7 s on one core.
_PIXEL_BUDGET = 4_915_200
_PIXELS_PER_STEP = 8_192
_MIN_BATCH, _MAX_BATCH = 16, 128
_MAX_TRAINING_SIDE = 32
_MAX_NOISE = 0.5
_LEARNING_RATE = 8e-3
_DENOISING_WEIGHT = 4.0


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """What the features depend on; stored beside them and compared when they are read again.

    Args:
        channels: image channels.
        patch_size: pixels per side of one token, the denoiser's patch size.
        num_classes: classes of the labels; 1 for none, which leaves denoising as the only task.
        seed: seed of initial weights, batches and noise.
    """

    channels: int
    patch_size: int
    num_classes: int = 1
    seed: int = 0


class EmbeddedFeatures(StageEncoder):
    """The trained network: three feature maps for LPIPS. ``EmbeddedTokens`` makes tokens of the last one."""

    stage_widths = _STAGE_WIDTHS

    token_mean: Tensor
    token_std: Tensor

    def __init__(self, config: EmbeddedConfig) -> None:
        super().__init__()
        patch_size = config.patch_size
        down = [2 if patch_size % 2 == 0 else 1, 2 if patch_size % 4 == 0 else 1]
        widths = (config.channels, *_STAGE_WIDTHS)
        self.config = config
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=stride, padding=1)
            for i, stride in enumerate((1, *down))
        )
        rest = patch_size // (down[0] * down[1])
        self.head = nn.Conv2d(_STAGE_WIDTHS[-1], _TOKEN_WIDTH, rest, stride=rest)
        self.register_buffer("token_mean", torch.zeros(_TOKEN_WIDTH))
        self.register_buffer("token_std", torch.ones(_TOKEN_WIDTH))
        self.register_layer_weights([torch.ones(width) for width in _STAGE_WIDTHS])
        self.freeze()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] to maps of 16, 32 and 48 channels."""
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ValueError(
                f"EmbeddedFeatures: x must have shape (B, {self.config.channels}, H, W), got {tuple(x.shape)}"
            )
        if x.shape[2] % self.config.patch_size or x.shape[3] % self.config.patch_size:
            raise ValueError(
                f"EmbeddedFeatures: image sides must be multiples of patch_size {self.config.patch_size}, "
                f"got {tuple(x.shape[2:])}"
            )
        check_dtype(x, self.token_mean.dtype, "EmbeddedFeatures")
        x = x.to(self.token_mean.dtype)
        maps = []
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
            maps.append(x)
        return maps

    def tokens(self, stage: Tensor) -> Tensor:
        """The last feature map to tokens (B, T, D), each channel of mean 0 and deviation 1 over the data."""
        tokens = self.head(stage).flatten(2).transpose(1, 2)
        # A cosine between features with a common offset would be close to 1 for any two images.
        return (tokens - self.token_mean) / self.token_std


class EmbeddedTokens(TokenEncoder):
    """The tokens of ``features``, one per patch, for REPA and P-DINO."""

    width = _TOKEN_WIDTH

    def __init__(self, features: EmbeddedFeatures) -> None:
        super().__init__()
        self.features = features
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to tokens (B, T, 64), T = (H / patch_size) * (W / patch_size)."""
        return self.from_stages(self.features(x))

    def from_stages(self, maps: list[Tensor]) -> Tensor:
        """The same tokens from the maps of ``features``."""
        return self.features.tokens(maps[-1])


def embedded_features(
    run_dir: str | Path, config: EmbeddedConfig, images: Callable[[], tuple[Tensor, Tensor]]
) -> EmbeddedFeatures:
    """The features kept in ``run_dir``, or new ones, trained on ``images`` and kept there.

    Args:
        run_dir: the run's folder; the file is ``embedded_features.safetensors`` in it.
        config: what the features depend on.
        images: called only when there is no file yet; returns uint8 images (N, C, H, W) and int64 labels
            (N,).

    Raises:
        UserError: the file is broken or was trained for another configuration.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        features = train_embedded(config, *images())
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in features.state_dict().items()}
        with replacing(path) as file:
            file.write(save(state, metadata={"config": json.dumps(asdict(config))}))
        return features
    what = "embedded features"
    state = read_state_dict(path, what=what, option="embedded")
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("config")
    if stored is None or json.loads(stored) != asdict(config):
        raise UserError(
            f"embedded: {path} was trained for {stored or 'an unknown configuration'}, this run needs "
            f"{json.dumps(asdict(config))}; use another run folder, or delete the file to train it again"
        )
    features = EmbeddedFeatures(config)
    load_strictly(features, state, source=str(path), what=what, option="embedded")
    return features


def train_embedded(config: EmbeddedConfig, images: Tensor, labels: Tensor) -> EmbeddedFeatures:
    """Train the features on images; a pure function of its arguments that leaves the global generator alone.

    Minimises cross-entropy(class) + 4 * mean (clean patch - prediction)^2 on images shifted by up to one
    pixel, with noise of a deviation drawn from [0, 0.5] per image.

    Args:
        config: what the features depend on, the seed among them.
        images: (N, C, H, W) uint8; sides are multiples of the patch size. Larger than 32 px, crops are used.
        labels: (N,) int64 in [0, num_classes); not read when there is one class.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        features = EmbeddedFeatures(config).requires_grad_(True)
        classify = nn.Linear(_TOKEN_WIDTH, config.num_classes)
        reconstruct = nn.Linear(_TOKEN_WIDTH, config.channels * config.patch_size**2)
    images, labels = images.cpu(), labels.cpu()
    largest = max(_MAX_TRAINING_SIDE // config.patch_size, 2) * config.patch_size  # at least two patches
    crop = [min(side, largest) for side in images.shape[2:]]
    batch = min(max(_PIXELS_PER_STEP // (crop[0] * crop[1]), _MIN_BATCH), _MAX_BATCH)
    steps = max(_PIXEL_BUDGET // (batch * crop[0] * crop[1]), 1)
    parameters = [p for module in (features, classify, reconstruct) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(steps):
            index = torch.randint(len(images), (batch,), generator=generator)
            x = _random_crop(images[index], crop, generator)
            noise = torch.randn(x.shape, generator=generator)
            noisy = x + noise * _MAX_NOISE * torch.rand(batch, 1, 1, 1, generator=generator)
            tokens = features.tokens(features(noisy)[-1])
            patches = F.pixel_unshuffle(x, config.patch_size).flatten(2).transpose(1, 2)  # (B, T, C*P*P)
            loss = _DENOISING_WEIGHT * F.mse_loss(reconstruct(tokens), patches)
            if config.num_classes > 1:
                loss = loss + F.cross_entropy(classify(tokens.mean(1)), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    features.freeze()
    _calibrate(features, images, crop, generator)
    return features


def _random_crop(images: Tensor, crop: list[int], generator: torch.Generator) -> Tensor:
    """uint8 (B, C, H, W) to [-1, 1], shifted by up to one pixel and cropped, both the same for the batch."""
    x = F.pad(images.float() / 127.5 - 1, (1, 1, 1, 1), mode="replicate")
    top, left = (
        int(torch.randint(side - size + 1, (), generator=generator))
        for side, size in zip(x.shape[2:], crop, strict=True)
    )
    return x[:, :, top : top + crop[0], left : left + crop[1]]


@torch.no_grad()
def _calibrate(
    features: EmbeddedFeatures, images: Tensor, crop: list[int], generator: torch.Generator
) -> None:
    """Set the token statistics, and the channel weights that put unrelated images at the distance 0.7."""
    index = torch.randperm(len(images), generator=generator)[:512]
    x = images[index][:, :, : crop[0], : crop[1]].float() / 127.5 - 1
    maps = features(x)
    tokens = features.tokens(maps[-1]).flatten(0, 1)
    features.token_mean.copy_(tokens.mean(0))
    features.token_std.copy_(tokens.std(0, correction=0).clamp_min(1e-3))
    for channel_weight, stage in zip(features.layer_weights, maps, strict=True):
        unit = F.normalize(stage, dim=1, eps=1e-10)
        distance = (unit - unit.roll(1, 0)).square().sum(1).mean()
        # One image, or all the same: no distance to go by, so the weights stay 1.
        weight = torch.where(distance > 1e-6, _UNRELATED_DISTANCE / len(maps) / distance.clamp_min(1e-6), 1.0)
        channel_weight.fill_(float(weight))
