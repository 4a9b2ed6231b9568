import op_testing
import pytest
import torch
from pixelgen_kernels.ops.lpips_distance import lpips_distance, lpips_distance_ref


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    pred = op_testing.draw(*shape, dtype=dtype, device=device, seed=1).relu()
    target = op_testing.draw(*shape, dtype=dtype, device=device, seed=2).relu()
    return {"pred": pred, "target": target, "weight": op_testing.draw(shape[1], device=device, seed=3).abs()}


# VGG16's stages, of images of 32 pixels
@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stage", [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)])
def test_stages_of_vgg(stage, memory_format, dtype, device):
    C, side = stage
    inputs = make_inputs((2, C, side, side), dtype, device)
    inputs |= {name: inputs[name].to(memory_format=memory_format) for name in ("pred", "target")}
    op_testing.check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred"])


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nearly_equal_features(memory_format, device):
    """A difference of sums of squares would have no right digit here."""
    inputs = make_inputs((2, 64, 8, 8), device=device)
    inputs["target"] = inputs["pred"] * (1 + 1e-4 * inputs["target"])
    inputs |= {name: inputs[name].to(memory_format=memory_format) for name in ("pred", "target")}
    op_testing.check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred"])


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_equal_features_have_distance_zero(device):
    inputs = make_inputs((2, 8, 6, 4), device=device)
    inputs["target"] = inputs["pred"].to(memory_format=torch.channels_last)
    (distance,), grads = op_testing.run(lpips_distance, inputs, ["pred"])
    assert not distance.any()
    assert not grads["pred"].any()


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_expanded_tensors(device):
    """Strides of 0: one target for all samples, one pred for all columns, and the gradient of a sum."""
    inputs = make_inputs((3, 4, 5, 6), device=device)
    inputs["target"] = inputs["target"][:1].expand(3, 4, 5, 6)
    inputs["pred"] = inputs["pred"][..., :1].expand(3, 4, 5, 6)
    pred = inputs["pred"].requires_grad_()
    grads = [torch.autograd.grad(fn(**inputs).sum(), pred)[0] for fn in (lpips_distance, lpips_distance_ref)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nan_and_infinity_stay_in_their_position(memory_format, device):
    inputs = make_inputs((4, 8, 6, 4), device=device)
    inputs |= {name: inputs[name].to(memory_format=memory_format) for name in ("pred", "target")}
    clean = lpips_distance(**inputs)
    inputs["pred"][1, 2, 3, 1], inputs["target"][2, 0, 0, 2] = torch.nan, torch.nan
    inputs["pred"][3, 1, 5, 3] = torch.inf
    pred = inputs["pred"].requires_grad_()
    distance = lpips_distance(**inputs)
    assert distance[0] == clean[0]
    assert distance[1:].isnan().all()
    grad = torch.autograd.grad(distance.sum(), pred)[0]
    expected = torch.autograd.grad(lpips_distance_ref(**inputs).sum(), pred)[0]
    assert grad[0].isfinite().all()
    assert grad[1, :, 3, 1].isnan().all() and grad[2, :, 0, 2].isnan().any()
    is_spoilt = torch.zeros(4, 6, 4, dtype=torch.bool)
    is_spoilt[1, 3, 1] = is_spoilt[2, 0, 2] = is_spoilt[3, 5, 3] = True
    for each in (grad, expected):
        assert torch.equal((~each.isfinite()).any(1).cpu(), is_spoilt)


def test_gradient_keeps_the_memory_layout():
    inputs = make_inputs((2, 8, 4, 4))
    inputs["pred"] = inputs["pred"].to(memory_format=torch.channels_last)
    _, grads = op_testing.run(lpips_distance, inputs, ["pred"])
    assert grads["pred"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 512, 4, 4)])
def test_is_the_formula_of_the_lpips_package(shape, device):
    """In float64 to the last digits, in float32 within twice the package's own error."""
    lpips = pytest.importorskip("lpips")
    inputs = make_inputs(shape, device=device)
    inputs["pred"] += 0.1  # the package's own gradient is NaN where all features are zero

    def package(pred, target, weight):
        difference = (lpips.normalize_tensor(pred) - lpips.normalize_tensor(target)) ** 2
        layer = torch.nn.functional.conv2d(difference, weight[None, :, None, None])
        return lpips.spatial_average(layer, keepdim=False)[:, 0]

    op_testing.check_accuracy(lpips_distance, package, inputs, ["pred", "target"])
    double = op_testing.in_float64(inputs)
    actual = op_testing.run(lpips_distance, double, ["pred", "target"])
    torch.testing.assert_close(actual, op_testing.run(package, double, ["pred", "target"]))


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


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
def test_target_has_a_gradient_if_it_requires_one(dtype, device):
    inputs = make_inputs((2, 13, 5, 7), dtype, device)
    inputs["target"] = inputs["target"].to(memory_format=torch.channels_last)
    op_testing.check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred", "target"])
    (distance,), both = op_testing.run(lpips_distance, inputs, ["pred", "target"])
    assert torch.equal(distance, lpips_distance(**inputs))
    for name in ("pred", "target"):
        _, one = op_testing.run(lpips_distance, inputs, [name])
        assert torch.equal(one[name], both[name])
    with torch.no_grad():
        assert not lpips_distance(**{**inputs, "target": inputs["target"].requires_grad_()}).requires_grad


@pytest.mark.parametrize("fn", [lpips_distance, lpips_distance_ref])
def test_weight_has_no_gradient(fn):
    inputs = make_inputs((2, 3, 4, 4))
    inputs["weight"].requires_grad_()
    assert not fn(**inputs).requires_grad


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
