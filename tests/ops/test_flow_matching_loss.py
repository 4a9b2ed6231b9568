import pytest
import torch
from op_testing import DEVICES, check_refuses, in_float64, inputs_of
from pixelgen_kernels.ops.flow_matching_loss import flow_matching_loss


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_stay_in_their_sample(device):
    inputs = inputs_of("flow_matching_loss", 4, 5, 16, device=device)
    clean = flow_matching_loss(**inputs)
    inputs["x_pred"][1, 2, 3], inputs["x"][2, 0, 0] = torch.nan, torch.inf
    inputs["t"][3] = torch.nan
    x_pred = inputs["x_pred"].requires_grad_()
    loss = flow_matching_loss(**inputs)
    assert loss[0] == clean[0]
    assert loss[1].isnan()
    assert loss[2] == torch.inf
    assert loss[3].isnan()
    finite = torch.autograd.grad(loss.sum(), x_pred)[0].isfinite()
    assert finite[0].all()
    assert (~finite[1:3]).nonzero().tolist() == [[0, 2, 3], [1, 0, 0]]
    assert not finite[3].any()


@pytest.mark.parametrize("t_eps", [0.05, 0.3])
def test_is_the_squared_velocity_error(t_eps):
    inputs = in_float64(inputs_of("flow_matching_loss", 4, 5, 6))
    x_pred, x, t = inputs["x_pred"], inputs["x"], inputs["t"]
    x_t = torch.randn_like(x)
    denominator = (1 - t).clamp(min=t_eps)[:, None, None]
    error = (x_pred - x_t) / denominator - (x - x_t) / denominator
    torch.testing.assert_close(flow_matching_loss(**inputs, t_eps=t_eps), (error**2).flatten(1).mean(1))


def test_errors():
    empty, meta = torch.ones(2, 0, 4), torch.ones(2, 3, 4, device="meta")
    refused = {
        "TypeError: x_pred must be a tensor, got float": {"x_pred": 1.0},
        "TypeError: x must be float32 ... got torch.int64": {"x": torch.zeros(2, 3, 4).long()},
        "ValueError: x_pred must have shape (B, T, D), got (2, 3)": {"x_pred": torch.ones(2, 3)},
        "ValueError: x must have shape (B, T, D) = (2, 3, 4), got (2, 4, 3)": {"x": torch.ones(2, 4, 3)},
        "ValueError: t must have shape (B,) = (2,), got (2, 1)": {"t": torch.ones(2, 1)},
        "ValueError: t_eps must be a finite number above 0, got 0.0": {"t_eps": 0.0},
        "TypeError: t_eps must be a number, got str": {"t_eps": "0.05"},
        "ValueError: x must be on the device of x_pred": {"x": meta},
        "ValueError: T >= 1 and D >= 1": {"x_pred": empty, "x": empty},
    }
    check_refuses(flow_matching_loss, inputs_of("flow_matching_loss", 2, 3, 4), refused)
