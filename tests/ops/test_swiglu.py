import pytest
import torch
from op_testing import DEVICES, DTYPES, check_accuracy, check_refuses, draw, run
from pixelgen_kernels.cases import chunk
from pixelgen_kernels.ops.swiglu import swiglu, swiglu_ref

SPECIAL = [0.0, -0.0, 1e-30, 20.0, -20.0, 88.5, -88.5, 104.0, -104.0, 1e4, -1e4, 1e30, -1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_accuracy_in_the_whole_range(dtype):
    """Also where y is tiny: a sigmoid that lost its relative accuracy would pass `test_accuracy`."""
    a = torch.linspace(-87, 89, 2**16 + 1, dtype=dtype)
    x = torch.stack((a, torch.ones_like(a)), -1)
    oracle = torch.nn.functional.silu(a.double())
    ours, eager = (
        ((fn(x)[:, 0].double() - oracle) / oracle).nan_to_num().abs().max().item()
        for fn in (swiglu, swiglu_ref)
    )
    assert ours <= 2 * eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_special_values_of_swiglu(dtype):
    """Large and non-finite values, in a vector of them and in the rest of a row, as in eager."""
    values = torch.tensor([*SPECIAL, float("inf"), float("-inf"), float("nan")]).to(dtype)
    for a in (values, values[:, None], values.repeat(5)):
        x = torch.cat((a, torch.full_like(a, 0.5)), -1)
        outputs, grads = run(swiglu, {"x": x}, ["x"])
        expected, expected_grads = run(swiglu_ref, {"x": x}, ["x"])
        torch.testing.assert_close(outputs, expected, equal_nan=True)
        torch.testing.assert_close(grads, expected_grads, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_more_tiles_of_swiglu(device):
    """Of Triton: the last columns and the last rows in a tile of their own; four dimensions."""
    for x in (draw(2, 2, 2050), draw(513, 8), draw(2, 5, 3, 10)[:, :1], chunk(draw(2, 3, 4, 10))):
        check_accuracy(swiglu, swiglu_ref, {"x": x.to(device)}, ["x"])


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    x = torch.zeros(2**18 + 1, 2**13, dtype=torch.bfloat16, device="cuda")
    x[-1] = draw(2**13, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(swiglu(x)[-1], swiglu_ref(x[-1]))


def test_is_silu_of_the_first_half_times_the_second():
    x = draw(3, 10, dtype=torch.float64)
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])


def test_errors():
    refused = {
        "TypeError: x must be a tensor, got list": {"x": [1.0, 2.0]},
        "TypeError: x must be float32 ... got torch.int64": {"x": torch.ones(2, 4).long()},
        "ValueError: x must have shape (..., 2 F) with F >= 1, got (2, 5)": {"x": torch.ones(2, 5)},
        "ValueError: with F >= 1, got (2, 0)": {"x": torch.ones(2, 0)},
        "ValueError: with F >= 1, got ()": {"x": torch.ones(())},
        "ValueError: contiguous in its last dimension, got strides": {"x": torch.ones(4, 2).T},
        "ValueError: all but the last two dimensions as one": {"x": torch.ones(3, 2, 2, 4).transpose(0, 1)},
    }
    check_refuses(swiglu, {}, refused)
