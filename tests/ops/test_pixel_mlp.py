from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_testing import (
    DTYPES,
    OPS,
    Point,
    assert_same_bits,
    check_point,
    check_refuses,
    inputs_of,
    run,
)
from pixelgen_kernels.handover import Handover
from pixelgen_kernels.ops.pixel_mlp import pixel_mlp, pixel_mlp_ref
from pixelgen_kernels.ops.pixel_modulate import pixel_modulate

from benchmarks.measure import peak_bytes

OP = OPS["pixel_mlp"]
NAMES = list(OP.differentiable)
PIXELS_PER_CHUNK = 2048  # of csrc/ops/pixel_mlp.cpp
CPU = torch.device("cpu")

mlp_inputs = partial(inputs_of, "pixel_mlp")


def block(x, modulation, weight, handover, **others):
    """Both ops of a pixel block, the first output in the place of the attention's."""
    if modulation.shape[-1] == 4 * x.shape[-1]:
        return pixel_mlp(x, x * weight, modulation, handover=handover, **others)
    normed = pixel_modulate(x, modulation, weight, handover=handover)
    return pixel_mlp(x, normed, modulation, handover=handover, **others)


def block_inputs(*shape, **options):
    inputs = mlp_inputs(*shape, **options)
    inputs["weight"] = inputs.pop("y")[0, 0].clone()
    return inputs


def gradients(inputs, handover):
    """Those of all tensors; the modulation is an intermediate result, as that of a projection is."""
    leaves = {key: t.clone().requires_grad_() for key, t in inputs.items() if torch.is_tensor(t)}
    modulation = leaves["modulation"].clone()
    out = block(**{**inputs, **leaves, "modulation": modulation}, handover=handover)
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, torch.autograd.grad(out, list(leaves.values()), cotangent, retain_graph=True)


def gelu(x):
    """GELU by the op: the norm of a pixel of zeros is its shift."""
    one, zeros = torch.ones_like(x), torch.zeros_like(x)
    modulation = torch.stack((zeros, zeros, zeros, x, zeros, one), -1)[None]
    w = x.new_ones(1)
    zero = x.new_zeros(1)
    pixels = zeros[None, :, None]
    return pixel_mlp(pixels, pixels, modulation, w, w[:, None], zero, w[:, None], zero)[0, :, 0]


def gelu_and_slope(x):
    leaf = x.clone().requires_grad_()
    value = gelu(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_of_gelu(dtype):
    """Half a unit in the last place and an absolute error that eager's has ten times over."""
    x = torch.linspace(-15, 15, 2**18 + 1, dtype=dtype)
    exact = x.double()
    phi = torch.exp(-exact.square() / 2) / (2 * torch.pi) ** 0.5
    tail = torch.special.erfc(-exact / 2**0.5) / 2  # no cancellation where it is small
    value, slope = gelu_and_slope(x)
    atol, rtol = (1e-7, 6e-8) if dtype == torch.float32 else (5e-16, 3e-16)
    torch.testing.assert_close(value.double(), exact * tail, atol=atol, rtol=rtol)
    torch.testing.assert_close(slope.double(), tail + exact * phi, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_of_special_values(dtype):
    """The limits at the infinities, where the formula itself has none: 0 times infinity."""
    inf, nan = float("inf"), float("nan")
    value, slope = gelu_and_slope(torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30, inf, -inf, nan], dtype=dtype))
    torch.testing.assert_close(
        value.double(),
        torch.tensor([0.0, 0.0, 5e-31, 1e30, 0.0, inf, 0.0, nan], dtype=torch.float64),
        rtol=1e-6,
        atol=1e-28,
        equal_nan=True,
    )
    expected = torch.tensor([0.5, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0, nan], dtype=torch.float64)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-6, atol=1e-28, equal_nan=True)


@pytest.mark.parametrize("kinds", [6, 4])
def test_is_the_second_half_of_a_pixel_block(kinds):
    """Written with PyTorch's own layers."""
    inputs = {
        key: t.double() if torch.is_tensor(t) else t for key, t in mlp_inputs(2, 3, 4, 6, kinds=kinds).items()
    }
    x, y, weight, eps = inputs["x"], inputs["y"], inputs["norm_weight"], inputs["eps"]

    def mlp(u):
        hidden = F.gelu(F.linear(u, inputs["fc1_weight"], inputs["fc1_bias"]))
        return F.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"])

    if kinds == 6:
        _, _, gate_attn, shift, scale, gate_mlp = inputs["modulation"].chunk(6, -1)
        r = x + gate_attn * y
        expected = r + gate_mlp * mlp(F.rms_norm(r, (4,), weight, eps) * (1 + scale) + shift)
    else:
        scale_attn, shift_attn, scale, shift = inputs["modulation"].chunk(4, -1)
        r = x + y * (1 + scale_attn) + shift_attn
        expected = r + mlp(F.rms_norm(r, (4,), weight, eps)) * (1 + scale) + shift
    torch.testing.assert_close(pixel_mlp(**inputs), expected)


@pytest.mark.parametrize("kinds", [6, 4])
@pytest.mark.parametrize("pixels", [PIXELS_PER_CHUNK - 1, PIXELS_PER_CHUNK + 33, 2 * PIXELS_PER_CHUNK])
def test_sums_of_several_chunks(pixels, kinds):
    """Gradients of weights, with an end of a chunk inside of a patch, and a last tile that is not full."""
    for shape in ((1, pixels, 3, 5), (pixels // 3, 3, 8, 40)):
        check_point(Point(op=OP, shape=shape, options={"kinds": kinds}))


@pytest.mark.parametrize(("d", "hidden"), [(2, 1), (7, 17), (15, 100), (17, 65), (33, 255), (64, 16)])
def test_any_width(d, hidden):
    """Rows that vectors do not divide."""
    for kinds in (6, 4):
        check_point(Point(op=OP, shape=(3, 11, d, hidden), options={"kinds": kinds}))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kinds", [6, 4])
def test_special_values_stay_in_their_pixel(dtype, kinds):
    for value in (float("nan"), float("inf"), 1e4, 0.0):
        inputs = mlp_inputs(2, 40, 16, 32, kinds=kinds, dtype=dtype)
        (clean,), clean_grads = run(pixel_mlp, inputs, NAMES[:3])
        inputs["x"][1, 2] = value
        (output,), grads = run(pixel_mlp, inputs, NAMES[:3])
        (expected,), _ = run(pixel_mlp_ref, inputs)
        torch.testing.assert_close(output, expected, equal_nan=True)
        others = [i for i in range(80) if i != 42]
        for after, before in [(output, clean), *((grads[key], clean_grads[key]) for key in grads)]:
            assert_same_bits(after.flatten(0, 1)[others], before.flatten(0, 1)[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [6, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 13, 29), (3, 57, 16, 64)])
def test_a_handover_changes_no_bit(shape, kinds, dtype):
    inputs = block_inputs(*shape, kinds=kinds, dtype=dtype)
    out, grads = gradients(inputs, Handover())
    expected_out, expected_grads = gradients(inputs, None)
    assert_same_bits(out, expected_out)
    assert_same_bits(grads, expected_grads)


def test_a_handover_is_for_one_call_of_each_op():
    inputs = block_inputs(2, 3, 8, 16)
    for order in ("twice", "the other way round"):
        handover = Handover()
        modulation = inputs["modulation"].clone().requires_grad_()
        others = {name: value for name, value in inputs.items() if name not in ("x", "modulation", "weight")}
        if order == "twice":
            block(inputs["x"], modulation, inputs["weight"], handover, **others)
        else:
            pixel_mlp(inputs["x"], inputs["x"], modulation, handover=handover, **others)
        with pytest.raises(RuntimeError, match="it is for one call of pixel_modulate, then one of pixel_mlp"):
            pixel_modulate(inputs["x"], modulation, inputs["weight"], handover=handover)
        with pytest.raises(RuntimeError, match="pixel_mlp: this handover has been through pixel_mlp"):
            pixel_mlp(inputs["x"], inputs["x"], modulation, handover=handover, **others)


@pytest.mark.parametrize("kinds", [6, 4])
def test_a_handover_is_good_for_one_backward_pass(kinds):
    inputs = block_inputs(2, 3, 8, 16, kinds=kinds)
    out, _ = gradients(inputs, Handover())
    with pytest.raises(RuntimeError, match="has been used for a backward pass"):
        out.sum().backward()
    again, _ = gradients(inputs, None)
    again.sum().backward()


def test_what_is_handed_over_has_to_be_used():
    inputs = block_inputs(2, 3, 8, 16)
    modulation = inputs["modulation"].requires_grad_()
    normed = pixel_modulate(inputs["x"], modulation, inputs["weight"], handover=Handover())
    with pytest.raises(RuntimeError, match="must be used by pixel_mlp in the same loss"):
        normed.sum().backward()


@pytest.mark.parametrize("kinds", [6, 4])
def test_memory(kinds):
    """Forward makes its output alone: no hidden values, no normalised copy; backward, in addition, one packed
    gradient, and with a handover none."""
    d, pixels = 16, 16 * 256
    inputs = mlp_inputs(16, 256, d, 64, kinds=kinds)
    row = pixels * d * 4  # bytes of a tensor as x
    leaves = {key: inputs[key].requires_grad_() for key in NAMES}
    forward = peak_bytes(CPU, lambda _: pixel_mlp(**inputs))
    assert row <= forward <= 1.3 * row

    def backward(out):
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    def with_handover():
        modulation = inputs["modulation"].clone()
        handover = Handover()
        if kinds == 6:  # gives the carrier
            y = pixel_modulate(inputs["x"], modulation, inputs["norm_weight"], handover=handover)
        else:
            y = inputs["y"].clone()
        return pixel_mlp(**{**inputs, "y": y, "modulation": modulation}, handover=handover)

    plain = peak_bytes(CPU, backward, lambda: pixel_mlp(**inputs))
    # grad_out, gradients of x, y and the modulation; sums and tiles
    assert plain <= (3 + kinds + 0.6) * row, plain / row
    del leaves["y"]
    peak = peak_bytes(CPU, backward, with_handover)
    # grad_out, two gradients of x and their sum, that of y
    assert peak <= (5 + 0.6) * row, peak / row


def test_errors():
    inputs = mlp_inputs(2, 3, 4, 6)
    refused = {
        "TypeError: y must be a tensor, got list": {"y": [1.0]},
        "TypeError: x must be float32 ... got torch.int64": {"x": torch.ones(2, 3, 4).long()},
        "ValueError: y must have shape (R, Q, d) = (2, 3, 4), got (2, 3, 5)": {"y": torch.ones(2, 3, 5)},
        "ValueError: modulation must have shape (R, Q, 6 d) = (2, 3, 24) or (R, Q, 4 d) = (2, 3, 16), got "
        "(2, 3, 20)": {"modulation": torch.ones(2, 3, 20)},
        "ValueError: norm_weight must have shape (d,) = (4,), got (5,)": {"norm_weight": torch.ones(5)},
        "ValueError: fc1_weight must have shape (F, d) = (6, 4), got (6, 5)": {
            "fc1_weight": torch.ones(6, 5)
        },
        "ValueError: fc1_bias must have shape (F,) = (6,), got (7,)": {"fc1_bias": torch.ones(7)},
        "ValueError: fc2_weight must have shape (d, F) = (4, 6), got (6, 4)": {
            "fc2_weight": torch.ones(6, 4)
        },
        "ValueError: fc2_bias must have shape (d,) = (4,), got (6,)": {"fc2_bias": torch.ones(6)},
        "ValueError: fc1_weight must be dense, got strides": {"fc1_weight": torch.ones(6, 8)[:, :4]},
        "ValueError: eps must be": {"eps": -1.0},
    }
    check_refuses(pixel_mlp, inputs, refused)
