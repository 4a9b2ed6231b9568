"""From a trained run to images, in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pixelgen_kernels import philox_normal
from torch import Tensor, nn

from pixelgen.conditions import Condition
from pixelgen.config.load import PRESET_DIR, config_from_yaml
from pixelgen.config.resolve import pick_device
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import build_denoiser
from pixelgen.models.released import load_released_checkpoint, load_strictly
from pixelgen.models.sizes import ModelConfig, model_config
from pixelgen.sampling.guidance import GuidedVelocity
from pixelgen.sampling.images import to_uint8
from pixelgen.sampling.options import SampleConfig
from pixelgen.sampling.samplers import SAMPLERS, timesteps
from pixelgen.training.checkpoint import read as checkpoints

NOISE_STREAM = 16  # apart from the streams of training

# Whose sampling settings a released checkpoint takes; the others take those of PixelGen-XL/16.
PRESET_OF_SIZE = {"PixelGen-L/16": "pixelgen-l-256", "JiT-B/16": "jit-b-256", "JiT-L/16": "jit-l-256"}


class Pipeline:
    """A denoiser and the settings it is sampled with.

    Args:
        model: the denoiser, in eval mode.
        sample: default settings; every argument of ``sample`` overrides one of them.
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
        self.model, self.settings, self.t_eps, self.noise_scale = model, sample, t_eps, noise_scale
        self.dtype = dtype
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
        config: ModelConfig,
        sample: SampleConfig,
        *,
        weights: Literal["ema", "raw"] = "ema",
        device: str | torch.device = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        kernels: Literal["auto", "eager"] = "auto",
    ) -> Pipeline:
        """Loads a ``.ckpt`` of the public PixelGen code.

        Args:
            path: the file.
            config: its architecture, such as ``model_config("PixelGen-XL/16")``.
            sample: sampling settings.
            weights: the averaged or the raw weights.
            device: where to sample.
            dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
            kernels: as in ``JiT``.
        """
        return cls(load_released_checkpoint(path, config, weights, kernels).to(device), sample, dtype=dtype)

    @torch.inference_mode()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        *,
        guidance: float | None = None,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        guidance_rule: Literal["paper", "released"] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        timeshift: float | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Draws one image per label.

        Image i depends only on the weights, the settings, ``seed``, ``first_index + i`` and its label, not on
        the batch it is drawn in (up to the rounding of matrix products).

        Args:
            labels: one class index per image, in [0, num_classes); ``num_classes`` draws without a class.
            guidance: scale of classifier-free guidance; 1 is none.
            guidance_low: guidance acts from this t on.
            guidance_high: guidance acts up to this t.
            guidance_rule: how a time is tested against the interval; see ``GuidedVelocity``.
            steps: solver steps.
            sampler: a key of ``pixelgen.sampling.samplers.SAMPLERS``.
            timeshift: moves the steps towards the noise for values above 1.
            seed: of the starting noise.
            first_index: index of the first image, to continue a series.
            batch_size: images drawn at once.
            progress: called with the number of finished images after every batch.

        Returns:
            (N, C, H, W) uint8 on the CPU.

        Raises:
            UserError: a label or setting out of range.
        """
        given: dict[str, Any] = {
            "guidance": guidance,
            "guidance_low": guidance_low,
            "guidance_high": guidance_high,
            "guidance_rule": guidance_rule,
            "steps": steps,
            "sampler": sampler,
            "timeshift": timeshift,
        }
        settings = replace(self.settings, **{key: value for key, value in given.items() if value is not None})
        config = self.model.config
        device = next(self.model.parameters()).device
        if batch_size < 1:
            raise UserError(f"sample: batch_size must be at least 1, got {batch_size}")
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if ((labels < 0) | (labels > config.num_classes)).any():
            wrong = next(int(label) for label in labels if not 0 <= label <= config.num_classes)
            raise UserError(f"sample: labels must lie in [0, {config.num_classes - 1}], got {wrong}")
        grid = timesteps(settings.steps, timeshift=settings.timeshift)
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
                scale=settings.guidance,
                interval=(settings.guidance_low, settings.guidance_high),
                rule=settings.guidance_rule,
                upper_inclusive=settings.sampler != "adams",
                t_eps=self.t_eps if self.model.prediction == "x" else None,
            )
            x = SAMPLERS[settings.sampler](velocity, noise.view(count, *shape) * self.noise_scale, grid)
            images[start : start + count] = to_uint8(x).cpu()
            self.nfe = velocity.nfe
            if progress is not None:
                progress(start + count)
        return images

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            prediction = self.model(x_t, t, condition)
        return prediction.to(x_t.dtype)  # the velocity is formed in fp32


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def load_pipeline(
    path: str | Path,
    *,
    size: str | None = None,
    weights: str = "ema",
    device: str = "auto",
    kernels: Literal["auto", "eager"] = "auto",
) -> Pipeline:
    """A pipeline from a run, a checkpoint's folder, or a ``.ckpt`` of the public PixelGen code.

    Args:
        path: where it is.
        size: architecture of a ``.ckpt``, a key of ``pixelgen.models.SIZES``; runs know their own.
        weights: ``"ema"``, ``"raw"``, or for a run the name of one of its averages.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        kernels: as in ``JiT``.

    Raises:
        FileNotFoundError: nothing at ``path``.
        UserError: not a model, or ``size`` missing or out of place.
    """
    is_released = Path(path).suffix == ".ckpt"
    if is_released and size is None:
        raise UserError(
            f"{path}: a .ckpt does not name its architecture; give --size, such as PixelGen-XL/16"
        )
    if not is_released and size is not None:
        raise UserError(f"{path}: --size is for .ckpt files; a run knows its architecture")
    if is_released and weights not in ("ema", "raw"):
        raise UserError(f"{path}: a .ckpt has ema and raw weights only, got {weights!r}")
    target = pick_device(device)
    if size is None:
        return Pipeline.from_run(path, weights=weights, device=target, kernels=kernels)
    preset = PRESET_OF_SIZE.get(size, "pixelgen-xl-256")
    config = config_from_yaml((PRESET_DIR / f"{preset}.yaml").read_text(), preset)
    return Pipeline.from_released(
        path,
        model_config(size),
        config.sample,
        weights="raw" if weights == "raw" else "ema",
        device=target,
        dtype=config.dtype,
        kernels=kernels,
    )
