"""gate_residual_norm_modulate: gate, and shift and scale, each per sample or per token; two outputs."""

import itertools

import op_testing
import pytest
import torch
from pixelgen_kernels.cases import chunk
from pixelgen_kernels.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)
from pixelgen_kernels.ops.rms_norm_modulate import rms_norm_modulate_ref

# which of the optional arguments are there
VARIANTS = {
    "adaln": ("shift", "scale", "weight"),
    "per_token": ("shift", "scale"),
    "per_token_gate": ("shift", "scale", "weight"),
    "per_token_modulation": ("shift", "scale", "weight", "bias"),
    "affine": ("weight", "bias"),
    "all": ("shift", "scale", "weight", "bias"),
    "bare": (),
}
PER_TOKEN = {
    "per_token": ("gate", "shift", "scale"),
    "per_token_gate": ("gate",),
    "per_token_modulation": ("shift", "scale"),
}


def make_inputs(shape, variant="adaln", norm="rms", dtype=torch.float32, device="cpu"):
    B, _, C = shape

    def row(name):
        return shape if name in PER_TOKEN.get(variant, ()) else (B, C)

    drawn = {
        "x": op_testing.draw(*shape, dtype=dtype, device=device, seed=1),
        "y": op_testing.draw(*shape, dtype=dtype, device=device, seed=2),
        "gate": op_testing.draw(*row("gate"), dtype=dtype, device=device, seed=3),
        "shift": op_testing.draw(*row("shift"), dtype=dtype, device=device, seed=4),
        "scale": op_testing.draw(*row("scale"), dtype=dtype, device=device, seed=5),
        "weight": 1 + 0.3 * op_testing.draw(C, device=device, seed=6),
        "bias": op_testing.draw(C, device=device, seed=7),
    }
    keep = ("x", "y", "gate", *VARIANTS[variant])
    return {name: tensor for name, tensor in drawn.items() if name in keep} | {"norm": norm}


def grads_of(inputs):
    return [name for name in inputs if name != "norm"]


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_chunks_and_mixed_dtypes(variant, norm, device):
    inputs = make_inputs((3, 7, 13), variant, norm, device=device)
    for name in ("y", "gate", "shift", "scale"):
        if name in inputs:
            inputs[name] = chunk(inputs[name].bfloat16())
    inputs["x"] = chunk(inputs["x"], dim=1)
    fn, ref = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
    op_testing.check_accuracy(fn, ref, inputs, grads_of(inputs))


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("x_dtype", [*op_testing.DTYPES, torch.float64])
def test_any_mixture_of_dtypes(x_dtype, device):
    """y, gate, (shift, scale) and (weight, bias) have dtypes of their own."""
    dtypes = (*op_testing.DTYPES, torch.float64)
    fn, ref = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
    for y, turn, variant in itertools.product(range(4), range(4), ("all", "per_token_gate", "per_token")):
        inputs = make_inputs((2, 5, 40), variant, "layer", x_dtype, device)
        for offset, names in enumerate((("y",), ("gate",), ("shift", "scale"), ("weight", "bias"))):
            for name in names:
                if name in inputs:
                    inputs[name] = inputs[name].to(dtypes[(y + offset * turn) % 4])
        names = grads_of(inputs)
        outputs, grads = op_testing.run(fn, inputs, names)
        eager, eager_grads = op_testing.run(ref, inputs, names)
        oracle, oracle_grads = op_testing.run(ref, op_testing.in_float64(inputs), names)
        assert all(grads[name].dtype == inputs[name].dtype for name in names)
        if x_dtype == torch.float64:  # eager is the oracle itself, down to the last bit
            torch.testing.assert_close([*outputs, *grads.values()], [*eager, *eager_grads.values()])
            continue
        for results in (
            *zip(outputs, eager, oracle, strict=True),
            *((grads[name], eager_grads[name], oracle_grads[name]) for name in names),
        ):
            # the arithmetic follows x: gradients in fp64 have the accuracy of fp32
            actual = results[0].float() if results[0].dtype == torch.float64 else results[0]
            op_testing.assert_as_accurate(actual, *results[1:])


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_two_steps(dtype, device):
    """It is the rounded residual that is normalised; far from zero the rounding is most of the variance."""
    inputs = make_inputs((2, 5, 1030), "all", "layer", dtype, device)
    inputs["x"] = inputs["x"] + (512 if dtype == torch.bfloat16 else 4096)
    residual, normed = gate_residual_norm_modulate(**inputs)
    exact = inputs["x"].double() + inputs["gate"].double()[:, None] * inputs["y"].double()
    assert ((residual.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs()).all()
    rest = {name: inputs[name] for name in ("shift", "scale", "weight", "bias", "norm")}
    torch.testing.assert_close(normed, rms_norm_modulate_ref(residual, **rest))
    assert (normed - rms_norm_modulate_ref(exact, **rest)).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_non_finite_values_stay_in_their_row(norm):
    inputs = make_inputs((1, 4, 40), "all", norm)
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_every_time_on_the_gpu(variant):
    inputs = make_inputs((4, 300, 1152), variant, "layer", torch.bfloat16, "cuda")
    results = []
    for _ in range(3):
        outputs, grads = op_testing.run(gate_residual_norm_modulate, inputs, grads_of(inputs))
        results.append([*outputs, *grads.values()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


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


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "gate_residual_norm_modulate: x must be a tensor, got int", {"x": 3}),
        (TypeError, "gate must be float32.*, got torch.int64", {"gate": torch.ones(2, 5).long()}),
        (ValueError, r"x must have shape \(B, T, C\), got \(2, 5\)", {"x": torch.ones(2, 5)}),
        (
            ValueError,
            r"y must have shape \(B, T, C\) = \(2, 3, 5\), got \(2, 3, 4\)",
            {"y": torch.ones(2, 3, 4)},
        ),
        (ValueError, r"gate must have shape \(B, C\) = \(2, 5\) or .*, got \(5,\)", {"gate": torch.ones(5)}),
        (
            ValueError,
            r"shift must have shape \(B, C\) = \(2, 5\) or \(B, T, C\) = .*, got \(2, 1, 5\)",
            {"shift": torch.ones(2, 1, 5)},
        ),
        (ValueError, r"scale must have shape .* = \(2, 5\), got \(2, 3, 5\)", {"scale": torch.ones(2, 3, 5)}),
        (
            TypeError,
            "scale must have the dtype of shift, torch.float32, got torch.bfloat16",
            {"scale": torch.ones(2, 5).bfloat16()},
        ),
        (ValueError, "shift must be given when scale is", {"shift": None}),
        (ValueError, "scale must be given when shift is", {"scale": None}),
        (ValueError, r"weight must have shape \(C,\) = \(5,\), got \(6,\)", {"weight": torch.ones(6)}),
        (ValueError, "weight must be given when bias is", {"weight": None}),
        (TypeError, "bias must have the dtype of weight", {"bias": torch.ones(5).half()}),
        (ValueError, "norm must be one of rms, layer, got 'batch'", {"norm": "batch"}),
        (ValueError, "eps must be a finite number above 0", {"eps": 0.0}),
        (
            ValueError,
            "y must be contiguous in its last dimension",
            {"y": torch.ones(2, 5, 3).transpose(1, 2)},
        ),
        (ValueError, "weight must be on the device of x", {"weight": torch.ones(5, device="meta")}),
        (ValueError, "1 <= C <= 8192", {name: torch.ones(1, 1, 8193) for name in ("x", "y", "gate")}),
    ],
)
def test_errors(error, match, changes):
    inputs = make_inputs((2, 3, 5), "all")
    op_testing.check_refuses(gate_residual_norm_modulate, inputs, error, match, **changes)
