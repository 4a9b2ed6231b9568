"""Images as bytes, and many of them in one picture."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MIN_CELL = 48  # smaller images are enlarged to this many pixels: an 8x8 digit is a speck on a screen
PADDING = 2  # pixels between cells
BACKGROUND = 96  # grey level: neither black nor white images run into it


def to_uint8(x: Tensor) -> Tensor:
    """Converts images in [-1, 1] to bytes: ``trunc(clip((x + 1) * 127.5 + 0.5, 0, 255))``.

    Args:
        x: floating, any shape; values outside [-1, 1] are clipped.

    Returns:
        uint8, same shape and device.

    Raises:
        TypeError: x is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"to_uint8: x must be floating, got {x.dtype}")
    return ((x.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def save_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None) -> None:
    """Writes images as one PNG, row by row; small ones enlarged until both sides have at least 48 pixels.

    Args:
        images: (N, C, H, W) uint8 with C 1 or 3, N at least 1.
        path: file to write; its folder is made if missing.
        columns: images per row; None makes the grid about square. The last row may be short.

    Raises:
        TypeError: images are not uint8.
        ValueError: another shape, no image, or columns below 1.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"save_grid: images must be uint8, got {images.dtype}; see to_uint8")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"save_grid: images must have shape (N >= 1, 1 or 3, H, W), got {tuple(images.shape)}"
        )
    count, channels, height, width = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if columns < 1:
        raise ValueError(f"save_grid: columns must be at least 1, got {columns}")
    from PIL import Image

    scale = math.ceil(MIN_CELL / min(height, width, MIN_CELL))
    rows = math.ceil(count / columns)
    columns = min(columns, count)
    height, width = height * scale, width * scale
    canvas = np.full(
        (rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING, channels),
        BACKGROUND,
        dtype=np.uint8,
    )
    for index, image in enumerate(images.cpu().numpy()):
        top = PADDING + index // columns * (height + PADDING)
        left = PADDING + index % columns * (width + PADDING)
        enlarged = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + height, left : left + width] = enlarged
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas).save(path, format="PNG")
