"""Noise in place of images, to measure training without reading anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pixelgen.errors import UserError

NUM_IMAGES = 100_000
POOL_SIZE = 64  # different images; 12.6 MB at 256 pixels, which a batch only copies from


class SyntheticImages:
    """``NUM_IMAGES`` images of uniform noise, of which ``POOL_SIZE`` are different, made once.

    Attributes:
        labels: (NUM_IMAGES,) int64, every class equally often.
        num_classes, class_names: the classes asked for, named "0", "1" and so on.
    """

    def __init__(self, image_size: int, channels: int = 3, num_classes: int = 1000):
        """Makes the noise.

        Args:
            image_size: side in pixels, at least 1.
            channels: 1 or 3.
            num_classes: at least 1.

        Raises:
            UserError: an argument is out of range.
        """
        if image_size < 1:
            raise UserError(f"SyntheticImages: image_size must be at least 1, got {image_size}")
        if channels not in (1, 3):
            raise UserError(f"SyntheticImages: channels must be 1 or 3, got {channels}")
        if num_classes < 1:
            raise UserError(f"SyntheticImages: num_classes must be at least 1, got {num_classes}")
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.class_names: tuple[str, ...] = tuple(str(label) for label in range(num_classes))
        self.labels: Tensor = torch.arange(NUM_IMAGES) % num_classes
        shape = (POOL_SIZE, channels, image_size, image_size)
        self._pool = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return NUM_IMAGES

    def name(self, index: int) -> str:
        """Returns what to call image ``index`` in a message."""
        return f"synthetic image {index}"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns image ``index`` as uint8 (C, H, W) and its label."""
        return torch.tensor(self._pool[index % POOL_SIZE]), int(self.labels[index])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the images (B, C, H, W) uint8 and labels (B,) int64 of ``indices`` (B,)."""
        index = np.asarray(indices, dtype=np.int64)
        # NumPy gathers whole images; PyTorch's indexing goes pixel by pixel and took 18 times as long.
        return torch.from_numpy(self._pool[index % POOL_SIZE]), self.labels[torch.from_numpy(index)]
