"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pixelgen.errors import UserError

NATIVE_SIZE = 8
MAX_LEVEL = 16  # the data set's own scale is 0..16


class Digits:
    """The optical recognition of handwritten digits set (UCI, 1998), held in memory.

    A level ``v`` in 0..16 becomes ``round(v * 255 / 16)``; ``round(u * 16 / 255)`` gives it back exactly.
    Larger sizes are bicubic enlargements.

    Attributes:
        images: (1797, channels, image_size, image_size) uint8.
        labels: (1797,) int64, 0..9.
        num_classes: 10.
        class_names: "0".."9".
    """

    def __init__(self, image_size: int = NATIVE_SIZE, channels: int = 1):
        """Loads the digits.

        Args:
            image_size: side in pixels, a positive multiple of 8.
            channels: 1, or 3 for three equal channels.

        Raises:
            UserError: for another size or number of channels.
        """
        if image_size < NATIVE_SIZE or image_size % NATIVE_SIZE:
            raise UserError(
                f"Digits: image_size must be a positive multiple of {NATIVE_SIZE}, got {image_size}"
            )
        if channels not in (1, 3):
            raise UserError(f"Digits: channels must be 1 or 3, got {channels}")
        from sklearn.datasets import load_digits

        levels, labels = load_digits(return_X_y=True)
        pixels = np.round(levels.reshape(-1, NATIVE_SIZE, NATIVE_SIZE) * (255 / MAX_LEVEL)).astype(np.uint8)
        if image_size != NATIVE_SIZE:
            pixels = _enlarge(pixels, image_size)
        self.image_size = image_size
        self.channels = channels
        self.images: Tensor = torch.from_numpy(pixels)[:, None].repeat(1, channels, 1, 1)
        self.labels: Tensor = torch.from_numpy(labels.astype(np.int64))
        self.num_classes = 10
        self.class_names: tuple[str, ...] = tuple(str(label) for label in range(10))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns what to call image ``index`` in a message."""
        return f"digit {index}"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns image ``index`` as uint8 (C, H, W) and its label."""
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the images (B, C, H, W) uint8 and labels (B,) int64 of ``indices`` (B,)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[index], self.labels[index]


def _enlarge(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic enlargement of (N, 8, 8) uint8 to (N, size, size) uint8."""
    from PIL import Image

    enlarged = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in pixels]
    return np.stack([np.asarray(image) for image in enlarged])
