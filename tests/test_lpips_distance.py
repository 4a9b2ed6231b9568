import op_testing
import pytest
import torch
from pixelgen_kernels.lpips_distance import _bwd, _fwd, lpips_distance, lpips_distance_ref

SHAPES = [(1, 1, 1, 1), (3, 13, 5, 7), (2, 64, 32, 32), (0, 4, 3, 3)]


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    pred = op_testing.draw(*shape, dtype=dtype, device=device, seed=1).relu()
    target = op_testing.draw(*shape, dtype=dtype, device=device, seed=2).relu()
    return {"pred": pred, "target": target, "weight": op_testing.draw(shape[1], device=device, seed=3).abs()}


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    op_testing.check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred"])
    last = {
        **inputs,
        "pred": inputs["pred"].to(memory_format=torch.channels_last),
        "target": op_testing.as_chunk(inputs["target"], dim=1),
    }
    op_testing.check_accuracy(lpips_distance, lpips_distance_ref, last, ["pred"])


def test_gradient_keeps_the_memory_layout():
    inputs = make_inputs((2, 8, 4, 4))
    inputs["pred"] = inputs["pred"].to(memory_format=torch.channels_last)
    _, grads = op_testing.run(lpips_distance, inputs, ["pred"])
    assert grads["pred"].is_contiguous(memory_format=torch.channels_last)


def test_is_the_formula_of_the_lpips_package():
    lpips = pytest.importorskip("lpips")
    inputs = op_testing.in_float64(make_inputs((3, 6, 5, 4)))
    inputs["pred"] += 0.1  # the package's own gradient is NaN where all features are zero

    def expected(pred, target, weight):
        difference = (lpips.normalize_tensor(pred) - lpips.normalize_tensor(target)) ** 2
        layer = torch.nn.functional.conv2d(difference, weight[None, :, None, None])
        return lpips.spatial_average(layer, keepdim=False)[:, 0]

    outputs, grads = op_testing.run(lpips_distance, inputs, ["pred"])
    expected_outputs, expected_grads = op_testing.run(expected, inputs, ["pred"])
    torch.testing.assert_close(outputs, expected_outputs)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("fn", [lpips_distance, lpips_distance_ref])
def test_zero_features_give_a_finite_distance_and_no_gradient(fn, dtype):
    inputs = make_inputs((2, 6, 3, 3), dtype)
    inputs["pred"][0] = 0
    inputs["pred"][1, :, 1, 2] = 0
    inputs["target"][1, :, 0, 0] = 0
    (distance,), grads = op_testing.run(fn, inputs, ["pred"])
    assert distance.isfinite().all()
    assert grads["pred"].isfinite().all()
    assert not grads["pred"][0].any()
    assert not grads["pred"][1, :, 1, 2].any()
    assert grads["pred"][1].any()


def test_large_half_precision_features_do_not_overflow():
    inputs = make_inputs((2, 64, 3, 3), torch.float16)
    inputs["pred"] *= 1000  # squares of a few thousand are beyond float16
    (distance,), grads = op_testing.run(lpips_distance, inputs, ["pred"])
    assert distance.isfinite().all()
    assert grads["pred"].isfinite().all()


def test_only_pred_has_a_gradient():
    inputs = make_inputs((2, 3, 4, 4))
    for name in ("target", "weight"):
        leaf = inputs[name].clone().requires_grad_()
        assert not lpips_distance(**{**inputs, name: leaf}).requires_grad
        assert not lpips_distance_ref(**{**inputs, name: leaf}).requires_grad


def test_opcheck():
    inputs = make_inputs((2, 3, 4, 5))
    op_testing.check_opcheck(_fwd, inputs["pred"].requires_grad_(), inputs["target"], inputs["weight"], 1e-10)
    inputs = make_inputs((2, 3, 4, 5), torch.bfloat16)
    pred = inputs["pred"].to(memory_format=torch.channels_last)
    op_testing.check_opcheck(_bwd, torch.ones(2), pred, inputs["target"], inputs["weight"], 1e-10)


def test_gradcheck():
    inputs = make_inputs((2, 3, 2, 3))
    inputs["pred"] += 0.1
    op_testing.check_gradcheck(lpips_distance, inputs, ["pred"])


def test_compile():
    op_testing.check_compiles(lpips_distance, make_inputs((2, 3, 4, 5)), ["pred"])


def test_double_backward_is_refused():
    op_testing.check_double_backward_refused(lpips_distance, make_inputs((2, 3, 4, 5)), ["pred"])


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "lpips_distance: weight must be a tensor, got list", {"weight": [1.0]}),
        (
            TypeError,
            "lpips_distance: pred must be float32.*, got torch.uint8",
            {"pred": torch.zeros(2, 3, 4, 4).byte()},
        ),
        (ValueError, r"pred must have shape \(B, C, H, W\), got \(3, 4, 4\)", {"pred": torch.ones(3, 4, 4)}),
        (
            ValueError,
            r"target must have shape \(B, C, H, W\) = \(2, 3, 4, 4\), got \(2, 3, 8, 8\)",
            {"target": torch.ones(2, 3, 8, 8)},
        ),
        (
            ValueError,
            r"weight must have shape \(C,\) = \(3,\), got \(1, 3, 1, 1\)",
            {"weight": torch.ones(1, 3, 1, 1)},
        ),
        (ValueError, "eps must be a finite number above 0, got 0", {"eps": 0}),
        (
            ValueError,
            "target must be on the device of pred",
            {"target": torch.ones(2, 3, 4, 4, device="meta")},
        ),
        (
            ValueError,
            "C, H and W of at least 1",
            {"pred": torch.ones(2, 3, 0, 4), "target": torch.ones(2, 3, 0, 4)},
        ),
    ],
)
def test_errors(error, match, changes):
    op_testing.check_refuses(lpips_distance, make_inputs((2, 3, 4, 4)), error, match, **changes)
