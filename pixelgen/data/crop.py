"""The crops of ADM, which every class-conditional ImageNet model since has been trained on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

MIN_SHARE = 0.8  # of the short side that a random crop keeps, ADM's min_crop_frac


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scales the short side of an image to ``size`` and cuts the middle square (ADM, 2105.05233).

    While the short side is at least ``2 * size`` both sides are halved (integer division, box filter); then
    one bicubic resize by ``size / short_side``, each side rounded half to even; then a crop at offset
    ``(side - size) // 2``. Images smaller than ``size`` are enlarged.

    Args:
        image: Pillow image of mode "RGB" or "L".
        size: side of the square, in pixels.

    Returns:
        uint8 array (size, size, 3) for "RGB", (size, size, 1) for "L".
    """
    image = halve(image, size)
    width, height = scaled_sides(*image.size, size)
    return _resize_and_cut(image, (width, height), (width - size) // 2, (height - size) // 2, size)


def random_crop(image: Image.Image, size: int, draws: np.ndarray) -> np.ndarray:
    """Scales the short side to a random length in [size, ceil(size / 0.8)] and cuts a random square (ADM).

    Scaling, image and result are as in ``center_crop``; ``draws`` are (3,) uniform numbers in [0, 1): for the
    length, the row and the column.
    """
    size_draw, row_draw, column_draw = map(float, draws)
    short = size + int(size_draw * (math.ceil(size / MIN_SHARE) - size + 1))
    image = halve(image, short)
    width, height = scaled_sides(*image.size, short)
    left, top = int(column_draw * (width - size + 1)), int(row_draw * (height - size + 1))
    return _resize_and_cut(image, (width, height), left, top, size)


def near_center_crop(pixels: Tensor, size: int) -> np.ndarray:
    """``center_crop`` with PyTorch's bicubic filter, whose weights have fewer bits: up to 2 grey levels off.

    It takes a third of the time. Halving, which it leaves to ``halve``, has to be done before.

    Args:
        pixels: uint8 (C, H, W), at most twice as high as wide; quickest where the channels of a pixel lie
            side by side in memory.
        size: side of the square, in pixels.

    Returns:
        uint8 array (C, size, size).
    """
    import torch
    from torch.nn.functional import interpolate

    height, width = pixels.shape[1:]
    sides = scaled_sides(width, height, size)
    left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
    if sides != (width, height):
        # The grid of the filter begins at the top left: what lies right of or below the square can go.
        columns = _needed(width, sides[0], left + size)
        rows = _needed(height, sides[1], top + size)
        pixels = pixels[None, :, :rows, :columns].contiguous(memory_format=torch.channels_last)
        # The result has floor(side * factor) pixels, which rounding must not make one less.
        factors = ((sides[1] + 1e-6) / height, (sides[0] + 1e-6) / width)
        pixels = interpolate(
            pixels, scale_factor=factors, mode="bicubic", antialias=True, recompute_scale_factor=False
        )[0]
    return np.ascontiguousarray(pixels[:, top : top + size, left : left + size].numpy())


def _needed(side: int, scaled: int, end: int) -> int:
    """Pixels of a side that the first ``end`` of its ``scaled`` ones depend on under a bicubic filter."""
    step = side / scaled
    return min(side, math.ceil(end * step + 2 * max(step, 1)) + 1)


def halve(image: Image.Image, size: int) -> Image.Image:
    """Halves both sides, rounding down, with a box filter while the short one is at least ``2 * size``."""
    while min(image.size) >= 2 * size:
        width, height = image.width // 2, image.height // 2
        if image.width % 2 or image.height % 2 or image.height > 2 * image.width:
            image = image.resize((width, height), Image.Resampling.BOX)
        else:  # the two passes of that resize, to the same bits, in half the time
            image = image.reduce((2, 1)).reduce((1, 2))
    return image


def scaled_sides(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of an image whose short side is scaled to ``size``."""
    scale = size / min(width, height)
    return round(width * scale), round(height * scale)


def _resize_and_cut(image: Image.Image, sides: tuple[int, int], left: int, top: int, size: int) -> np.ndarray:
    """The square at (left, top) of the image resized to ``sides``, (size, size, C)."""
    if image.width >= image.height:
        # Pillow resizes the rows, then the columns, with 8 bits between them: to cut between the two changes
        # no bit and spares the second pass what is not kept. Of tall images it may do the columns first.
        image = image.resize((sides[0], image.height), Image.Resampling.BICUBIC)
        image = image.crop((left, 0, left + size, image.height))
        sides, left = (size, sides[1]), 0
    image = image.resize(sides, Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, -1)
