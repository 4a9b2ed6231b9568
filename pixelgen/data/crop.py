"""The centre crop of ADM, which every class-conditional ImageNet model since has been trained on."""

from __future__ import annotations

import numpy as np
from PIL import Image


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scales the short side of an image to ``size`` and cuts the middle square (ADM, 2105.05233).

    While the short side is at least ``2 * size`` both sides are halved (integer division, box filter); then
    one bicubic resize by ``size / short_side``, each side rounded half to even; then a crop at offset
    ``(side - size) // 2``. Images smaller than ``size`` are enlarged.

    Args:
        image: Pillow image of mode "RGB" or "L".
        size: side of the square, in pixels, at least 1.

    Returns:
        uint8 array (size, size, 3) for "RGB", (size, size, 1) for "L".

    Raises:
        ValueError: for another mode, or a size below 1.
    """
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"center_crop: image must have mode RGB or L, got {image.mode}")
    if size < 1:
        raise ValueError(f"center_crop: size must be at least 1, got {size}")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size]).reshape(size, size, -1)
