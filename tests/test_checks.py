import pytest
import torch
from pixelgen_kernels import checks
from pixelgen_kernels.checks import stats_dtype


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_only_finite_numbers_above_zero(value):
    with pytest.raises(ValueError, match="op: eps must be a finite number above 0, got"):
        checks.positive("op", "eps", value)


@pytest.mark.parametrize("value", [1e39, 10**400], ids=["float", "int"])
def test_only_numbers_that_float32_holds(value):
    with pytest.raises(ValueError, match="op: eps must be a number that float32 holds, got"):
        checks.positive("op", "eps", value)


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_only_numbers(value):
    with pytest.raises(TypeError, match="op: eps must be a number, got"):
        checks.positive("op", "eps", value)
    with pytest.raises(TypeError, match="op: count must be an int, got"):
        checks.integer("op", "count", value, 0)


def test_rows_are_dense():
    x = torch.ones(3, 4)
    checks.dense_rows("op", x=x[:, 1:3], row=torch.ones(()), column=x[:, :1].T.T, missing=None)
    for strided in (x.T, x[:, ::2], x[:, :1].expand(3, 4)):
        with pytest.raises(ValueError, match="op: x must be contiguous in its last dimension, got strides"):
            checks.dense_rows("op", x=strided)


def test_shapes():
    checks.shape("op", "x", torch.ones(2, 3), (2, 3), "B, C")
    checks.shape("op", "x", torch.ones(2, 3), torch.Size((2, 3)), "B, C")
    with pytest.raises(ValueError, match=r"op: x must have shape \(B, C\) = \(3, 2\), got \(2, 3\)"):
        checks.shape("op", "x", torch.ones(2, 3), (3, 2), "B, C")


def test_devices_and_dtypes():
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"op: y must be on the device of x \(cpu\), got meta"):
        checks.floats("op", x=x, y=x.to("meta"))
    with pytest.raises(TypeError, match=r"op: y must be float32, .*, got torch.int64"):
        checks.floats("op", x=x, y=x.long())
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
    checks.norm_arguments("op", torch.ones(2, 3, 4), **arguments, modulation_shapes=shapes)
    with pytest.raises(error, match=f"op: {match}"):
        checks.norm_arguments("op", torch.ones(2, 3, 4), **arguments | changes, modulation_shapes=shapes)
