"""Images that are decoded when they are read, and what is done about those that cannot be."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from pixelgen.data.source import Broken, ImageError, ReadBatch, Source
from pixelgen.errors import UserError

MAX_BROKEN_RUN = 1000  # unreadable images in a row after which it is the data that is broken


def read_or_next(
    read: Callable[[int], np.ndarray], index: int, size: int, name: Callable[[int], str]
) -> tuple[np.ndarray, int, list[Broken]]:
    """Reads image ``index`` of ``size``, or the next one that can be read; after the last comes the first.

    Args:
        read: index to (C, H, W) uint8; raises ImageError.
        name: index to what a message calls the image.

    Returns:
        The image, the index that it really has, and the images that could not be read.

    Raises:
        UserError: ``MAX_BROKEN_RUN`` images in a row, or all there are, cannot be read.
    """
    broken: list[Broken] = []
    for candidate in range(index, index + min(size, MAX_BROKEN_RUN)):
        try:
            return read(candidate % size), candidate % size, broken
        except ImageError as error:
            broken.append(Broken(name(candidate % size), str(error)))
    path, reason = broken[0]
    raise UserError(f"data: {len(broken):,} images in a row cannot be read, beginning with {path}: {reason}")


class EncodedImages(Source):
    """Images that are decoded when they are read: subclasses say where the bytes of each one are.

    In place of one that cannot be read comes the next readable one. Labels are known.
    """

    labels: np.ndarray

    @abstractmethod
    def encoded(self, index: int) -> bytes | Path:
        """The encoded image ``index``, or the file that holds it; an ImageError where there is none."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls image ``index``."""

    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        """Reads images, and the next readable one in place of one that cannot be read."""
        images = np.empty((len(order), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        labels = np.empty(len(order), dtype=np.int64)
        broken, num_replaced = [], 0
        for row, index in enumerate(order):
            read = partial(self._decode, draws=None if draws is None else draws[row])
            images[row], found, unreadable = read_or_next(read, int(index), len(self), self.name)
            labels[row] = self.labels[found]
            broken += unreadable
            num_replaced += bool(unreadable)
        return ReadBatch(images, labels, broken, num_replaced)

    def _decode(self, index: int, draws: np.ndarray | None) -> np.ndarray:
        from pixelgen.data.decode import read_image

        return read_image(self.encoded(index), self.image_size, self.channels, self.crop, draws)
