"""One op at one shape and dtype, and the shapes of the models we ship."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("fwd", "bwd", "fwd_bwd")
# samples of one step on one device: what fits two CPU cores, and what fills a GPU
BATCH = {"cpu": 8, "cuda": 64}

Outputs = Tensor | tuple[Tensor, ...]
Op = Callable[..., Outputs]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the ops see of a model at 256 pixels.

    Attributes:
        C: width.
        N: heads.
        T: tokens, in-context tokens included.
        prefix: in-context tokens, the first of the T.
        P: patch side.
        image_size: image side.
    """

    C: int
    N: int
    T: int
    prefix: int
    P: int = 16
    image_size: int = 256


MODELS = {
    "B/16": ModelShape(C=768, N=12, T=256 + 32, prefix=32),
    "L/16": ModelShape(C=1024, N=16, T=256 + 32, prefix=32),
    "XL/16": ModelShape(C=1152, N=16, T=256 + 32, prefix=32),
    # the patch-level transformer of PixelDiT (arXiv 2511.20645); it has no in-context tokens
    "PixelDiT-XL": ModelShape(C=1152, N=16, T=256, prefix=0),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op on one set of inputs.

    Attributes:
        op: name of the op.
        shape: starts with the model's name, a key of MODELS, then the sizes.
        dtype: key of DTYPES.
        fused: the op; returns a tensor or a tuple of tensors.
        eager: its reference; called as the op is.
        inputs: makes the keyword arguments on a device.
        differentiable: names of those that get gradients; an op without any is timed forward only.
        fwd_bytes, bwd_bytes: what has to move at least: every input read once, every output written once.
    """

    op: str
    shape: str
    dtype: str
    fused: Op
    eager: Op
    inputs: Callable[[torch.device], dict[str, Any]]
    differentiable: tuple[str, ...] = ()
    fwd_bytes: int
    bwd_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    @property
    def model(self) -> str:
        """The model that the shape belongs to."""
        return self.shape.split()[0]

    @property
    def modes(self) -> tuple[str, ...]:
        """What can be timed."""
        return MODES if self.differentiable else MODES[:1]

    def bytes(self, mode: str) -> int:
        """Least traffic of "fwd", "bwd" or "fwd_bwd"."""
        return {
            "fwd": self.fwd_bytes,
            "bwd": self.bwd_bytes,
            "fwd_bwd": self.fwd_bytes + self.bwd_bytes,
        }[mode]


def outputs(result: Outputs) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def normal(*shape: int, dtype: str, device: torch.device, seed: int = 0) -> Tensor:
    """Normal values that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=DTYPES[dtype])
