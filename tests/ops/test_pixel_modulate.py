import pytest
import torch
from op_testing import (
    DTYPES,
    OPS,
    Point,
    assert_same_bits,
    check_point,
    check_refuses,
    draw,
    inputs_of,
    run,
)
from pixelgen_kernels.cases import chunk
from pixelgen_kernels.ops.pixel_modulate import pixel_modulate, pixel_modulate_ref

NAMES = ["x", "modulation", "weight"]
PIXELS_PER_CHUNK = 512  # of csrc/ops/pixel_modulate.cpp


def test_is_a_norm_with_a_shift_and_a_scale():
    x, modulation, weight = draw(2, 3, 5), draw(2, 3, 30, seed=1), draw(5, seed=2)
    shift, scale, *_ = modulation.chunk(6, -1)
    normed = torch.nn.functional.rms_norm(x, (5,), weight, 1e-3)
    torch.testing.assert_close(pixel_modulate(x, modulation, weight, eps=1e-3), normed * (1 + scale) + shift)


@pytest.mark.parametrize("pixels", [PIXELS_PER_CHUNK - 1, PIXELS_PER_CHUNK + 1, 3 * PIXELS_PER_CHUNK])
def test_sums_of_several_chunks(pixels):
    """The gradient of the weight, with an end of a chunk inside of a patch."""
    for shape in ((1, pixels, 3), (pixels // 3, 3, 8)):
        check_point(Point(op=OPS["pixel_modulate"], shape=shape))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_special_values_stay_in_their_pixel(dtype):
    for value in (float("nan"), float("inf"), float("-inf"), 1e4, 1e30, 0.0):
        inputs = inputs_of("pixel_modulate", 2, 4, 16, dtype=dtype)
        clean, _ = run(pixel_modulate, inputs)
        inputs["x"][1, 2] = value
        (output,), grads = run(pixel_modulate, inputs, NAMES[:2])
        (expected,), expected_grads = run(pixel_modulate_ref, inputs, NAMES[:2])
        torch.testing.assert_close(output, expected, equal_nan=True)
        torch.testing.assert_close(grads, expected_grads, equal_nan=True)
        others = [i for i in range(8) if i != 6]
        assert_same_bits(output.flatten(0, 1)[others], clean[0].flatten(0, 1)[others])


def test_a_pixel_of_zeros_has_the_shift_alone():
    inputs = inputs_of("pixel_modulate", 1, 2, 4)
    inputs["x"].zero_()
    assert_same_bits(pixel_modulate(**inputs), inputs["modulation"][..., :4])


def test_the_other_kinds_are_not_read():
    inputs = inputs_of("pixel_modulate", 2, 3, 8)
    expected = run(pixel_modulate, inputs, NAMES)
    inputs["modulation"][..., 16:] = float("nan")
    assert_same_bits(run(pixel_modulate, inputs, NAMES), expected)
    assert not expected[1]["modulation"][..., 16:].any()


def test_errors():
    inputs = inputs_of("pixel_modulate", 2, 3, 4)
    refused = {
        "TypeError: x must be a tensor, got list": {"x": [1.0]},
        "TypeError: modulation must be float32 ... got torch.int64": {
            "modulation": torch.ones(2, 3, 24).long()
        },
        "ValueError: modulation must have shape (R, Q, 6 d) = (2, 3, 24), got (2, 3, 16)": {
            "modulation": torch.ones(2, 3, 16)
        },
        "ValueError: weight must have shape (d,) = (4,), got (5,)": {"weight": torch.ones(5)},
        "ValueError: x must have shape (R, Q, d), got (6, 4)": {"x": torch.ones(6, 4)},
        "ValueError: contiguous in its last dimension": {"x": torch.ones(2, 4, 3).transpose(1, 2)},
        "ValueError: the width d of x must be ... 64": {"x": torch.ones(2, 3, 65)},
        "ValueError: eps must be": {"eps": 0.0},
    }
    check_refuses(pixel_modulate, inputs, refused)


def test_reads_a_view_of_a_projection():
    """Patches of a larger tensor, and the projection (R, Q 6 d) as it is."""
    packed = draw(2, 5 * 48)
    x, weight = chunk(draw(4, 5, 8))[:2], draw(8)
    modulation = packed.view(2, 5, 48)
    torch.testing.assert_close(
        pixel_modulate(x, modulation, weight), pixel_modulate_ref(x, modulation, weight)
    )
