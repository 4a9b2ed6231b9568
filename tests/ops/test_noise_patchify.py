import op_testing
import pytest
import torch
from pixelgen_kernels.cases import chunk
from pixelgen_kernels.ops.noise_patchify import noise_patchify, noise_patchify_ref
from pixelgen_kernels.ops.patchify import patchify_ref
from pixelgen_kernels.ops.philox import philox_normal
from test_philox import normal_oracle

SHAPES = [((1, 1, 1, 1), 1), ((3, 3, 10, 15), 5), ((2, 3, 64, 64), 16), ((0, 3, 4, 4), 2)]
# every kind of patch size, channels other than 3, images and patches wider than a piece of a row (512)
MORE_SHAPES = [
    ((2, 1, 9, 6), 3),
    ((1, 4, 7, 14), 7),
    ((2, 3, 8, 24), 8),
    ((1, 2, 12, 20), 4),
    ((1, 3, 2, 1030), 2),
    ((1, 5, 32, 64), 32),
    ((1, 3, 516, 516), 516),
]
LAYOUTS = ["dense", "channels_last", "crop", "transposed", "expanded"]


def make_inputs(shape, patch_size, image_dtype=torch.uint8, device="cpu"):
    B = shape[0]
    image = (op_testing.draw(*shape, device=device, seed=1).sigmoid() * 256).byte()
    return {
        "image": image if image_dtype == torch.uint8 else (image / 127.5 - 1).to(image_dtype),
        "t": torch.linspace(0, 1, B, device=device),
        "patch_size": patch_size,
        "noise": op_testing.draw(*shape, device=device, seed=2),
    }


def in_layout(tensor, layout):
    """The same values (expanded: one value per sample and row) with other strides."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "crop":
        packed = tensor.new_zeros(*tensor.shape[:3], 3 * tensor.shape[3] + 1)
        view = packed[..., 1 : 1 + tensor.shape[3]]
        return view.copy_(tensor)
    if layout == "transposed":
        return tensor.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    if layout == "expanded":
        return tensor[:, :1, :, :1].expand(tensor.shape)
    return tensor


def with_philox(inputs, **arguments):
    B = len(inputs["image"])
    source = {"noise": None, "seed": 5, "step": 3, "sample_index": torch.arange(B, device=inputs["t"].device)}
    return {**inputs, **source, **arguments}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize(("shape", "patch_size"), [*SHAPES, *MORE_SHAPES])
def test_equals_the_reference(shape, patch_size, order, layout):
    """Bit for bit on the CPU, whatever the layouts and dtypes of what is read."""
    other = "last" if order == "first" else "first"
    orders = {"channel_order": order, "clean_channel_order": other, "return_clean": True}
    float_dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    # each dtype of the image once, with another dtype of noise, time and output every time
    for i, image_dtype in enumerate((torch.uint8, *float_dtypes)):
        inputs = make_inputs(shape, patch_size, image_dtype) | orders | {"noise_scale": 1.5}
        inputs["image"] = in_layout(inputs["image"], layout)
        inputs["noise"] = in_layout(inputs["noise"], layout).to(float_dtypes[i % 4])
        inputs["t"] = chunk(inputs["t"].to(float_dtypes[(i + 1) % 4])[:, None])[:, 0]
        for dtype in (float_dtypes[(i + 2) % 4], torch.float32):
            actual = noise_patchify(**inputs, dtype=dtype)
            expected = noise_patchify_ref(**inputs, dtype=dtype)
            for name, got, want in zip(("x_t", "clean"), actual, expected, strict=True):
                assert got.dtype == (dtype if name == "x_t" else torch.promote_types(dtype, torch.float32))
                assert got.is_contiguous()
                assert torch.equal(got, want), f"{name}: image {image_dtype}, output {dtype}"


def test_every_value_of_uint8():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for P in (1, 4, 16):
        arguments = (image, torch.ones(1), P)
        tokens, clean = noise_patchify(*arguments, noise=torch.zeros(1, 1, 16, 16), return_clean=True)
        assert torch.equal(tokens, patchify_ref(image / 127.5 - 1, P))
        assert torch.equal(tokens, clean)


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize(("shape", "patch_size"), [((2, 3, 64, 64), 16), ((2, 1, 9, 6), 3)])
def test_philox_noise_is_accurate(shape, patch_size, device):
    """Against the noise in float64, where the reference itself has the noise in fp32."""
    inputs = with_philox(make_inputs(shape, patch_size, device=device))
    index = inputs["sample_index"].cpu()
    noise = normal_oracle(5, 3, index, shape[1] * shape[2] * shape[3]).view(shape).to(device)
    given = {"noise": noise, "seed": None, "sample_index": None, "dtype": torch.float64}
    oracle = noise_patchify_ref(**{**inputs, **given, "t": inputs["t"].double()})
    actual, eager = noise_patchify(**inputs), noise_patchify_ref(**inputs)
    op_testing.assert_as_accurate(actual, eager, oracle)


@pytest.mark.parametrize("channel_order", ["first", "last"])
@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_is_interpolation_and_patchify(channel_order, noise_scale):
    inputs = op_testing.in_float64(make_inputs((3, 3, 4, 6), 2))
    other = "last" if channel_order == "first" else "first"
    x_t, clean = noise_patchify(
        **inputs,
        noise_scale=noise_scale,
        channel_order=channel_order,
        clean_channel_order=other,
        return_clean=True,
        dtype=torch.float64,
    )
    x = (inputs["image"].double() / 255 - 0.5) / 0.5
    t = inputs["t"].view(-1, 1, 1, 1)
    expected = t * x + (1 - t) * inputs["noise"] * noise_scale
    torch.testing.assert_close(x_t, patchify_ref(expected, 2, channel_order=channel_order))
    torch.testing.assert_close(clean, patchify_ref(x, 2, channel_order=other))


def test_extremes_of_uint8_and_of_time():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    t = torch.tensor([1.0, 0.0])
    tokens = noise_patchify(image, t, 1, noise=torch.full((2, 1, 1, 1), 7.0))
    assert tokens.flatten().tolist() == [-1.0, 7.0]
    assert noise_patchify(image, torch.ones(2), 1, noise=torch.zeros(2, 1, 1, 1)).flatten().tolist() == [
        -1.0,
        1.0,
    ]


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize(
    ("shape", "patch_size"), [((4, 3, 4, 4), 2), ((4, 2, 5, 15), 5), ((4, 3, 16, 32), 8)]
)
def test_philox_noise_does_not_depend_on_the_batch(shape, patch_size, device):
    index = torch.tensor([9, 2, 7, 0], device=device)
    inputs = with_philox(make_inputs(shape, patch_size, device=device), sample_index=index)
    whole = noise_patchify(**inputs)
    noise = philox_normal(5, 3, index, shape[1] * shape[2] * shape[3]).view(shape)
    given = {"noise": noise, "seed": None, "sample_index": None}
    assert torch.equal(whole, noise_patchify(**{**inputs, **given}))
    part = {name: inputs[name][1:3] for name in ("image", "t", "sample_index")}
    assert torch.equal(whole[1:3], noise_patchify(**{**inputs, **part}))
    every_other = {name: inputs[name][::2] for name in ("image", "t", "sample_index")}
    assert torch.equal(whole[::2], noise_patchify(**{**inputs, **every_other}))
    for change in ({"seed": 6}, {"step": 4}, {"sample_index": index + 1}):
        assert not torch.equal(whole, noise_patchify(**{**inputs, **change}))


def test_nothing_has_a_gradient():
    inputs = make_inputs((2, 3, 4, 4), 2, torch.float32)
    for name in ("image", "t", "noise"):
        leaf = {name: inputs[name].clone().requires_grad_()}
        for fn in (noise_patchify, noise_patchify_ref):
            assert not fn(**{**inputs, **leaf}).requires_grad


GOOD = make_inputs((2, 3, 4, 6), 2)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "noise_patchify: image must be a tensor, got list", {"image": [1]}),
        (TypeError, "image must be uint8 or floating, got torch.int32", {"image": GOOD["image"].int()}),
        (ValueError, r"image must have shape \(B, C, H, W\), got \(3, 4, 6\)", {"image": GOOD["image"][0]}),
        (TypeError, "t must be float32.*, got torch.int64", {"t": torch.arange(2)}),
        (ValueError, r"t must have shape \(B,\) = \(2,\), got \(\)", {"t": torch.tensor(0.5)}),
        (ValueError, r"multiples of patch_size 4, got \(4, 6\)", {"patch_size": 4}),
        (ValueError, "patch_size must be between 1", {"patch_size": 0}),
        (ValueError, "noise or seed must be given, one of them, got neither", {"noise": None}),
        (ValueError, "noise or seed must be given, one of them, got both", {"seed": 1}),
        (ValueError, "sample_index must be given with seed", {"noise": None, "seed": 1}),
        (ValueError, "sample_index must be given with seed", {"sample_index": torch.arange(2)}),
        (
            ValueError,
            r"noise must have shape \(B, C, H, W\) = .*, got \(2, 72\)",
            {"noise": torch.ones(2, 72)},
        ),
        (TypeError, "sample_index must be int64", {"noise": None, "seed": 1, "sample_index": torch.ones(2)}),
        (
            ValueError,
            r"sample_index must have shape \(B,\) = \(2,\)",
            {"noise": None, "seed": 1, "sample_index": torch.arange(3)},
        ),
        (ValueError, "seed must be between 0", {"noise": None, "seed": -1, "sample_index": torch.arange(2)}),
        (ValueError, "noise_scale must be a finite number above 0", {"noise_scale": -1.0}),
        (ValueError, "channel_order must be one of first, last, got 'chw'", {"channel_order": "chw"}),
        (ValueError, "clean_channel_order must be one of", {"clean_channel_order": "hwc"}),
        (TypeError, "step must be an int, got str", {"step": "x"}),
        (ValueError, "step must be between 0 and .*, got -1", {"step": -1}),
        (TypeError, "dtype must be float32.*, got torch.uint8", {"dtype": torch.uint8}),
        (
            ValueError,
            "noise must be on the device of image",
            {"noise": torch.ones(2, 3, 4, 6, device="meta")},
        ),
    ],
)
def test_errors(error, match, changes):
    op_testing.check_refuses(noise_patchify, GOOD, error, match, **changes)
