"""ADM's crops against their definition, and the quicker one against both."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen.data.crop import center_crop, halve, near_center_crop, random_crop


def _image(width, height, seed=0, mode="RGB"):
    bands = len(mode) if mode == "RGB" else 1
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels)


def _resized(image, short):
    """ADM's two steps, as published: halve with a box filter, then one bicubic resize."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    return np.array(image.resize(sides, Image.Resampling.BICUBIC)).reshape(sides[1], sides[0], -1)


SIDES = [
    (37, 21),
    (21, 37),
    (64, 64),
    (200, 150),  # halved, both sides even
    (201, 153),
    (150, 201),
    (260, 41),
    (41, 260),  # so tall that Pillow filters the columns first
    (66, 871),
    (64, 300),
    (5, 3),
]


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        *((sides, size) for sides in SIDES for size in (1, 13, 32)),
        *(((11, 9), 8), ((20, 8), 5), ((12, 8), 5)),  # long sides of 9.8, of 12.5 and 7.5: to the even side
        *(((1, 1), 8), ((3, 200), 8), ((8, 8), 8)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_center_crop_is_the_definition_to_the_bit(sides, size, mode):
    image = _image(*sides, mode=mode)
    whole = _resized(image, size)
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    np.testing.assert_array_equal(
        center_crop(image, size), whole[top : top + size, left : left + size], strict=True
    )


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("draws", [(0, 0, 0), (0.3, 0.6, 0.2), (0.999999, 0.999999, 0.999999)])
def test_random_crop_is_a_square_of_the_resized_image(sides, draws):
    size = 13
    image = _image(*sides)
    short = size + math.floor(draws[0] * (math.ceil(size / 0.8) - size + 1))
    whole = _resized(image, short)
    top = math.floor(draws[1] * (whole.shape[0] - size + 1))
    left = math.floor(draws[2] * (whole.shape[1] - size + 1))
    got = random_crop(image, size, np.array(draws))
    np.testing.assert_array_equal(got, whole[top : top + size, left : left + size], strict=True)


def test_random_crop_reaches_every_length_row_and_column():
    ramp = np.arange(40, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (40, 40)).copy())
    draws = np.random.default_rng(0).random((400, 3)).astype(np.float32)
    spans, lefts = set(), set()
    for draw in draws:
        row = random_crop(image, 40, draw)[0, :, 0].astype(int)
        spans.add(round(39 * 40 / max(1, row[-1] - row[0])))  # short side, from how much of the ramp is seen
        lefts.add(int(row[0]))
    assert min(spans) <= 40
    assert max(spans) >= 49
    assert lefts >= set(range(7))


@pytest.mark.parametrize("sides", [(w, h) for w, h in SIDES if h <= 2 * w])
@pytest.mark.parametrize("size", [13, 32, 64])
def test_near_crop_is_within_two_levels_even_of_noise(sides, size):
    image = _image(*sides)
    pixels = torch.from_numpy(np.array(halve(image, size))).permute(2, 0, 1)
    got = near_center_crop(pixels, size)
    assert got.flags.c_contiguous
    expected = center_crop(image, size).transpose(2, 0, 1)
    assert np.abs(got.astype(int) - expected).max() <= 2
