"""A run's objective on tensors without memory, to count and measure what it would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelgen.losses.build import build_skeleton
from pixelgen.losses.objective import Objective
from pixelgen.losses.options import LossConfig
from pixelgen.losses.times import Times
from pixelgen.models.families import Architecture, build_denoiser


@dataclass(frozen=True)
class Skeleton:
    """An objective of tensors that have shapes and no memory, and inputs for it."""

    objective: Objective
    model: Architecture
    mode: FakeTensorMode

    def tensors(self) -> list[Tensor]:
        """Everything that the objective holds, frozen networks included."""
        networks = self.objective.networks
        modules = [m for m in (self.objective, networks.encoder, networks.lpips) if m is not None]
        return [value for m in modules for value in (*m.parameters(), *m.buffers())]

    def inputs(self, t: tuple[float, ...], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """Arguments of ``Objective.forward`` for images at some times."""
        model, batch = self.model, len(t)
        with self.mode:
            patches = torch.empty(batch, model.num_tokens, model.patch_dim, dtype=dtype)
            images = torch.empty(batch, model.channels, *model.image_height_width, dtype=torch.uint8)
            features = torch.empty(batch, model.num_tokens, model.width, dtype=dtype)
            on_device = torch.empty(batch)
        # The host's own times are real: by them it chooses the samples of a term.
        times = Times(torch.tensor(t), range(batch), on_device)
        return patches.clone().requires_grad_(), patches, images, times, features.requires_grad_()


def build(loss: LossConfig, model: Architecture, *, half: bool = False) -> Skeleton:
    """The objective of a model.

    Args:
        loss: the section of the configuration.
        model: the denoiser's architecture.
        half: the frozen networks in bf16, as where training runs in it.
    """
    with torch.device("meta"):
        objective = build_skeleton(loss, build_denoiser(model, "eager"))
        objective.networks.speed_up(half=half, compiled=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # a fake CPU: the meta device knows no autocast
        for module in (objective, objective.networks.encoder, objective.networks.lpips):
            if module is not None:
                _to_fake_cpu(module)
    return Skeleton(objective, model, mode)


def _to_fake_cpu(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            value = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            part.register_parameter(name, value)
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty_like(buffer, device="cpu"))
