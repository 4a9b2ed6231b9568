"""One op at one shape and dtype, and the shapes of the models we ship."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# samples of one step on one device: what fits two CPU cores, and what fills a GPU
BATCH = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the ops see of a model: width C, T tokens (in-context ones included), patch and image side."""

    C: int
    T: int
    P: int
    image_size: int = 256


MODELS = {
    "L/16": ModelShape(C=1024, T=256 + 32, P=16),
    "XL/16": ModelShape(C=1152, T=256 + 32, P=16),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op on one set of inputs.

    Attributes:
        op: name of the op.
        shape: starts with the model's name, then the sizes.
        dtype: key of DTYPES.
        fused: the op.
        eager: its reference; called as the op is.
        inputs: makes the keyword arguments on a device.
        differentiable: names of those that get gradients.
        fwd_bytes, bwd_bytes: what has to move at least: every input read once, every output written once.
    """

    op: str
    shape: str
    dtype: str
    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    inputs: Callable[[torch.device], dict[str, Any]]
    differentiable: tuple[str, ...]
    fwd_bytes: int
    bwd_bytes: int

    def bytes(self, mode: str) -> int:
        """Least traffic of "fwd", "bwd" or "fwd_bwd"."""
        return {
            "fwd": self.fwd_bytes,
            "bwd": self.bwd_bytes,
            "fwd_bwd": self.fwd_bytes + self.bwd_bytes,
        }[mode]


def normal(*shape: int, dtype: str, device: torch.device, seed: int = 0) -> Tensor:
    """Normal values that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=DTYPES[dtype])
