import pytest
import torch
from pixelgen_kernels import rms_norm_modulate
from pixelgen_kernels._checks import (
    check_dense_rows,
    check_float_tensors,
    check_int,
    check_norm_arguments,
    check_positive,
    check_shape,
    register_autograd,
    stats_dtype,
)
from torch.autograd import forward_ad


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_only_finite_numbers_above_zero(value):
    with pytest.raises(ValueError, match="op: eps must be a finite number above 0, got"):
        check_positive("op", "eps", value)


@pytest.mark.parametrize("value", [1e39, 10**400], ids=["float", "int"])
def test_only_numbers_that_float32_holds(value):
    with pytest.raises(ValueError, match="op: eps must be a number that float32 holds, got"):
        check_positive("op", "eps", value)


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_only_numbers(value):
    with pytest.raises(TypeError, match="op: eps must be a number, got"):
        check_positive("op", "eps", value)
    with pytest.raises(TypeError, match="op: count must be an int, got"):
        check_int("op", "count", value, 0)


def test_rows_are_dense():
    x = torch.ones(3, 4)
    check_dense_rows("op", x=x[:, 1:3], row=torch.ones(()), column=x[:, :1].T.T, missing=None)
    for strided in (x.T, x[:, ::2], x[:, :1].expand(3, 4)):
        with pytest.raises(ValueError, match="op: x must be contiguous in its last dimension, got strides"):
            check_dense_rows("op", x=strided)


def test_shapes():
    check_shape("op", "x", torch.ones(2, 3), (2, 3), "B, C")
    check_shape("op", "x", torch.ones(2, 3), torch.Size((2, 3)), "B, C")
    with pytest.raises(ValueError, match=r"op: x must have shape \(B, C\) = \(3, 2\), got \(2, 3\)"):
        check_shape("op", "x", torch.ones(2, 3), (3, 2), "B, C")


def test_devices_and_dtypes():
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"op: y must be on the device of x \(cpu\), got meta"):
        check_float_tensors("op", x=x, y=x.to("meta"))
    with pytest.raises(TypeError, match=r"op: y must be float32, .*, got torch.int64"):
        check_float_tensors("op", x=x, y=x.long())
    assert stats_dtype(x, None) == torch.float32
    assert stats_dtype(None, x.half(), x.double()) == torch.float64


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "weight must be a tensor, got float", {"weight": 1.0}),
        (TypeError, "shift must be float32, .*, got torch.int32", {"shift": torch.ones(2, 4).int()}),
        (ValueError, "scale must be on the device of x", {"scale": torch.ones(2, 4, device="meta")}),
        (ValueError, "shift must be contiguous in its last", {"shift": torch.ones(4, 2).T}),
        (ValueError, r"weight must have shape \(C,\) = \(4,\), got \(\)", {"weight": torch.ones(())}),
        (ValueError, r"bias must have shape \(C,\) = \(4,\), got \(5,\)", {"bias": torch.ones(5)}),
        (TypeError, "bias must have the dtype of weight", {"bias": torch.ones(4).half()}),
        (ValueError, "weight must be given when bias is", {"weight": None}),
        (ValueError, "scale must be given when shift is", {"scale": None}),
        (ValueError, r"shift must have shape \(B, C\) = \(2, 4\), got \(2, 3\)", {"shift": torch.ones(2, 3)}),
        (ValueError, r"scale must have shape .* = \(2, 4\), got \(4,\)", {"scale": torch.ones(4)}),
        (TypeError, "scale must have the dtype of shift", {"scale": torch.ones(2, 4).half()}),
        (ValueError, "norm must be one of rms, layer, got 'batch'", {"norm": "batch"}),
    ],
)
def test_norm_arguments(error, match, changes):
    arguments = dict.fromkeys(("shift", "scale"), torch.ones(2, 4)) | {"norm": "rms", "eps": 1e-6}
    arguments |= {"weight": torch.ones(4), "bias": torch.ones(4)}
    shapes = {"B, C": (2, 4)}
    check_norm_arguments("op", torch.ones(2, 3, 4), **arguments, modulation_shapes=shapes)
    with pytest.raises(error, match=f"op: {match}"):
        check_norm_arguments("op", torch.ones(2, 3, 4), **arguments | changes, modulation_shapes=shapes)


def test_gradients_only_where_they_are_wanted():
    def backward(ctx, grad):
        return grad * ctx.factor, None

    def setup_context(ctx, inputs, output):
        _, ctx.factor = inputs

    @torch.library.custom_op("pixelgen_test::scale", mutates_args=())
    def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    call = register_autograd(scale, backward, setup_context)
    x = torch.ones(3, requires_grad=True)
    for function in (call, scale):  # what is returned, and the op
        (grad,) = torch.autograd.grad(function(x, 2.0).sum(), x)
        assert grad.tolist() == [2.0] * 3
        assert not function(x.detach(), 2.0).requires_grad
        with torch.no_grad():
            assert not function(x, 2.0).requires_grad


@pytest.mark.parametrize("derivative", [torch.func.grad, lambda fn: lambda x: torch.func.jvp(fn, (x,), (x,))])
def test_functional_derivatives_are_refused(derivative):
    def total(x):
        return rms_norm_modulate(x).sum()

    with pytest.raises(
        RuntimeError, match=r"rms_norm_modulate: torch.func and forward-mode .* not supported"
    ):
        derivative(total)(torch.ones(2, 3, 4))


def test_forward_mode_is_refused():
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"rms_norm_modulate: .* not supported"):
        rms_norm_modulate(forward_ad.make_dual(torch.ones(2, 3, 4), torch.ones(2, 3, 4)))
