import op_testing
import pytest
import torch
from pixelgen_kernels.pixel_modulate import _bwd, _fwd, pixel_modulate, pixel_modulate_ref
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate_ref

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 11), (1, 4, 256, 16), (0, 2, 4, 8)]
NAMES = ("x", "shift", "scale", "weight", "y", "gate")


def make_inputs(
    shape, dtype=torch.float32, device="cpu", *, gated=True, weight=True, packed=False, norm="rms"
):
    inputs = {"x": op_testing.draw(*shape, dtype=dtype, device=device)}
    for seed, name in enumerate(("shift", "scale", "y", "gate"), 1):
        tensor = op_testing.draw(*shape, dtype=dtype, device=device, seed=seed)
        inputs[name] = op_testing.as_chunk(tensor, parts=6, which=seed) if packed else tensor
    inputs["weight"] = 1 + 0.3 * op_testing.draw(shape[-1], device=device, seed=6)
    dropped = () if gated else ("y", "gate")
    keep = [name for name in NAMES if name not in dropped and (weight or name != "weight")]
    return {name: inputs[name] for name in keep} | {"norm": norm}


def grads_of(inputs):
    return [name for name in inputs if name != "norm"]


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize(("gated", "norm"), [(True, "rms"), (False, "rms"), (True, "layer")])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, gated, norm, dtype, device):
    for packed in (False, True):
        inputs = make_inputs(shape, dtype, device, gated=gated, packed=packed, norm=norm)
        op_testing.check_accuracy(pixel_modulate, pixel_modulate_ref, inputs, grads_of(inputs))


def test_mixed_dtypes():
    inputs = make_inputs((2, 3, 4, 5))
    for name in ("shift", "scale", "gate"):
        inputs[name] = inputs[name].bfloat16()
    op_testing.check_accuracy(pixel_modulate, pixel_modulate_ref, inputs, grads_of(inputs))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_is_a_norm_of_every_pixel_in_the_layout_of_compaction(norm):
    B, T, PP, C = 2, 3, 4, 6
    inputs = make_inputs((B, T, PP, C), norm=norm)
    residual, modulated = pixel_modulate(**inputs)
    torch.testing.assert_close(residual, inputs["x"] + inputs["gate"] * inputs["y"])
    pixels = [tensor.reshape(1, -1, C) for tensor in (residual, inputs["shift"], inputs["scale"])]
    expected = rms_norm_modulate_ref(*pixels, inputs["weight"], norm=norm)
    torch.testing.assert_close(modulated, expected.reshape(B, T, PP * C))
    ungated = make_inputs((B, T, PP, C), gated=False, norm=norm) | {"x": residual}
    assert torch.equal(pixel_modulate(**ungated), modulated)


def test_outputs_are_fresh():
    op_testing.check_no_alias(pixel_modulate, make_inputs((2, 3, 4, 5)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_opcheck(gated, norm):
    inputs = make_inputs((2, 3, 4, 5), gated=gated, weight=gated, packed=True)
    args = [inputs[name].detach().requires_grad_() if name in inputs else None for name in NAMES]
    op_testing.check_opcheck(_fwd, *args, norm, 1e-6)
    args = [a if a is None else a.detach() for a in args]
    args = [op_testing.transposed(a) if a is not None and a.ndim == 4 else a for a in args]
    op_testing.check_opcheck(_fwd, *args, norm, 1e-6)
    residual, modulated, mean, rstd = _fwd(*args, norm, 1e-6)
    rows = residual if gated else args[0]
    op_testing.check_opcheck(_bwd, residual, modulated, *args[1:], rows, mean, rstd, norm)


@pytest.mark.parametrize(("gated", "weight"), [(True, True), (False, False)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradcheck(gated, weight, norm):
    inputs = make_inputs((1, 2, 2, 4), gated=gated, weight=weight, norm=norm)
    op_testing.check_gradcheck(pixel_modulate, inputs, grads_of(inputs))


@pytest.mark.parametrize("gated", [True, False])
def test_compile(gated):
    inputs = make_inputs((2, 3, 4, 5), gated=gated, packed=True)
    op_testing.check_compiles(pixel_modulate, inputs, grads_of(inputs))


def test_double_backward_is_refused():
    inputs = make_inputs((2, 3, 4, 5))
    op_testing.check_double_backward_refused(pixel_modulate, inputs, grads_of(inputs))


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "pixel_modulate: scale must be a tensor, got NoneType", {"scale": None}),
        (TypeError, "x must be float32.*, got torch.int64", {"x": torch.ones(2, 3, 4, 5).long()}),
        (ValueError, r"x must have shape \(B, T, PP, C\), got \(2, 12, 5\)", {"x": torch.ones(2, 12, 5)}),
        (
            ValueError,
            r"shift must have shape \(B, T, PP, C\) = \(2, 3, 4, 5\), got \(2, 5\)",
            {"shift": torch.ones(2, 5)},
        ),
        (ValueError, r"scale must have shape .* = \(2, 3, 4, 5\), got \(2, 5\)", {"scale": torch.ones(2, 5)}),
        (TypeError, "scale must have the dtype of shift", {"scale": torch.ones(2, 3, 4, 5).half()}),
        (ValueError, r"weight must have shape \(C,\) = \(5,\), got \(4,\)", {"weight": torch.ones(4)}),
        (ValueError, "y must be given when gate is", {"y": None}),
        (ValueError, "gate must be given when y is", {"gate": None}),
        (ValueError, r"y must have shape .*, got \(2, 3, 20\)", {"y": torch.ones(2, 3, 20)}),
        (ValueError, r"gate must have shape .*, got \(2, 3, 1, 5\)", {"gate": torch.ones(2, 3, 1, 5)}),
        (
            ValueError,
            "gate must be contiguous in its last dimension",
            {"gate": torch.ones(2, 3, 5, 4).transpose(2, 3)},
        ),
        (ValueError, "norm must be one of rms, layer, got None", {"norm": None}),
        (ValueError, "eps must be a finite number above 0, got inf", {"eps": float("inf")}),
        (ValueError, "gate must be on the device of x", {"gate": torch.ones(2, 3, 4, 5, device="meta")}),
    ],
)
def test_errors(error, match, changes):
    op_testing.check_refuses(pixel_modulate, make_inputs((2, 3, 4, 5)), error, match, **changes)
