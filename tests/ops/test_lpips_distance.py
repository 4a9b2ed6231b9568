import pytest
import torch
from op_testing import DEVICES, DTYPES, check_accuracy, check_refuses, draw, in_float64, inputs_of, run
from pixelgen_kernels.ops.lpips_distance import lpips_distance, lpips_distance_ref

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def make(*shape, memory_format=NCHW, **options):
    inputs = inputs_of("lpips_distance", *shape, **options)
    return inputs | {name: inputs[name].to(memory_format=memory_format) for name in ("pred", "target")}


# VGG16's stages, of images of 32 pixels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("stage", [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)])
def test_stages_of_vgg(stage, memory_format, device):
    C, side = stage
    for dtype in DTYPES:
        inputs = make(2, C, side, side, dtype=dtype, device=device, memory_format=memory_format)
        inputs["pred"] = (inputs["pred"] - 0.2).relu()  # some vectors of zeros, as of real images
        check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
def test_nearly_equal_features(memory_format, device):
    """A difference of sums of squares would have no right digit here."""
    inputs = make(2, 64, 8, 8, device=device, memory_format=memory_format)
    inputs["target"] = inputs["pred"] * (1 + 1e-4 * inputs["target"])
    check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred"])


@pytest.mark.parametrize("device", DEVICES)
def test_equal_features_have_distance_zero(device):
    inputs = make(2, 8, 6, 4, device=device)
    inputs["target"] = inputs["pred"].to(memory_format=NHWC)
    (distance,), grads = run(lpips_distance, inputs, ["pred"])
    assert not distance.any()
    assert not grads["pred"].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
def test_nan_and_infinity_stay_in_their_position(memory_format, device):
    inputs = make(4, 8, 6, 4, device=device, memory_format=memory_format)
    clean = lpips_distance(**inputs)
    inputs["pred"][1, 2, 3, 1], inputs["target"][2, 0, 0, 2] = torch.nan, torch.nan
    inputs["pred"][3, 1, 5, 3] = torch.inf
    (distance,), grads = run(lpips_distance, inputs, ["pred"])
    _, expected = run(lpips_distance_ref, inputs, ["pred"])
    assert distance[0] == clean[0]
    assert distance[1:].isnan().all()
    grad = grads["pred"]
    assert grad.is_contiguous(memory_format=memory_format)
    assert grad[1, :, 3, 1].isnan().all() and grad[2, :, 0, 2].isnan().any()
    for each in (grad, expected["pred"]):
        assert (~each.isfinite()).any(1).nonzero().tolist() == [[1, 3, 1], [2, 0, 2], [3, 5, 3]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 512, 4, 4)])
def test_is_the_formula_of_the_lpips_package(shape, device):
    """In float64 to the last digits, in float32 within twice the package's own error."""
    lpips = pytest.importorskip("lpips")
    inputs = make(*shape, device=device)  # without zeros, where the package's own gradient is NaN

    def package(pred, target, weight):
        difference = (lpips.normalize_tensor(pred) - lpips.normalize_tensor(target)) ** 2
        layer = torch.nn.functional.conv2d(difference, weight[None, :, None, None])
        return lpips.spatial_average(layer, keepdim=False)[:, 0]

    both = ["pred", "target"]
    check_accuracy(lpips_distance, package, inputs, both)
    double = in_float64(inputs)
    torch.testing.assert_close(run(lpips_distance, double, both), run(package, double, both))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fn", [lpips_distance, lpips_distance_ref])
def test_zero_features_give_a_finite_distance_and_no_gradient(fn, dtype):
    inputs = make(2, 6, 3, 3, dtype=dtype)
    inputs["pred"][0] = 0
    inputs["pred"][1, :, 1, 2] = 0
    inputs["target"][1, :, 0, 0] = 0
    (distance,), grads = run(fn, inputs, ["pred"])
    assert distance.isfinite().all()
    assert grads["pred"].isfinite().all()
    assert not grads["pred"][0].any()
    assert not grads["pred"][1, :, 1, 2].any()
    assert grads["pred"][1].any()


def test_large_half_precision_features_do_not_overflow():
    inputs = make(2, 64, 3, 3, dtype=torch.float16)
    inputs["pred"] *= 1000  # squares of a few thousand are beyond float16
    (distance,), grads = run(lpips_distance, inputs, ["pred"])
    assert distance.isfinite().all()
    assert grads["pred"].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_either_gradient_alone_in_other_layouts(dtype, device):
    inputs = make(2, 13, 5, 7, dtype=dtype, device=device)
    inputs["target"] = inputs["target"].to(memory_format=NHWC)
    (distance,), both = check_accuracy(lpips_distance, lpips_distance_ref, inputs, ["pred", "target"])
    assert torch.equal(distance, lpips_distance(**inputs))
    for name in both:
        assert torch.equal(run(lpips_distance, inputs, [name])[1][name], both[name])


def test_errors():
    empty, meta = torch.ones(2, 3, 0, 4), torch.ones(2, 3, 4, 4, device="meta")
    shape = "ValueError: target must have shape (B, C, H, W) = (2, 3, 4, 4), got (2, 3, 8, 8)"
    refused = {
        "TypeError: weight must be a tensor, got list": {"weight": [1.0]},
        "TypeError: pred must be float32 ... got torch.uint8": {"pred": torch.zeros(2, 3, 4, 4).byte()},
        "ValueError: pred must have shape (B, C, H, W), got (3, 4, 4)": {"pred": torch.ones(3, 4, 4)},
        shape: {"target": torch.ones(2, 3, 8, 8)},
        "ValueError: weight must have shape (C,) = (3,), got (1, 3, 1, 1)": {"weight": draw(1, 3, 1, 1)},
        "ValueError: eps must be a finite number above 0, got 0": {"eps": 0},
        "ValueError: target must be on the device of pred": {"target": meta},
        "ValueError: C, H and W of at least 1": {"pred": empty, "target": empty},
    }
    check_refuses(lpips_distance, make(2, 3, 4, 4), refused)
