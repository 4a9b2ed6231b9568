"""Memory of every accelerated op on the CPU: outputs and what backward needs, nothing else.

Partial sums of gradients that are summed over tokens may add 3 % of the gradients.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from op_testing import Inputs, as_chunk, draw
from pixelgen_kernels import (
    cosine_distance,
    flow_matching_loss,
    gate_residual_norm_modulate,
    lpips_distance,
    noise_patchify,
    patchify,
    qk_norm_rope,
    rms_norm_modulate,
    swiglu,
    unpatchify,
)

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are not installed
from benchmarks.case import outputs
from benchmarks.measure import peak_bytes

CPU = torch.device("cpu")
B, T, C = 8, 288, 256
N, PREFIX = 4, 32
PARTIAL_SUMS = 0.03


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op on inputs of a real size; `statistics` are the bytes that forward keeps for backward."""

    fn: Callable
    inputs: Callable[[torch.dtype], Inputs]
    differentiable: tuple[str, ...]
    statistics: int = 0


def _modulated(dtype: torch.dtype) -> Inputs:
    shift, scale = draw(B, 6 * C, dtype=dtype).chunk(6, -1)[:2]
    return {"x": draw(B, T, C, dtype=dtype), "shift": shift, "scale": scale, "weight": draw(C)}


def _gated(dtype: torch.dtype) -> Inputs:
    gate, shift, scale = draw(B, 6 * C, dtype=dtype).chunk(6, -1)[:3]
    x, y = draw(B, T, C, dtype=dtype), draw(B, T, C, dtype=dtype, seed=1)
    return {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "weight": draw(C)}


def _feature_maps(dtype: torch.dtype, memory_format: torch.memory_format) -> Inputs:
    pred, target = (draw(B, 128, 32, 32, dtype=dtype, seed=seed) for seed in (0, 1))
    pred, target = (tensor.to(memory_format=memory_format) for tensor in (pred, target))
    return {"pred": pred, "target": target, "weight": draw(128)}


def _qkv(dtype: torch.dtype) -> Inputs:
    D = C // N
    angle = draw(T - PREFIX, D // 2)
    return {
        "qkv": draw(B, T, 3 * C, dtype=dtype),
        "q_weight": draw(D),
        "k_weight": draw(D),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }


OPS = {
    "rms_norm_modulate": Op(
        fn=rms_norm_modulate,
        inputs=_modulated,
        differentiable=("x", "shift", "scale", "weight"),
        statistics=4 * B * T,
    ),
    "layer_norm_modulate": Op(
        fn=partial(rms_norm_modulate, norm="layer"),
        inputs=_modulated,
        differentiable=("x", "shift", "scale", "weight"),
        statistics=8 * B * T,
    ),
    # heads in front of their channels: few rows per sample, and nothing is per sample
    "rms_norm_modulate of heads": Op(
        fn=rms_norm_modulate,
        inputs=lambda dtype: {"x": draw(B * T, N, C // N, dtype=dtype), "weight": draw(C // N)},
        differentiable=("x", "weight"),
        statistics=4 * B * T * N,
    ),
    "gate_residual_norm_modulate": Op(
        fn=gate_residual_norm_modulate,
        inputs=_gated,
        differentiable=("x", "y", "gate", "shift", "scale", "weight"),
        statistics=4 * B * T,
    ),
    "flow_matching_loss": Op(
        fn=flow_matching_loss,
        inputs=lambda dtype: {
            "x_pred": draw(B, T, C, dtype=dtype),
            "x": draw(B, T, C),
            "t": torch.linspace(0, 1, B),
        },
        differentiable=("x_pred",),
        statistics=4 * B * T * C // 500,  # partial sums: its output is B numbers
    ),
    # statistics of each position or token; partial sums
    "lpips_distance": Op(
        fn=lpips_distance,
        inputs=lambda dtype: _feature_maps(dtype, torch.contiguous_format),
        differentiable=("pred",),
        statistics=4 * B * (3 * 32 * 32 + 4),
    ),
    "lpips_distance of channels-last maps": Op(
        fn=lpips_distance,
        inputs=lambda dtype: _feature_maps(dtype, torch.channels_last),
        differentiable=("pred",),
        statistics=4 * B * (3 * 32 * 32 + 4),
    ),
    "cosine_distance": Op(
        fn=cosine_distance,
        inputs=lambda dtype: {"pred": draw(B, T, C, dtype=dtype), "target": draw(B, T, C, seed=1)},
        differentiable=("pred", "target"),
        statistics=4 * B * (3 * T + T // 16),
    ),
    "qk_norm_rope": Op(
        fn=partial(qk_norm_rope, num_heads=N, num_prefix_tokens=PREFIX),
        inputs=_qkv,
        differentiable=("qkv", "q_weight", "k_weight"),
    ),
    "swiglu": Op(
        fn=swiglu, inputs=lambda dtype: {"x": draw(B, T, 2 * C, dtype=dtype)}, differentiable=("x",)
    ),
    # a slice of a larger tensor is read in place
    "swiglu of a chunk": Op(
        fn=swiglu, inputs=lambda dtype: {"x": as_chunk(draw(B, T, 2 * C, dtype=dtype))}, differentiable=("x",)
    ),
    "patchify": Op(
        fn=partial(patchify, patch_size=16),
        inputs=lambda dtype: {"x": draw(B, 3, 128, 128, dtype=dtype)},
        differentiable=("x",),
    ),
    "unpatchify": Op(
        fn=partial(unpatchify, patch_size=16, image_size=(128, 128)),
        inputs=lambda dtype: {"tokens": draw(B, 64, 768, dtype=dtype)},
        differentiable=("tokens",),
    ),
}


def size(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_op_allocates_its_outputs_and_statistics(op, dtype):
    inputs = op.inputs(dtype)
    leaves = {name: inputs[name].detach().requires_grad_() for name in op.differentiable}
    arguments = {**inputs, **leaves}

    def forward() -> tuple[torch.Tensor, ...]:
        return outputs(op.fn(**arguments))

    y = forward()
    cotangents = [torch.ones_like(output) for output in y]

    def backward(y: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, list(leaves.values()), cotangents)

    gradients = backward(y)  # also warms up what is allocated once
    fwd = peak_bytes(CPU, lambda _: forward())
    assert size(y) <= fwd <= size(y) + op.statistics, f"forward: {fwd} bytes for outputs of {size(y)}"
    bwd = peak_bytes(CPU, backward, forward)
    allowed = (1 + PARTIAL_SUMS) * size(gradients)
    assert size(gradients) <= bwd <= allowed, f"backward: {bwd} bytes for gradients of {size(gradients)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["given", "philox"])
def test_noise_patchify_allocates_its_outputs(source, dtype):
    image = (draw(B, 3, 64, 64) * 50 + 128).clamp(0, 255).to(torch.uint8)
    noise = {"noise": draw(B, 3, 64, 64)}
    if source == "philox":
        noise = {"seed": 0, "sample_index": torch.arange(B)}

    def forward(_: object = None) -> tuple[torch.Tensor, ...]:
        t = torch.full((B,), 0.5)
        return noise_patchify(image, t, 16, return_clean=True, dtype=dtype, **noise)

    allowed = size(forward()) + 4 * B
    assert peak_bytes(CPU, forward) <= allowed
