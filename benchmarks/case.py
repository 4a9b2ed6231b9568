"""One op at one shape and dtype: what a suite times. The shapes stand in the file of the op."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pixelgen_kernels import registry
from pixelgen_kernels.cases import MODELS, Benchmark, Draw
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("fwd", "bwd", "fwd_bwd")

Outputs = Tensor | tuple[Tensor, ...]
Op = Callable[..., Outputs]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op on one set of inputs.

    Attributes:
        op: name of the op.
        shape: starts with the model's name, a key of MODELS, or another network's, then the sizes.
        dtype: key of DTYPES.
        fused: the op; returns a tensor or a tuple of tensors.
        eager: its reference; called as the op is.
        inputs: makes the keyword arguments on a device.
        differentiable: names of those that get gradients; an op without any is timed forward only.
    """

    op: str
    shape: str
    dtype: str
    fused: Op
    eager: Op
    inputs: Callable[[torch.device], dict[str, Any]]
    differentiable: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    @property
    def model(self) -> str:
        """What the shape belongs to."""
        return self.shape.split()[0]

    @property
    def modes(self) -> tuple[str, ...]:
        """What can be timed."""
        return MODES if self.differentiable else MODES[:1]


def cases(device: torch.device, *, of_models: bool) -> list[Case]:
    """Every case of every op at the shapes of MODELS, or, not `of_models`, of the frozen networks."""
    return [
        Case(
            op=name,
            shape=benchmark.label,
            dtype=dtype,
            fused=op.fused,
            eager=op.eager,
            inputs=partial(_inputs, op, benchmark, dtype),
            differentiable=tuple(key for key in op.differentiable if key not in benchmark.constant),
        )
        for name, op in registry.ops().items()
        for benchmark in op.benchmarks(device.type)
        for dtype in DTYPES
        if (benchmark.label.split()[0] in MODELS) == of_models
    ]


def _inputs(op: registry.Op, benchmark: Benchmark, dtype: str, device: torch.device) -> dict[str, Any]:
    draw = Draw(dtype=DTYPES[dtype], other=benchmark.other, device=device, layout=benchmark.layout)
    return op.inputs(draw, benchmark.shape, **benchmark.options)


def leaves_of(inputs: dict[str, Any], differentiable: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of the inputs that are there, each as a leaf of the graph."""
    return {name: inputs[name].detach().requires_grad_() for name in differentiable if name in inputs}


def outputs(result: Outputs) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def normal(*shape: int, dtype: str, device: torch.device, seed: int = 0) -> Tensor:
    """Normal values that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=DTYPES[dtype])
