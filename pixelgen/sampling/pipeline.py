"""From a trained run to images, in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pixelgen_kernels import philox_normal
from torch import Tensor

from pixelgen.conditions import Condition
from pixelgen.config.load import PRESET_DIR, config_from_yaml
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import build_denoiser, family_of
from pixelgen.models.released import load_released_checkpoint, load_strictly
from pixelgen.sampling.guidance import GuidedVelocity
from pixelgen.sampling.images import to_uint8
from pixelgen.sampling.options import SampleConfig
from pixelgen.sampling.samplers import SAMPLERS, timesteps
from pixelgen.training.checkpoint import read as checkpoints

NOISE_STREAM = 16  # apart from the streams of training

# Whose sampling settings a released checkpoint takes; the others take those of their family's largest.
PRESET_OF_SIZE = {
    "PixelGen-L/16": "pixelgen-l-256",
    "JiT-B/16": "jit-b-256",
    "JiT-L/16": "jit-l-256",
    "PixelDiT-B/16": "pixeldit-b-256",
    "PixelDiT-L/16": "pixeldit-l-256",
}
PRESET_OF_SIZE_AND_IMAGE = {("PixelDiT-XL/16", 512): "pixeldit-xl-512"}
PRESET_OF_FAMILY = {"jit": "pixelgen-xl-256", "pixeldit": "pixeldit-xl-256"}


class Pipeline:
    """A denoiser and the settings it is sampled with.

    Args:
        model: the denoiser, in eval mode.
        sample: default settings of ``sample``.
        t_eps: floor of 1 - t in the velocity.
        noise_scale: standard deviation of the starting noise, as in training.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
    """

    def __init__(
        self,
        model: Denoiser,
        sample: SampleConfig,
        *,
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.model, self.settings = model, sample
        self.t_eps, self.noise_scale, self.dtype = t_eps, noise_scale, dtype
        self.nfe = 0  # network evaluations per image of the last call

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        *,
        weights: str = "ema",
        device: str | torch.device = "cpu",
        kernels: Literal["auto", "eager"] = "auto",
    ) -> Pipeline:
        """Loads the newest checkpoint of a run, or the checkpoint whose folder is given.

        Args:
            path: ``runs/NAME`` or ``runs/NAME/checkpoints/step_00001000``.
            weights: ``"ema"`` for the first of the run's averages, one of their names such as ``"0.9999"`` or
                ``"power-0.05"``, or ``"raw"``.
            device: where to sample.
            kernels: as in ``JiT``.

        Raises:
            FileNotFoundError: nothing there.
            UserError: not a run, a damaged one, or one without such an average.
        """
        checkpoint = checkpoints.find_checkpoint(path)
        checkpoints.read_meta(checkpoint)
        config: TrainConfig = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text())
        model = build_denoiser(config.model_config(), kernels)
        if weights == "raw":
            checkpoints.load_state(checkpoint, {"model": model.state_dict()})
        else:
            name = None if weights == "ema" else weights
            load_strictly(model, checkpoints.load_ema_weights(checkpoint, name), str(checkpoint))
        return cls(
            model.to(device).eval(),
            config.sample,
            t_eps=config.time.t_eps,
            noise_scale=config.time.noise_scale,
            dtype=config.dtype,
        )

    @classmethod
    def from_released(
        cls,
        path: str | Path,
        size: str,
        *,
        weights: str = "ema",
        device: str | torch.device = "cpu",
        kernels: Literal["auto", "eager"] = "auto",
        image_size: int | None = None,
    ) -> Pipeline:
        """Loads a ``.ckpt`` of the public code, with the sampling settings and dtype of its preset.

        Args:
            path: the file, of the public PixelGen or PixelDiT code.
            size: its architecture, a size of ``model.size`` of any family, such as ``"PixelGen-XL/16"`` or
                ``"PixelDiT-XL/16"``.
            weights: ``"ema"`` for the averaged weights, or ``"raw"``.
            device: where to sample.
            kernels: as in ``JiT``.
            image_size: side of the images in pixels where it is not that of the size: 512 for PixelDiT's
                weights of that resolution, which no shape in the file tells.
        """
        model = load_released_checkpoint(path, size, weights, kernels, image_size)
        preset = PRESET_OF_SIZE_AND_IMAGE.get((size, model.config.image_size)) or PRESET_OF_SIZE.get(size)
        preset = preset or PRESET_OF_FAMILY[family_of(model.config).name]
        config = config_from_yaml((PRESET_DIR / f"{preset}.yaml").read_text(), preset)
        return cls(model.to(device), config.sample, dtype=config.dtype)

    @torch.inference_mode()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        progress: Callable[[int], object] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draws one image per label.

        Image i depends only on the weights, the settings, ``seed``, ``first_index + i`` and its label, not on
        the batch it is drawn in (up to the rounding of matrix products).

        Args:
            labels: one class index per image, in [0, num_classes); ``num_classes`` draws without a class.
            seed: of the starting noise.
            first_index: index of the first image, to continue a series.
            batch_size: images drawn at once.
            progress: called with the number of finished images after every batch.
            **settings: fields of ``SampleConfig``, such as ``steps`` and ``guidance``, to use instead of the
                pipeline's; None keeps the pipeline's.

        Returns:
            (N, C, H, W) uint8 on the CPU.

        Raises:
            UserError: a label or setting out of range.
        """
        overrides = {name: value for name, value in settings.items() if value is not None}
        chosen = replace(self.settings, **overrides)
        config = self.model.config
        device = next(self.model.parameters()).device
        if batch_size < 1:
            raise UserError(f"sample: batch_size must be at least 1, got {batch_size}")
        labels = torch.as_tensor(labels, dtype=torch.int64)
        wrong = labels[(labels < 0) | (labels > config.num_classes)]
        if len(wrong):
            raise UserError(f"sample: labels must lie in [0, {config.num_classes - 1}], got {int(wrong[0])}")
        times = timesteps(chosen.steps, chosen.timeshift)
        shape = (config.channels, *config.image_height_width)
        images = torch.empty(len(labels), *shape, dtype=torch.uint8)
        self.nfe = 0
        for start in range(0, len(labels), batch_size):
            condition = {"label": labels[start : start + batch_size].to(device)}
            count = len(condition["label"])
            index = torch.arange(start, start + count, device=device) + first_index
            noise = philox_normal(seed, 0, index, images[0].numel(), stream=NOISE_STREAM)
            velocity = GuidedVelocity(
                self._predict,
                condition,
                self.model.null(condition),
                chosen,
                self.t_eps if self.model.prediction == "x" else None,
            )
            x = SAMPLERS[chosen.sampler](velocity, noise.view(count, *shape) * self.noise_scale, times)
            images[start : start + count] = to_uint8(x).cpu()
            self.nfe = velocity.nfe
            if progress is not None:
                progress(start + count)
        return images

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            prediction = self.model(x_t, t, condition)
        return prediction.to(x_t.dtype)  # the velocity is formed in fp32
