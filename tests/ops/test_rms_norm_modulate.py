"""rms_norm_modulate: both norms, weight, bias, and shift and scale per sample or per token."""

import itertools

import pytest
import torch
from op_testing import (
    DEVICES,
    DTYPES,
    Inputs,
    check_accuracy,
    check_compiles,
    check_refuses,
    draw,
    run,
)
from pixelgen_kernels import rms_norm_modulate
from pixelgen_kernels.cases import chunk
from pixelgen_kernels.ops.rms_norm_modulate import (
    rms_norm_modulate_ref,
)

NORMS = ("rms", "layer")
MODULATIONS = ("none", "per_sample", "per_token")


def make(
    shape: tuple[int, int, int],
    norm: str = "rms",
    modulation: str = "per_sample",
    affine: str = "weight",
    *,
    dtype: torch.dtype = torch.float32,
    modulation_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    strided: bool = False,
) -> tuple[Inputs, list[str]]:
    """Inputs, and the names of those that have gradients. x is off-centre, so that the two norms differ."""
    B, T, C = shape
    view = chunk if strided else lambda tensor: tensor
    x = draw(B, T, C, seed=1) * 2 + 0.5
    inputs: Inputs = {"x": view(x.to(device, dtype)), "norm": norm, "eps": 1e-5}
    names = ["x"]
    if modulation != "none":
        size = (B, C) if modulation == "per_sample" else (B, T, C)
        for seed, name in ((2, "shift"), (3, "scale")):
            inputs[name] = view(draw(*size, dtype=modulation_dtype or dtype, device=device, seed=seed))
            names.append(name)
    if affine != "none":
        inputs["weight"] = 1 + draw(C, dtype=weight_dtype or dtype, device=device, seed=4) / 4
        names.append("weight")
    if affine == "weight_and_bias":
        inputs["bias"] = draw(C, dtype=weight_dtype or dtype, device=device, seed=5)
        names.append("bias")
    return inputs, names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("modulation", ["per_sample", "per_token"])
def test_accuracy_with_mixed_dtypes(modulation: str, device: str) -> None:
    """Each of x, (shift, scale) and (weight, bias) may have any dtype."""
    for dtypes in itertools.product((*DTYPES, torch.float64), repeat=3):
        x_dtype = dtypes[0]
        inputs, names = make(
            (2, 5, 40),
            "layer",
            modulation,
            "weight_and_bias",
            dtype=x_dtype,
            modulation_dtype=dtypes[1],
            weight_dtype=dtypes[2],
            device=device,
        )
        if torch.float64 not in dtypes:
            check_accuracy(rms_norm_modulate, rms_norm_modulate_ref, inputs, names)
        else:  # eager is the oracle itself, or (the arithmetic follows x) fp64 gradients have fp32 accuracy
            (y,), grads = run(rms_norm_modulate, inputs, names)
            (expected,), expected_grads = run(rms_norm_modulate_ref, inputs, names)
            torch.testing.assert_close(y, expected)
            for name in names:
                assert grads[name].dtype == inputs[name].dtype
                torch.testing.assert_close(grads[name].to(x_dtype), expected_grads[name].to(x_dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(device: str) -> None:
    """Without shift and scale x may have any number of dimensions."""
    inputs, names = make((6, 4, 24), modulation="none", device=device)
    x = inputs["x"]
    for shape in ((24,), (24, 24), (2, 3, 4, 24), (1, 6, 1, 4, 24)):
        inputs["x"] = x.flatten()[: torch.Size(shape).numel()].view(shape)
        check_accuracy(rms_norm_modulate, rms_norm_modulate_ref, inputs, names)
    inputs["x"] = chunk(x).unflatten(0, (2, 3))
    check_accuracy(rms_norm_modulate, rms_norm_modulate_ref, inputs, names)
    inputs["x"] = x.transpose(0, 1)  # rows in another order in memory
    check_accuracy(rms_norm_modulate, rms_norm_modulate_ref, inputs, names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_non_finite_values_stay_in_their_row(norm: str, dtype: torch.dtype) -> None:
    inputs, _ = make((1, 4, 40), norm, dtype=dtype)
    clean = rms_norm_modulate(**inputs)
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs["x"] = inputs["x"].clone()
        inputs["x"][0, 1, 7] = value
        y = rms_norm_modulate(**inputs)
        assert torch.equal(y.isnan(), rms_norm_modulate_ref(**inputs).isnan())
        assert y[0, 1].isnan().any() and torch.equal(y[0, [0, 2, 3]], clean[0, [0, 2, 3]])


def test_half_precision_extremes() -> None:
    """Subnormals, the largest values and overflow are converted as Torch converts them."""
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        special = [
            0.0,
            -0.0,
            info.max,
            info.min,
            info.tiny,
            info.smallest_normal / 2,
            -info.smallest_normal / 4,
        ]
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
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_same_bits_every_time_on_the_gpu(modulation: str) -> None:
    inputs, names = make((4, 300, 1024), "layer", modulation, "weight_and_bias", device="cuda")
    first = run(rms_norm_modulate, inputs, names)
    for _ in range(3):
        again = run(rms_norm_modulate, inputs, names)
        assert torch.equal(again[0][0], first[0][0])
        assert all(torch.equal(again[1][name], first[1][name]) for name in names)


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


def test_compiles_on_chunks_made_inside() -> None:
    """The chunks that the compiler makes of a packed projection are read in place too."""

    def block(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        shift, scale = packed.chunk(2, -1)
        return rms_norm_modulate(x, shift, scale)

    inputs: Inputs = {"x": draw(2, 5, 24), "packed": draw(2, 48, seed=1)}
    check_compiles(block, inputs, ["x", "packed"])


def test_refuses() -> None:
    inputs, _ = make((2, 5, 16), affine="weight_and_bias")
    shift = inputs["shift"]
    for error, match, changes in (
        (ValueError, "norm must be one of rms, layer, got 'batch'", {"norm": "batch"}),
        (ValueError, "eps must be a finite number above 0, got 0", {"eps": 0}),
        (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
        (TypeError, r"x must be .*, got torch\.int64", {"x": torch.ones(2, 5, 16).long()}),
        (
            ValueError,
            r"x must be \(B, T, C\) when shift and scale are given, got \(2, 16\)",
            {"x": draw(2, 16)},
        ),
        (ValueError, "x must have 1 <= C <= 8192", {"x": draw(1, 1, 8193), "shift": None, "scale": None}),
        (ValueError, "x must be contiguous in its last dimension", {"x": draw(2, 16, 5).transpose(1, 2)}),
        (ValueError, "scale must be given when shift is, got None", {"scale": None}),
        (ValueError, "shift must be given when scale is, got None", {"shift": None}),
        (ValueError, "weight must be given when bias is, got None", {"weight": None}),
        (ValueError, r"shift must have shape .*\(2, 16\).*\(2, 5, 16\), got \(2, 5\)", {"shift": draw(2, 5)}),
        (ValueError, r"scale must have .*, got \(2, 5, 16\)", {"scale": draw(2, 5, 16)}),
        (
            TypeError,
            r"scale must have the dtype of shift.*, got torch\.bfloat16",
            {"scale": shift.bfloat16()},
        ),
        (ValueError, r"weight must have shape \(C,\) = \(16,\), got \(15,\)", {"weight": draw(15)}),
        (ValueError, r"bias must have shape \(C,\) = \(16,\), got \(17,\)", {"bias": draw(17)}),
        (TypeError, r"bias must have the dtype of weight.*, got torch\.float16", {"bias": draw(16).half()}),
        (ValueError, "weight must be on the device of x", {"weight": torch.ones(16, device="meta")}),
        (ValueError, "shift must be contiguous in its last dimension", {"shift": draw(16, 2).t()}),
    ):
        check_refuses(rms_norm_modulate, inputs, error, f"rms_norm_modulate: {match}", **changes)
    spread = draw(2, 3, 4, 16)[:, :, ::2]
    with pytest.raises(ValueError, match=r"rms_norm_modulate: x .* viewable as \(rows, C\)"):
        rms_norm_modulate(spread.transpose(0, 1))
    with pytest.raises(ValueError, match=r"rms_norm_modulate: x must be \(\.\.\., C\)"):
        rms_norm_modulate(torch.tensor(1.0))
