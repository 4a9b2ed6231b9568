"""VGG16 feature maps as LPIPS reads them: torchvision's network, the lpips package's v0.1 channel weights."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from pixelgen.encoders.base import StageEncoder, as_rgb, check_dtype
from pixelgen.encoders.weights import load_weights, read_state_dict
from pixelgen.errors import UserError

# Index one past relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's `features`.
_TAPS = (4, 9, 16, 23, 30)
_MIN_SIDE = 16  # four 2x2 poolings lie before the last tap


class VGG16(StageEncoder):
    """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG16, input scaled as LPIPS v0.1 does.

    Args:
        weights: ``"pretrained"`` (torchvision's ImageNet weights, which torch.hub downloads once), the path
            of a file with them (torchvision's naming), ``"random"`` (seeded, with a warning), or None: left
            as made on the default device, to count and measure with.
        seed: seed of the random weights.

    Raises:
        UserError: the weights cannot be downloaded, or the file is missing, truncated or of another network.
    """

    stage_widths = (64, 128, 256, 512, 512)

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path | None = "pretrained", *, seed: int = 0) -> None:
        super().__init__()
        import torchvision

        # On the meta device: the constructor would fill a 500 MB classifier that LPIPS does not use.
        with torch.device("meta") if weights is not None else nullcontext():
            features = torchvision.models.vgg16(weights=None).features[: _TAPS[-1]]
        if weights is not None:
            features = features.to_empty(device="cpu")
            if weights == "random":
                _init_random(features, seed)
            load_weights(
                features,
                weights,
                url=torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
                what="VGG16",
                option="loss.stages_weights",
                names="features.0.weight to features.28.bias, torchvision naming",
                own_key=lambda key: None if key.startswith("classifier.") else key.removeprefix("features."),
            )
        self.features = features
        # LPIPS' ScalingLayer: the ImageNet mean and deviation, moved to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.register_layer_weights(
            [torch.ones(width) for width in self.stage_widths] if weights is None else _lpips_layer_weights()
        )
        self.freeze()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of images.

        Args:
            x: (B, 3, H, W), or (B, 1, H, W) which is repeated, in [-1, 1], not clamped; sides at least 16.

        Returns:
            Five maps of 64, 128, 256, 512, 512 channels; sides H/1, H/2, H/4, H/8, H/16.

        Raises:
            ValueError: another shape, or a side below 16.
            TypeError: integer images, or a wider dtype than the network's.
        """
        x = as_rgb(x, "VGG16")
        check_dtype(x, self.shift.dtype, "VGG16")
        if min(x.shape[-2:]) < _MIN_SIDE:
            raise ValueError(
                f"VGG16: image sides must be at least {_MIN_SIDE}, got {tuple(x.shape[-2:])}; "
                "resize the images or use loss.stages=embedded"
            )
        x = (x - self.shift) / self.scale
        stages = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i + 1 in _TAPS:
                stages.append(x)
        return stages


def _init_random(features: nn.Module, seed: int) -> None:
    """Torchvision's initialisation (He normal), from a seed of its own."""
    generator = torch.Generator().manual_seed(seed)
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _lpips_layer_weights() -> list[Tensor]:
    """LPIPS' learned channel weights v0.1 for VGG16, from the lpips package's own file."""
    # Found without importing the package, which takes a second and pulls in scikit-image.
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise UserError("VGG16: the package 'lpips' holds LPIPS' channel weights and is not installed")
    state = read_state_dict(
        Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth", what="LPIPS v0.1", option="lpips"
    )
    return [state[f"lin{i}.model.1.weight"].flatten().float() for i in range(len(_TAPS))]
