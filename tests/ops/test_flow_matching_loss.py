import op_testing
import pytest
import torch
from pixelgen_kernels.ops.flow_matching_loss import flow_matching_loss, flow_matching_loss_ref


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    x_pred = op_testing.draw(*shape, dtype=dtype, device=device, seed=1)
    x = op_testing.draw(*shape, device=device, seed=2)
    t = torch.linspace(0.1, 1, shape[0], device=device)  # the last sample has 1 - t below t_eps
    return {"x_pred": x_pred, "x": x, "t": t}


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_expanded_tensors(device):
    """Strides of 0: one x for all samples, and the gradient of a sum."""
    inputs = make_inputs((3, 4, 16), device=device)
    inputs["x"] = inputs["x"][:1].expand(3, 4, 16)
    x_pred = inputs["x_pred"].requires_grad_()
    grads = [
        torch.autograd.grad(fn(**inputs).sum(), x_pred)[0]
        for fn in (flow_matching_loss, flow_matching_loss_ref)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_nan_and_infinity_stay_in_their_sample(device):
    inputs = make_inputs((4, 5, 16), device=device)
    clean = flow_matching_loss(**inputs)
    inputs["x_pred"][1, 2, 3], inputs["x"][2, 0, 0] = torch.nan, torch.inf
    inputs["t"][3] = torch.nan
    x_pred = inputs["x_pred"].requires_grad_()
    loss = flow_matching_loss(**inputs)
    assert loss[0] == clean[0]
    assert loss[1].isnan()
    assert loss[2] == torch.inf
    assert loss[3].isnan()
    grad = torch.autograd.grad(loss.sum(), x_pred)[0]
    finite = grad.isfinite()
    assert finite[0].all()
    assert (~finite[1:3]).nonzero().tolist() == [[0, 2, 3], [1, 0, 0]]
    assert not finite[3].any()


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
