"""Noise in place of images, to measure training without reading anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixelgen.data.source import ReadBatch, Source, SourceOptions, register

NUM_IMAGES = 100_000
POOL_SIZE = 64  # different images; 12.6 MB at 256 pixels, which a batch only copies from


@dataclass(frozen=True, kw_only=True)
class SyntheticOptions(SourceOptions):
    """Noise that costs no reading, to measure the rest."""


class SyntheticImages(Source):
    """``NUM_IMAGES`` images of uniform noise, of which ``POOL_SIZE`` are different, made once.

    Attributes:
        labels: (NUM_IMAGES,) int64, every class equally often; the classes are named "0", "1" and so on.
    """

    ITEM = "synthetic image"
    labels: np.ndarray

    def __init__(self, image_size: int, channels: int = 3, num_classes: int = 1000):
        names = [str(label) for label in range(num_classes)]
        super().__init__(image_size, channels, names, np.arange(NUM_IMAGES) % num_classes)
        shape = (POOL_SIZE, channels, image_size, image_size)
        self._pool = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        """Copies images of the pool."""
        # NumPy gathers whole images; PyTorch's indexing goes pixel by pixel and took 18 times as long.
        return ReadBatch(self._pool[order % POOL_SIZE], self.labels[order])


register("synthetic", SyntheticOptions)(
    lambda data, options: SyntheticImages(data.image_size, data.channels, data.num_classes)
)
