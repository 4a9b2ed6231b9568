"""What the tests of the objective share: small stand-ins for its networks, batches and layouts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen.config import LossConfig
from pixelgen.encoders.base import StageEncoder, TokenEncoder
from pixelgen.losses.objective import Objective
from pixelgen.losses.times import Times

B, C, SIDE, P, WIDTH, D = 4, 3, 8, 4, 6, 5
T = (SIDE // P) ** 2


class MeanTokens(TokenEncoder):
    """Mean colour of each patch, through a fixed matrix; counts its calls and the gradient mode of each."""

    width = D

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(C, D, generator=torch.Generator().manual_seed(1)))
        self.calls: list[bool] = []
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return F.avg_pool2d(x, P).flatten(2).transpose(1, 2) @ self.matrix


class TwoStages(StageEncoder):
    """Two small convolutions."""

    stage_widths = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(C, 4, 3), nn.Conv2d(4, 6, 3, stride=2)
        self.register_layer_weights([torch.rand(4), torch.rand(6)])
        self.freeze()

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x).relu()
        return [first, self.second(first).relu()]


class MeanAbsolute(nn.Module):
    """A distance of the images themselves."""

    def encode(self, x: Tensor) -> list[Tensor]:
        return [x]

    def distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        return (maps[0] - target[0]).abs().mean((1, 2, 3))


def make_objective(**overrides: Any) -> Objective:
    """An objective of stand-ins; options of the ``loss`` section and arguments of ``Objective`` by name."""
    arguments: dict[str, Any] = {
        "feature_width": WIDTH,
        "patch_size": P,
        "encoder": MeanTokens(),
        "lpips": MeanAbsolute(),
        "balance_parameter": lambda: None,
    }
    options: dict[str, Any] = {"projector_width": 7}
    names = {option.name for option in fields(LossConfig.section())}
    for name, value in overrides.items():
        (options if name in names else arguments)[name] = value
    return Objective(LossConfig(**options), **arguments)


def values_of(
    objective: Objective, batch: dict[str, Tensor], rows: range | None = None, **arguments: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss and terms of a batch of images, or of the part of it in ``rows``; and values per sample."""
    rows = range(len(batch["t"])) if rows is None else rows
    own = {name: value[rows.start : rows.stop] for name, value in batch.items()}
    outcome = objective(
        to_tokens(own["x_pred"]),
        to_tokens(own["x"]),
        own["x"],
        Times.of(batch["t"], rows),
        own.get("features"),
        **arguments,
    )
    return {"loss": outcome.loss, **outcome.terms}, outcome.per_sample


def terms_of(objective: Objective, batch: dict[str, Tensor], **arguments: Any) -> dict[str, Tensor]:
    """The loss and the terms alone."""
    return values_of(objective, batch, **arguments)[0]


def make_batch(t: tuple[float, ...] = (0.1, 0.3, 0.5, 0.98)) -> dict[str, Tensor]:
    return {
        "x_pred": torch.randn(B, C, SIDE, SIDE, requires_grad=True),
        "x": torch.rand(B, C, SIDE, SIDE) * 2 - 1,
        "t": torch.tensor(t),
        "features": torch.randn(B, T, WIDTH, requires_grad=True),
    }


def to_tokens(x: Tensor) -> Tensor:
    """Images to tokens with the patch vector (row, column, channel)."""
    patches = x.unflatten(2, (SIDE // P, P)).unflatten(4, (SIDE // P, P))  # (B, C, rows, P, columns, P)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def grad_of(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)


class CountingStages(TwoStages):
    """Counts the images it sees."""

    seen = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.seen += len(x)
        return super().forward(x)
