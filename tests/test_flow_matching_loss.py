import itertools

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


LAYOUTS = {
    "dense": lambda x: x,
    "chunk": op_testing.as_chunk,
    "without prefix": lambda x: op_testing.as_chunk(x, dim=1),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": op_testing.transposed,
    "every other": lambda x: torch.stack((x, x.new_full(x.shape, torch.nan)), -1).flatten(2)[..., ::2],
    "odd address": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 7, 13), (2, 24, 768), (2, 3, 6000)])  # a chunk has 16384 or 4096
def test_layouts_and_mixed_dtypes(shape, layout, device):
    dtypes = (*op_testing.DTYPES, torch.float64)
    for i, (dtype, x_dtype) in enumerate(itertools.product(dtypes, dtypes)):
        inputs = make_inputs(shape, dtype, device)
        inputs["x_pred"] = LAYOUTS[layout](inputs["x_pred"])
        inputs["x"] = LAYOUTS[layout if i % 2 else "dense"](inputs["x"].to(x_dtype))
        inputs["t"] = op_testing.as_chunk(inputs["t"].to(dtypes[i % 3])[:, None])[:, 0]
        if torch.float64 not in (dtype, x_dtype):
            op_testing.check_accuracy(flow_matching_loss, flow_matching_loss_ref, inputs, ["x_pred"])
        else:  # the reference is no oracle here
            actual = op_testing.run(flow_matching_loss, inputs, ["x_pred"])
            torch.testing.assert_close(actual, op_testing.run(flow_matching_loss_ref, inputs, ["x_pred"]))


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


def test_bits_do_not_depend_on_the_thread_count():
    inputs = make_inputs((3, 50, 768))  # several chunks, the last one shorter
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(op_testing.run(flow_matching_loss, inputs, ["x_pred"]))
    finally:
        torch.set_num_threads(threads)
    for (loss,), grads in results[1:]:
        assert torch.equal(loss, results[0][0][0])
        assert torch.equal(grads["x_pred"], results[0][1]["x_pred"])


def test_outputs_are_fresh():
    inputs = make_inputs((2, 3, 4))
    op_testing.check_no_alias(flow_matching_loss, inputs)
    grad = _bwd(torch.ones(2), inputs["x_pred"], inputs["x"], inputs["t"], 0.05)
    assert grad.is_contiguous()
    assert grad.data_ptr() not in (inputs["x_pred"].data_ptr(), inputs["x"].data_ptr())


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
