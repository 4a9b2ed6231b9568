"""gate_residual_norm_modulate: gate, and shift and scale, each per sample or per token; two outputs."""

import itertools

import pytest
import torch
from op_testing import DEVICES, check_refuses, draw, inputs_of
from pixelgen_kernels.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)
from pixelgen_kernels.ops.rms_norm_modulate import rms_norm_modulate_ref


def make(*shape, **options):
    return inputs_of("gate_residual_norm_modulate", *shape, affine="weight and bias", **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_two_steps(dtype, device):
    """It is the rounded residual that is normalised; far from zero the rounding is most of the variance."""
    inputs = make(2, 5, 1030, norm="layer", dtype=dtype, device=device)
    inputs["x"] = inputs["x"] + (512 if dtype == torch.bfloat16 else 4096)
    residual, normed = gate_residual_norm_modulate(**inputs)
    exact = inputs["x"].double() + inputs["gate"].double()[:, None] * inputs["y"].double()
    assert ((residual.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs()).all()
    rest = {name: value for name, value in inputs.items() if name not in ("x", "y", "gate")}
    torch.testing.assert_close(normed, rms_norm_modulate_ref(residual, **rest))
    assert (normed - rms_norm_modulate_ref(exact, **rest)).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_non_finite_values_stay_in_their_row(norm):
    inputs = make(1, 4, 40, norm=norm)
    clean = gate_residual_norm_modulate(**inputs)
    for name, value in itertools.product(("x", "y"), (float("nan"), float("inf"))):
        broken = {**inputs, name: inputs[name].clone()}
        broken[name][0, 1, 7] = value
        outputs = gate_residual_norm_modulate(**broken)
        expected = gate_residual_norm_modulate_ref(**broken)
        for output, reference, whole in zip(outputs, expected, clean, strict=True):
            assert torch.equal(output.isnan(), reference.isnan())
            assert not output[0, 1].isfinite().all()
            assert torch.equal(output[0, [0, 2, 3]], whole[0, [0, 2, 3]])


@pytest.mark.gpu
def test_more_than_2_31_elements_on_the_gpu():
    if torch.cuda.get_device_properties(0).total_memory < 64 * 2**30:
        pytest.skip("needs 64 GiB of GPU memory")
    T, C, last = 2**31 // 4096 + 64, 4096, 64
    x, y, grad = (torch.randn(1, T, C, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    gate, weight = torch.randn(1, C, device="cuda"), torch.randn(C, device="cuda")

    def results(*rows):
        leaves = [tensor.detach().requires_grad_() for tensor in rows[:2]]
        outputs = gate_residual_norm_modulate(*leaves, gate, weight=weight)
        return [*outputs, *torch.autograd.grad(outputs, leaves, (rows[2], rows[2]))]

    ends = [tensor[:, -last:].clone() for tensor in results(x, y, grad)]
    expected = results(x[:, -last:], y[:, -last:], grad[:, -last:])
    assert all(torch.equal(end, rows) for end, rows in zip(ends, expected, strict=True))


def test_errors():
    wide, meta = torch.ones(1, 1, 8193), torch.ones(5, device="meta")
    refused = {
        "TypeError: x must be a tensor, got int": {"x": 3},
        "TypeError: gate must be float32 ... got torch.int64": {"gate": torch.ones(2, 5).long()},
        "ValueError: x must have shape (B, T, C), got (2, 5)": {"x": draw(2, 5)},
        "ValueError: y must have shape (B, T, C) = (2, 3, 5), got (2, 3, 4)": {"y": draw(2, 3, 4)},
        "ValueError: gate must have shape (B, C) = (2, 5) or ... got (5,)": {"gate": draw(5)},
        "ValueError: shift must have shape (B, C) = (2, 5) or (B, T, C) = ... got (2, 1, 5)": {
            "shift": draw(2, 1, 5)
        },
        "ValueError: scale must have shape ... = (2, 5), got (2, 3, 5)": {"scale": draw(2, 3, 5)},
        "TypeError: scale must have the dtype of shift, torch.float32, got torch.bfloat16": {
            "scale": draw(2, 5, dtype=torch.bfloat16)
        },
        "ValueError: shift must be given when scale is": {"shift": None},
        "ValueError: scale must be given when shift is": {"scale": None},
        "ValueError: weight must have shape (C,) = (5,), got (6,)": {"weight": draw(6)},
        "ValueError: weight must be given when bias is": {"weight": None},
        "TypeError: bias must have the dtype of weight": {"bias": draw(5).half()},
        "ValueError: norm must be one of rms, layer, got 'batch'": {"norm": "batch"},
        "ValueError: eps must be a finite number above 0": {"eps": 0.0},
        "ValueError: y must be contiguous in its last dimension": {"y": draw(2, 5, 3).transpose(1, 2)},
        "ValueError: weight must be on the device of x": {"weight": meta},
        "ValueError: 1 <= C <= 8192": {"x": wide, "y": wide, "gate": wide},
    }
    check_refuses(gate_residual_norm_modulate, make(2, 3, 5), refused)
