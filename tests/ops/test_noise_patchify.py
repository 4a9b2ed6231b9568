import pytest
import torch
from op_testing import (
    DEVICES,
    DTYPES,
    OPS,
    assert_as_accurate,
    check_refuses,
    in_float64,
    inputs_of,
    pairwise,
)
from pixelgen_kernels.cases import LAYOUTS, chunk
from pixelgen_kernels.ops.noise_patchify import noise_patchify, noise_patchify_ref
from pixelgen_kernels.ops.patchify import patchify_ref
from pixelgen_kernels.ops.philox import philox_normal
from test_philox import normal_oracle

OP = OPS["noise_patchify"]
FLOATS = (*DTYPES, torch.float64)


def make(*shape, source="given", channel_order="first", device="cpu"):
    """For a shape (B, C, H, W, P): uint8 images."""
    options = {"source": source, "is_uint8": True, "channel_order": channel_order}
    return inputs_of(OP.name, *shape, device=device, **options)


@pytest.mark.parametrize("shape", OP.shapes, ids=str)
def test_equals_the_reference(shape):
    """Bit for bit on the CPU, whatever the layouts and dtypes of what is read."""
    dtypes = {"image": (torch.uint8, *FLOATS), "noise": FLOATS, "t": FLOATS, "dtype": FLOATS}
    for row in pairwise({"layout": OP.layouts, **dtypes, "order": ("first", "last")}):
        inputs = make(*shape, channel_order=row["order"])
        if row["image"] != torch.uint8:
            inputs["image"] = (inputs["image"] / 127.5 - 1).to(row["image"])
        inputs["noise"] = inputs["noise"].to(row["noise"])
        inputs |= {name: LAYOUTS[row["layout"]](inputs[name]) for name in ("image", "noise")}
        inputs |= {"t": chunk(inputs["t"].to(row["t"])), "dtype": row["dtype"]}
        actual, expected = noise_patchify(**inputs), noise_patchify_ref(**inputs)
        kinds = row["dtype"], torch.promote_types(row["dtype"], torch.float32)
        for got, want, dtype in zip(actual, expected, kinds, strict=True):
            assert got.dtype == dtype and got.is_contiguous()
            assert torch.equal(got, want), row


def test_every_value_of_uint8():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for P in (1, 4, 16):
        arguments = (image, torch.ones(1), P)
        tokens, clean = noise_patchify(*arguments, noise=torch.zeros(1, 1, 16, 16), return_clean=True)
        assert torch.equal(tokens, patchify_ref(image / 127.5 - 1, P))
        assert torch.equal(tokens, clean)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64, 16), (2, 1, 9, 6, 3)])
def test_philox_noise_is_accurate(shape, device):
    """Against the noise in float64, where the reference itself has the noise in fp32."""
    inputs = make(*shape, source="philox", device=device)
    index = inputs["sample_index"].cpu()
    noise = normal_oracle(inputs["seed"], inputs["step"], index, inputs["image"][0].numel())
    given = {"noise": noise.view(shape[:4]).to(device), "seed": None, "sample_index": None}
    oracle = noise_patchify_ref(**{**inputs, **given, "t": inputs["t"].double(), "dtype": torch.float64})
    for results in zip(noise_patchify(**inputs), noise_patchify_ref(**inputs), oracle, strict=True):
        assert_as_accurate(*results)


@pytest.mark.parametrize("channel_order", ["first", "last"])
def test_is_interpolation_and_patchify(channel_order):
    inputs = in_float64(make(3, 3, 4, 6, 2, channel_order=channel_order))
    x_t, clean = noise_patchify(**inputs)
    x = (inputs["image"].double() / 255 - 0.5) / 0.5
    t = inputs["t"].view(-1, 1, 1, 1)
    expected = t * x + (1 - t) * inputs["noise"] * inputs["noise_scale"]
    torch.testing.assert_close(x_t, patchify_ref(expected, 2, channel_order=channel_order))
    other = inputs["clean_channel_order"]
    torch.testing.assert_close(clean, patchify_ref(x, 2, channel_order=other))


def test_extremes_of_uint8_and_of_time():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    noise = torch.full((2, 1, 1, 1), 7.0)
    for t, expected in (((1.0, 0.0), [-1.0, 7.0]), ((1.0, 1.0), [-1.0, 1.0])):
        assert noise_patchify(image, torch.tensor(t), 1, noise=noise).flatten().tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 3, 4, 4, 2), (4, 2, 5, 15, 5), (4, 3, 16, 32, 8)])
def test_philox_noise_does_not_depend_on_the_batch(shape, device):
    index = torch.tensor([9, 2, 7, 0], device=device)
    inputs = make(*shape, source="philox", device=device) | {"sample_index": index, "return_clean": False}
    whole = noise_patchify(**inputs)
    noise = philox_normal(inputs["seed"], 3, index, inputs["image"][0].numel()).view(shape[:4])
    given = {"noise": noise, "seed": None, "sample_index": None}
    assert torch.equal(whole, noise_patchify(**{**inputs, **given}))
    for part in (slice(1, 3), slice(None, None, 2)):
        of_part = {name: inputs[name][part] for name in ("image", "t", "sample_index")}
        assert torch.equal(whole[part], noise_patchify(**{**inputs, **of_part}))
    for change in ({"seed": 6}, {"step": 4}, {"sample_index": index + 1}):
        assert not torch.equal(whole, noise_patchify(**{**inputs, **change}))


def test_errors():
    inputs = make(2, 3, 4, 6, 2)
    image, index, meta = inputs["image"], torch.arange(2), torch.ones(2, 3, 4, 6, device="meta")
    philox = {"noise": None, "seed": 1, "sample_index": index}
    refused = {
        "TypeError: image must be a tensor, got list": {"image": [1]},
        "TypeError: image must be uint8 or floating, got torch.int32": {"image": image.int()},
        "ValueError: image must have shape (B, C, H, W), got (3, 4, 6)": {"image": image[0]},
        "TypeError: t must be float32 ... got torch.int64": {"t": index},
        "ValueError: t must have shape (B,) = (2,), got ()": {"t": torch.tensor(0.5)},
        "ValueError: multiples of patch_size 4, got (4, 6)": {"patch_size": 4},
        "ValueError: patch_size must be between 1": {"patch_size": 0},
        "ValueError: noise or seed must be given, one of them, got neither": {"noise": None},
        "ValueError: noise or seed must be given, one of them, got both": {"seed": 1},
        "ValueError: sample_index must be given with seed": {"noise": None, "seed": 1},
        "ValueError: sample_index must be given with seed and only then": {"sample_index": index},
        "ValueError: noise must have shape (B, C, H, W) = ... got (2, 72)": {"noise": torch.ones(2, 72)},
        "TypeError: sample_index must be int64": {**philox, "sample_index": torch.ones(2)},
        "ValueError: sample_index must have shape (B,) = (2,)": {**philox, "sample_index": torch.arange(3)},
        "ValueError: seed must be between 0": {**philox, "seed": -1},
        "ValueError: noise_scale must be a finite number above 0": {"noise_scale": -1.0},
        "ValueError: channel_order must be one of first, last, got 'chw'": {"channel_order": "chw"},
        "ValueError: clean_channel_order must be one of": {"clean_channel_order": "hwc"},
        "TypeError: step must be an int, got str": {"step": "x"},
        "ValueError: step must be between 0 and ... got -1": {"step": -1},
        "TypeError: dtype must be float32 ... got torch.uint8": {"dtype": torch.uint8},
        "ValueError: noise must be on the device of image": {"noise": meta},
    }
    check_refuses(noise_patchify, inputs, refused)
