"""gate_residual_norm_modulate: gate, and shift and scale, each per sample or per token; two outputs."""

import itertools

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

# smallest; odd in every dimension; a real width; several chunks of rows; the widest; no image, no token
SHAPES = [(1, 1, 1), (3, 7, 13), (2, 16, 768), (2, 160, 40), (1, 2, 8192), (0, 4, 8), (2, 0, 8)]
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


def positional(inputs):
    names = ("x", "y", "gate", "shift", "scale", "weight", "bias")
    return [inputs.get(name) for name in names]


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy(variant, norm, dtype, device):
    for shape in SHAPES:
        inputs = make_inputs(shape, variant, norm, dtype, device)
        fn, ref = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
        op_testing.check_accuracy(fn, ref, inputs, grads_of(inputs))


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_chunks_and_mixed_dtypes(variant, norm, device):
    inputs = make_inputs((3, 7, 13), variant, norm, device=device)
    for name in ("y", "gate", "shift", "scale"):
        if name in inputs:
            inputs[name] = op_testing.as_chunk(inputs[name].bfloat16(), parts=6, which=2)
    inputs["x"] = op_testing.as_chunk(inputs["x"], dim=1)
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


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("variant", ["all", "per_token"])
@pytest.mark.parametrize("used", [0, 1])
def test_backward_through_one_output(used, variant, device):
    inputs = make_inputs((2, 3, 5), variant, device=device)

    def one(**arguments):
        return gate_residual_norm_modulate(**arguments)[used]

    def one_ref(**arguments):
        residual, normed = gate_residual_norm_modulate_ref(**arguments)
        return residual + 0 * normed if used == 0 else normed

    op_testing.check_accuracy(one, one_ref, inputs, grads_of(inputs))


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_gradients_of_any_layout(device):
    """Upstream gradients may be expanded, strided or transposed, each in its own way."""
    inputs = make_inputs((2, 5, 16), "all", device=device)
    leaves = [inputs[name].requires_grad_() for name in grads_of(inputs)]
    base = op_testing.draw(2, 5, 16, device=device, seed=8)
    layouts = [
        base[:1, :1, :1].expand(2, 5, 16),
        base[:, :1].expand(2, 5, 16),
        base[:1].expand(2, 5, 16),
        op_testing.as_chunk(base),
        base.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for cotangents in itertools.product(layouts, repeat=2):
        grads = torch.autograd.grad(gate_residual_norm_modulate(**inputs), leaves, cotangents)
        expected = torch.autograd.grad(gate_residual_norm_modulate_ref(**inputs), leaves, cotangents)
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_addresses(variant, device):
    """Rows that start between the multiples of 16 bytes that wide loads need."""
    for odd in ("x", "y", "gate", "scale"):
        inputs = make_inputs((2, 3, 24), variant, "layer", torch.bfloat16, device)
        if odd in inputs:
            tensor = inputs[odd]
            inputs[odd] = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
            fn, ref = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
            op_testing.check_accuracy(fn, ref, inputs, grads_of(inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_the_thread_count(variant):
    inputs = make_inputs((3, 200, 72), variant, "layer", torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outputs, grads = op_testing.run(gate_residual_norm_modulate, inputs, grads_of(inputs))
            results.append([*outputs, *grads.values()])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


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
    op_testing.check_opcheck(_bwd, None, normed, *args[1:], residual, mean, rstd, norm)
    op_testing.check_opcheck(_bwd, normed, None, *args[1:], residual, mean, rstd, norm)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, norm):
    inputs = make_inputs((2, 2, 4), variant, norm)
    op_testing.check_gradcheck(gate_residual_norm_modulate, inputs, grads_of(inputs))


@pytest.mark.parametrize("variant", ["adaln", "bare"])
def test_compile(variant):
    inputs = make_inputs((2, 3, 5), variant)
    op_testing.check_compiles(gate_residual_norm_modulate, inputs, grads_of(inputs))

    def one(**arguments):
        return gate_residual_norm_modulate(**arguments)[1]

    op_testing.check_compiles(one, inputs, grads_of(inputs))


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
