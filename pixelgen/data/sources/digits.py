"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixelgen.data.source import ReadBatch, Source, SourceOptions, register
from pixelgen.errors import UserError

NATIVE_SIZE = 8
MAX_LEVEL = 16  # the data set's own scale is 0..16


@dataclass(frozen=True, kw_only=True)
class DigitsOptions(SourceOptions):
    """The embedded set of 1,797 real 8x8 images."""


class Digits(Source):
    """The optical recognition of handwritten digits set (UCI, 1998), held in memory.

    A level ``v`` in 0..16 becomes ``round(v * 255 / 16)``; ``round(u * 16 / 255)`` gives it back exactly.
    Larger sizes, multiples of 8, are bicubic enlargements; several channels are equal.

    Attributes:
        images: (1797, channels, image_size, image_size) uint8.
        labels: (1797,) int64, 0..9.
    """

    ITEM = "digit"
    labels: np.ndarray

    def __init__(self, image_size: int = NATIVE_SIZE, channels: int = 1):
        if image_size % NATIVE_SIZE:
            raise UserError(f"Digits: image_size must be a multiple of {NATIVE_SIZE}, got {image_size}")
        from sklearn.datasets import load_digits

        levels, labels = load_digits(return_X_y=True)
        super().__init__(image_size, channels, tuple("0123456789"), labels.astype(np.int64))
        pixels = np.round(levels.reshape(-1, NATIVE_SIZE, NATIVE_SIZE) * (255 / MAX_LEVEL)).astype(np.uint8)
        if image_size != NATIVE_SIZE:
            from PIL import Image

            side = (image_size, image_size)
            enlarged = [Image.fromarray(digit).resize(side, Image.Resampling.BICUBIC) for digit in pixels]
            pixels = np.stack([np.asarray(digit) for digit in enlarged])
        self.images = np.repeat(pixels[:, None], channels, axis=1)

    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        """Looks the images up."""
        return ReadBatch(self.images[order], self.labels[order])


register("digits", DigitsOptions)(lambda data, options: Digits(data.image_size, data.channels))
