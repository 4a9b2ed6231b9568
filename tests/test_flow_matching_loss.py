import op_testing
import pytest
import torch
from pixelgen_kernels.flow_matching_loss import _bwd, _fwd, flow_matching_loss, flow_matching_loss_ref

SHAPES = [(1, 1, 1), (3, 7, 13), (2, 256, 768), (0, 4, 12)]


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    x_pred = op_testing.draw(*shape, dtype=dtype, device=device, seed=1)
    x = op_testing.draw(*shape, device=device, seed=2)
    t = torch.linspace(0.1, 1, shape[0], device=device)  # the last sample has 1 - t below t_eps
    return {"x_pred": x_pred, "x": x, "t": t}


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    op_testing.check_accuracy(flow_matching_loss, flow_matching_loss_ref, inputs, ["x_pred"])
    chunked = {
        **inputs,
        "x_pred": op_testing.as_chunk(inputs["x_pred"]),
        "x": op_testing.as_chunk(inputs["x"]),
    }
    op_testing.check_accuracy(flow_matching_loss, flow_matching_loss_ref, chunked, ["x_pred"])


@pytest.mark.parametrize("t_eps", [0.05, 0.3])
def test_is_the_squared_velocity_error(t_eps):
    inputs = op_testing.in_float64(make_inputs((4, 5, 6)))
    x_pred, x, t = inputs["x_pred"], inputs["x"], inputs["t"]
    x_t = torch.randn_like(x)
    denominator = (1 - t).clamp(min=t_eps)[:, None, None]
    error = (x_pred - x_t) / denominator - (x - x_t) / denominator
    torch.testing.assert_close(flow_matching_loss(**inputs, t_eps=t_eps), (error**2).flatten(1).mean(1))


def test_only_x_pred_has_a_gradient():
    inputs = make_inputs((2, 3, 4))
    for name in ("x", "t"):
        leaf = inputs[name].clone().requires_grad_()
        assert not flow_matching_loss(**{**inputs, name: leaf}).requires_grad
        assert not flow_matching_loss_ref(**{**inputs, name: leaf}).requires_grad


def test_opcheck():
    inputs = make_inputs((2, 3, 5))
    x_pred = inputs["x_pred"].requires_grad_()
    op_testing.check_opcheck(_fwd, x_pred, inputs["x"], inputs["t"], 0.05)
    for x_pred in (inputs["x_pred"].detach().bfloat16(), op_testing.transposed(inputs["x_pred"].detach())):
        op_testing.check_opcheck(_bwd, torch.ones(2), x_pred, inputs["x"], inputs["t"], 0.05)


def test_gradcheck():
    op_testing.check_gradcheck(flow_matching_loss, make_inputs((3, 2, 5)), ["x_pred"])


def test_compile():
    op_testing.check_compiles(flow_matching_loss, make_inputs((3, 2, 5)), ["x_pred"])


def test_double_backward_is_refused():
    op_testing.check_double_backward_refused(flow_matching_loss, make_inputs((3, 2, 5)), ["x_pred"])


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "flow_matching_loss: x_pred must be a tensor, got float", {"x_pred": 1.0}),
        (
            TypeError,
            "flow_matching_loss: x must be float32.*, got torch.int64",
            {"x": torch.zeros(2, 3, 4).long()},
        ),
        (
            ValueError,
            r"flow_matching_loss: x_pred must have shape \(B, T, D\), got \(2, 3\)",
            {"x_pred": torch.ones(2, 3)},
        ),
        (
            ValueError,
            r"x must have shape \(B, T, D\) = \(2, 3, 4\), got \(2, 4, 3\)",
            {"x": torch.ones(2, 4, 3)},
        ),
        (ValueError, r"t must have shape \(B,\) = \(2,\), got \(2, 1\)", {"t": torch.ones(2, 1)}),
        (ValueError, "t_eps must be a finite number above 0, got 0.0", {"t_eps": 0.0}),
        (TypeError, "t_eps must be a number, got str", {"t_eps": "0.05"}),
        (ValueError, "x must be on the device of x_pred", {"x": torch.ones(2, 3, 4, device="meta")}),
        (ValueError, "T >= 1 and D >= 1", {"x_pred": torch.ones(2, 0, 4), "x": torch.ones(2, 0, 4)}),
    ],
)
def test_errors(error, match, changes):
    op_testing.check_refuses(flow_matching_loss, make_inputs((2, 3, 4)), error, match, **changes)
