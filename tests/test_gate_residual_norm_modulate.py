import op_testing
import pytest
import torch
from pixelgen_kernels.gate_residual_norm_modulate import (
    _bwd,
    _fwd,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate_ref

SHAPES = [(1, 1, 1), (3, 7, 13), (2, 16, 768), (0, 4, 8)]
# which of the optional arguments are there, and whether modulation is per token
VARIANTS = {
    "adaln": ("shift", "scale", "weight"),
    "per_token": ("shift", "scale"),
    "affine": ("weight", "bias"),
    "all": ("shift", "scale", "weight", "bias"),
    "bare": (),
}


def make_inputs(shape, variant="adaln", norm="rms", dtype=torch.float32, device="cpu"):
    B, _, C = shape
    row = shape if variant == "per_token" else (B, C)
    drawn = {
        "x": op_testing.draw(*shape, dtype=dtype, device=device, seed=1),
        "y": op_testing.draw(*shape, dtype=dtype, device=device, seed=2),
        "gate": op_testing.draw(*row, dtype=dtype, device=device, seed=3),
        "shift": op_testing.draw(*row, dtype=dtype, device=device, seed=4),
        "scale": op_testing.draw(*row, dtype=dtype, device=device, seed=5),
        "weight": 1 + 0.3 * op_testing.draw(C, device=device, seed=6),
        "bias": op_testing.draw(C, device=device, seed=7),
    }
    keep = ("x", "y", "gate", *VARIANTS[variant])
    return {name: tensor for name, tensor in drawn.items() if name in keep} | {"norm": norm}


def grads_of(inputs):
    return [name for name in inputs if name != "norm"]


def positional(inputs):
    names = ("x", "y", "gate", "shift", "scale", "weight", "bias")
    return [inputs.get(name) for name in names]


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", ["adaln", "per_token", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, variant, norm, dtype, device):
    inputs = make_inputs(shape, variant, norm, dtype, device)
    fn, ref = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
    op_testing.check_accuracy(fn, ref, inputs, grads_of(inputs))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_chunks_and_mixed_dtypes(variant, norm):
    inputs = make_inputs((3, 7, 13), variant, norm)
    for name in ("y", "gate", "shift", "scale"):
        if name in inputs:
            inputs[name] = op_testing.as_chunk(inputs[name].bfloat16(), parts=6, which=2)
    inputs["x"] = op_testing.as_chunk(inputs["x"], dim=1)
    fn, ref = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
    op_testing.check_accuracy(fn, ref, inputs, grads_of(inputs))


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


@pytest.mark.parametrize("used", [0, 1])
def test_backward_through_one_output(used):
    inputs = make_inputs((2, 3, 5), "all")

    def one(**arguments):
        return gate_residual_norm_modulate(**arguments)[used]

    def one_ref(**arguments):
        residual, normed = gate_residual_norm_modulate_ref(**arguments)
        return residual + 0 * normed if used == 0 else normed

    op_testing.check_accuracy(one, one_ref, inputs, grads_of(inputs))


def test_outputs_are_fresh():
    op_testing.check_no_alias(gate_residual_norm_modulate, make_inputs((2, 3, 5), "bare"))


@pytest.mark.parametrize("variant", ["all", "bare", "per_token"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_opcheck(variant, norm):
    args = [a if a is None else a.requires_grad_() for a in positional(make_inputs((2, 3, 5), variant))]
    op_testing.check_opcheck(_fwd, *args, norm, 1e-6)
    args = [a if a is None else a.detach() for a in args]
    args = [op_testing.transposed(a) if a is not None and a.ndim == 3 else a for a in args]
    op_testing.check_opcheck(_fwd, *args, norm, 1e-6)
    residual, normed, mean, rstd = _fwd(*args, norm, 1e-6)
    op_testing.check_opcheck(_bwd, torch.ones_like(normed), normed, *args[1:], residual, mean, rstd, norm)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, norm):
    inputs = make_inputs((2, 2, 4), variant, norm)
    op_testing.check_gradcheck(gate_residual_norm_modulate, inputs, grads_of(inputs))


@pytest.mark.parametrize("variant", ["adaln", "bare"])
def test_compile(variant):
    inputs = make_inputs((2, 3, 5), variant)
    op_testing.check_compiles(gate_residual_norm_modulate, inputs, grads_of(inputs))


def test_double_backward_is_refused():
    inputs = make_inputs((2, 3, 5), "all")
    op_testing.check_double_backward_refused(gate_residual_norm_modulate, inputs, grads_of(inputs))


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
