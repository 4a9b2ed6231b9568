"""rms_norm_modulate: both norms, weight, bias, and shift and scale per sample or per token."""

import pytest
import torch
from op_testing import DTYPES, Inputs, check_compiles, check_refuses, draw, inputs_of
from pixelgen_kernels import rms_norm_modulate
from pixelgen_kernels.ops.rms_norm_modulate import rms_norm_modulate_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_non_finite_values_stay_in_their_row(norm: str, dtype: torch.dtype) -> None:
    inputs = inputs_of("rms_norm_modulate", 1, 4, 40, norm=norm, dtype=dtype)
    clean = rms_norm_modulate(**inputs)
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs["x"][0, 1, 7] = value
        y = rms_norm_modulate(**inputs)
        assert torch.equal(y.isnan(), rms_norm_modulate_ref(**inputs).isnan())
        assert y[0, 1].isnan().any() and torch.equal(y[0, [0, 2, 3]], clean[0, [0, 2, 3]])


def test_half_precision_extremes() -> None:
    """Subnormals, the largest values and overflow are converted as Torch converts them."""
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        special = [0.0, -0.0, info.max, info.min, info.tiny]
        special += [info.smallest_normal / 2, -info.smallest_normal / 4]
        beyond = [info.max * 2.0, -info.max * 2.0, info.smallest_normal / 1024 * 1.5]
        shift = torch.tensor([*special, *beyond])
        x = torch.zeros(1, 1, shift.numel(), dtype=dtype)
        # x = 0, so y is shift: from fp32 to dtype, and from dtype (fp32 shift of the same value) back
        y = rms_norm_modulate(x, shift[None], torch.zeros(1, shift.numel()))
        assert torch.equal(y.flatten(), shift.to(dtype)), dtype
        rounded = shift.to(dtype)
        y = rms_norm_modulate(x.float(), rounded[None], torch.zeros(1, shift.numel(), dtype=dtype))
        assert torch.equal(y.flatten(), rounded.float()), dtype
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].view(-1, 1024)
    zeros = torch.zeros(halves.shape[0], 1, 1024)
    y = rms_norm_modulate(zeros, halves, torch.zeros_like(halves))
    assert torch.equal(y.squeeze(1), halves.float())
    between = torch.nextafter((halves.float() + halves.float().roll(1, 1)) / 2, torch.tensor(1.0))
    y = rms_norm_modulate(zeros.half(), between, torch.zeros_like(between))
    assert torch.equal(y.squeeze(1), between.half())


@pytest.mark.gpu
def test_more_than_2_31_elements_on_the_gpu() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    T, C, last = 2**31 // 4096 + 64, 4096, 64
    x, grad_y = (torch.randn(1, T, C, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = torch.randn(C, device="cuda")

    def results(x: torch.Tensor, grad_y: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = rms_norm_modulate(leaf, weight=weight)
        return [y.detach(), *torch.autograd.grad(y, leaf, grad_y)]

    ends = [tensor[:, -last:].clone() for tensor in results(x, grad_y)]
    expected = results(x[:, -last:], grad_y[:, -last:])
    assert all(torch.equal(end, rows) for end, rows in zip(ends, expected, strict=True))


@pytest.mark.slow
def test_compiles_on_chunks_made_inside() -> None:
    """The chunks that the compiler makes of a packed projection are read in place too."""

    def block(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        shift, scale = packed.chunk(2, -1)
        return rms_norm_modulate(x, shift, scale)

    inputs: Inputs = {"x": draw(2, 5, 24), "packed": draw(2, 48, seed=1)}
    check_compiles(block, inputs, ["x", "packed"], "inductor")


def test_errors() -> None:
    inputs = inputs_of("rms_norm_modulate", 2, 5, 16, affine="weight and bias")
    spread = draw(2, 3, 4, 16)[:, :, ::2].transpose(0, 1)
    alone: Inputs = {"shift": None, "scale": None}
    refused = {
        "ValueError: norm must be one of rms, layer, got 'batch'": {"norm": "batch"},
        "ValueError: eps must be a finite number above 0, got 0": {"eps": 0},
        "TypeError: x must be a tensor, got list": {"x": [1.0]},
        "TypeError: x must be ... got torch.int64": {"x": torch.ones(2, 5, 16).long()},
        "ValueError: x must be (B, T, C) when shift and scale are given, got (2, 16)": {"x": draw(2, 16)},
        "ValueError: x must have 1 <= C <= 8192": {"x": draw(1, 1, 8193), **alone},
        "ValueError: x must be contiguous in its last dimension": {"x": draw(2, 16, 5).transpose(1, 2)},
        "ValueError: x with more than 3 dimensions must be viewable as (rows, C)": {"x": spread, **alone},
        "ValueError: x must be (..., C)": {"x": torch.tensor(1.0), **alone},
        "ValueError: scale must be given when shift is, got None": {"scale": None},
        "ValueError: shift must be given when scale is, got None": {"shift": None},
        "ValueError: weight must be given when bias is, got None": {"weight": None},
        "ValueError: shift must have shape ... (2, 16) ... (2, 5, 16), got (2, 5)": {"shift": draw(2, 5)},
        "ValueError: scale must have ... got (2, 5, 16)": {"scale": draw(2, 5, 16)},
        "TypeError: scale must have the dtype of shift ... got torch.float16": {"scale": draw(2, 16).half()},
        "ValueError: weight must have shape (C,) = (16,), got (15,)": {"weight": draw(15)},
        "ValueError: bias must have shape (C,) = (16,), got (17,)": {"bias": draw(17)},
        "TypeError: bias must have the dtype of weight ... got torch.float16": {"bias": draw(16).half()},
        "ValueError: weight must be on the device of x": {"weight": torch.ones(16, device="meta")},
        "ValueError: shift must be contiguous in its last dimension": {"shift": draw(16, 2).t()},
    }
    check_refuses(rms_norm_modulate, inputs, refused)
