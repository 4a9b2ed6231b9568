"""The Triton kernels under the interpreter, on the CPU. test_triton.py runs this in a process of its own.

Triton decides at import whether functions are interpreted, also for its own library, so one process cannot
do both. Of the imported tests those run that have the name of an op in Triton.
"""
# ruff: noqa: F401

from typing import Any

import pytest
import torch
from op_testing import OPS, assert_same_bits, check_accuracy, inputs_of
from pixelgen_kernels.fused import LIBRARY
from pixelgen_kernels.ops import pixel_mlp_triton, pixel_modulate_triton
from pixelgen_kernels.ops import qk_norm_rope_triton as kernels
from test_ops import (
    test_accuracy,
    test_any_mixture_of_dtypes,
    test_outputs_are_fresh,
    test_some_outputs_or_one_input,
    test_upstream_gradients_of_any_layout,
)
from test_qk_norm_rope import (
    GRADS,
    test_gradients_of_attention_for_qk_norm_rope,
    test_more_tiles_of_qk_norm_rope,
    test_non_finite_values_stay_in_their_head_of_qk_norm_rope,
    test_strided_weights_and_angles_of_qk_norm_rope,
)
from test_swiglu import test_more_tiles_of_swiglu, test_special_values_of_swiglu

for kernel in (kernel for op in OPS.values() for kernel in (op.call.fwd, op.call.bwd)):
    if kernel is not None and kernel._triton is not None:
        LIBRARY.impl(kernel.name, kernel.on_cuda, "CPU", allow_override=True)


def test_64_bit_rows_of_qk_norm_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of more tokens than 32 bits count, on fewer."""
    counted = kernels._grid_and_constants
    launches = []

    def with_64_bits(*arguments):
        launches.append(arguments)
        programs, constants = counted(*arguments)
        return programs, constants | {"INDEX": kernels.tl.int64}

    monkeypatch.setattr(kernels, "_grid_and_constants", with_64_bits)
    op = OPS["qk_norm_rope"]
    check_accuracy(op.fused, op.eager, inputs_of(op.name, 2, 5, 3, 8, 2), GRADS)
    assert len(launches) == 2  # so it is Triton that runs here


PIXELS = {
    "pixel_modulate": (pixel_modulate_triton.launch_pixel_modulate_bwd, (2, 70, 13), {}, 2),
    "pixel_mlp": (pixel_mlp_triton.launch_pixel_mlp_bwd, (2, 70, 13, 29), {"kinds": 6}, 4),
    "pixel_mlp of four kinds": (pixel_mlp_triton.launch_pixel_mlp_bwd, (2, 70, 13, 29), {"kinds": 4}, 4),
    # too wide for kernels: the reference, which has to write the same kinds
    "pixel_mlp of wide pixels": (pixel_mlp_triton.launch_pixel_mlp_bwd, (1, 3, 64, 256), {"kinds": 6}, 4),
}


def backward_of_pixels(name: str) -> tuple[Any, tuple[Any, ...], slice]:
    """Launch of backward, its arguments, and which channels of the modulation it writes."""
    launch, shape, options, count = PIXELS[name]
    inputs = inputs_of(name.split()[0], *shape, **options)
    grad = torch.linspace(-1, 1, inputs["x"].numel()).view(inputs["x"].shape)
    d, is_first = shape[2], name == "pixel_modulate"
    written = slice(0, 2 * d) if is_first else slice(inputs["modulation"].shape[2] - count * d, None)
    return launch, (grad, *inputs.values()), written


@pytest.mark.parametrize("name", PIXELS)
def test_gradients_over_the_modulation(name: str) -> None:
    """The bits of gradients of their own; the kinds of the other op stay as they are."""
    launch, arguments, written = backward_of_pixels(name)
    expected = launch(*arguments)
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)][1:]
    before = next(t for t in tensors if t.shape[-1] > arguments[1].shape[-1] and t.dim() == 3)
    modulation = before.clone()
    given = tuple(modulation if argument is before else argument for argument in arguments)
    outputs = tuple(modulation if t is before else torch.full_like(t, float("nan")) for t in tensors)
    launch(*given, outputs=outputs)
    for made, right in zip(outputs, expected, strict=True):
        if made is modulation:
            assert_same_bits(made[..., written], right[..., written])
            others = torch.ones(made.shape[-1], dtype=torch.bool)
            others[written] = False
            assert_same_bits(made[..., others], before[..., others])
            assert not right[..., others].any()
        else:
            assert_same_bits(made, right)


@pytest.mark.parametrize("name", ["pixel_modulate", "pixel_mlp"])
@pytest.mark.parametrize("index", [kernels.tl.int32, kernels.tl.int64], ids=["32 bits", "64 bits"])
def test_several_tiles_of_a_program_of_pixels(name: str, index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many more pixels than programs: all tiles of a program are read, and the last are masked."""
    _, shape, options, _ = PIXELS[name]
    module = pixel_modulate_triton
    counted, tiles = module.grid_and_strides, []

    def chosen(*arguments):
        num_tiles, strides, constants = counted(*arguments)
        tiles.append(num_tiles)
        return num_tiles, strides, constants | {"INDEX": index}

    monkeypatch.setattr(module, "_MAX_PROGRAMS", 2)
    monkeypatch.setattr(module, "grid_and_strides", chosen)
    monkeypatch.setattr(pixel_mlp_triton, "grid_and_strides", chosen)
    op = OPS[name]
    check_accuracy(op.fused, op.eager, inputs_of(name, 3, 71, *shape[2:], **options), op.differentiable)
    assert len(tiles) == 2 and min(tiles) > 2  # forward and backward ran here, with two tiles a program


def test_pixels_are_counted_in_64_bits_where_they_have_to() -> None:
    def index(R: int, Q: int, d: int) -> Any:
        x = torch.empty(R, Q, d, device="meta")
        return pixel_modulate_triton.grid_and_strides(32, x, torch.empty(R, Q, 6 * d, device="meta"))[2][
            "INDEX"
        ]

    assert index(32 * 256, 256, 16) is kernels.tl.int32
    assert index(512 * 256, 256, 16) is kernels.tl.int64
    assert index(2**31 // 96 // 256, 256, 16) is kernels.tl.int64  # the last tiles reach beyond
