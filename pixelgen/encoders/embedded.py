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

from pixelgen.encoders.base import FrozenEncoder, StageEncoder, TokenEncoder, check_dtype
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

    def __post_init__(self) -> None:
        for name in ("channels", "patch_size", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"EmbeddedConfig: {name} must be at least 1, got {getattr(self, name)}")


class EmbeddedFeatures(FrozenEncoder):
    """The trained network; ``EmbeddedStages`` and ``EmbeddedTokens`` show it as encoders."""

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
        for i, width in enumerate(_STAGE_WIDTHS):
            self.register_buffer(f"layer_weight_{i}", torch.ones(width))

    def stages(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] to the three feature maps."""
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


class EmbeddedStages(StageEncoder):
    """The three feature maps of ``features``, for LPIPS."""

    stage_widths = _STAGE_WIDTHS

    def __init__(self, features: EmbeddedFeatures) -> None:
        super().__init__()
        self.features = features
        self.register_layer_weights(
            [features.get_buffer(f"layer_weight_{i}") for i in range(len(_STAGE_WIDTHS))]
        )
        self.freeze()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] to maps of 16, 32 and 48 channels."""
        return self.features.stages(x)


class EmbeddedTokens(TokenEncoder):
    """The tokens of ``features``, one per patch, for REPA and P-DINO."""

    width = _TOKEN_WIDTH

    def __init__(self, features: EmbeddedFeatures) -> None:
        super().__init__()
        self.features = features
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to tokens (B, T, 64), T = (H / patch_size) * (W / patch_size)."""
        return self.from_stages(self.features.stages(x))

    def from_stages(self, maps: list[Tensor]) -> Tensor:
        """The same tokens from the maps that ``EmbeddedStages`` of the same features returned."""
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
        UserError: the file is broken or was trained for another configuration, or the images do not fit
            ``config``.
    """
    path = Path(run_dir) / FILE_NAME
    if path.exists():
        return load_embedded(path, config)
    features = train_embedded(config, *images())
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in features.state_dict().items()}
    with replacing(path) as file:
        file.write(save(state, metadata={"config": json.dumps(asdict(config))}))
    return features


def load_embedded(path: str | Path, config: EmbeddedConfig) -> EmbeddedFeatures:
    """Read features that ``embedded_features`` wrote.

    Raises:
        UserError: the file is broken or was trained for another configuration.
    """
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
    features.freeze()
    return features


def train_embedded(config: EmbeddedConfig, images: Tensor, labels: Tensor) -> EmbeddedFeatures:
    """Train the features on images; a pure function of its arguments that leaves the global generator alone.

    Minimises cross-entropy(class) + 4 * mean (clean patch - prediction)^2 on images shifted by up to one
    pixel, with noise of a deviation drawn from [0, 0.5] per image.

    Args:
        config: what the features depend on, the seed among them.
        images: (N, C, H, W) uint8; sides are multiples of the patch size. Larger than 32 px, crops are used.
        labels: (N,) int64 in [0, num_classes); not read when there is one class.

    Raises:
        UserError: no images, or images or labels that do not fit ``config``.
    """
    _check_images(config, images, labels)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        features = EmbeddedFeatures(config)
        classify = nn.Linear(_TOKEN_WIDTH, config.num_classes)
        reconstruct = nn.Linear(_TOKEN_WIDTH, config.channels * config.patch_size**2)
    images, labels = images.cpu(), labels.cpu()
    crop = [min(side, _training_side(config.patch_size)) for side in images.shape[2:]]
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
            tokens = features.tokens(
                features.stages(x + noise * _MAX_NOISE * torch.rand(batch, 1, 1, 1, generator=generator))[-1]
            )
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


def _check_images(config: EmbeddedConfig, images: Tensor, labels: Tensor) -> None:
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != config.channels
        or not len(images)
    ):
        raise UserError(
            f"embedded: images must be uint8 (N, {config.channels}, H, W) with N > 0, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if any(side % config.patch_size or not side for side in images.shape[2:]):
        raise UserError(
            f"embedded: image sides must be multiples of patch_size {config.patch_size}, "
            f"got {tuple(images.shape[2:])}"
        )
    if config.num_classes > 1:
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise UserError(
                f"embedded: labels must be int64 of shape ({len(images)},), "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= config.num_classes:
            raise UserError(f"embedded: labels must lie in [0, {config.num_classes}), got {low} to {high}")


def _training_side(patch_size: int) -> int:
    """The side of training crops: about 32 pixels, at least two patches."""
    return max(_MAX_TRAINING_SIDE // patch_size, 2) * patch_size


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
    maps = features.stages(x)
    tokens = features.tokens(maps[-1]).flatten(0, 1)
    features.token_mean.copy_(tokens.mean(0))
    features.token_std.copy_(tokens.std(0, correction=0).clamp_min(1e-3))
    for i, stage in enumerate(maps):
        unit = F.normalize(stage, dim=1, eps=1e-10)
        distance = (unit - unit.roll(1, 0)).square().sum(1).mean()
        # One image, or all the same: no distance to go by, so the weights stay 1.
        weight = torch.where(distance > 1e-6, _UNRELATED_DISTANCE / len(maps) / distance.clamp_min(1e-6), 1.0)
        features.get_buffer(f"layer_weight_{i}").fill_(float(weight))
