"""Images that are decoded when they are read, and what is done about those that cannot be."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pixelgen.data.decode import ImageError, read_image
from pixelgen.errors import UserError

MAX_BROKEN_RUN = 1000  # unreadable images in a row after which it is the data that is broken

Crop = Literal["center", "fast", "random"]


class Broken(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str


class ReadBatch(NamedTuple):
    """Images (B, C, H, W) uint8, labels (B,) int64, and what went wrong while they were read.

    ``num_replaced`` counts the rows that hold another image than was asked for; ``broken`` names the images
    that could not be read, of which one row may have met several.
    """

    images: Tensor
    labels: Tensor
    broken: list[Broken]
    num_replaced: int


def read_or_next(
    read: Callable[[int], np.ndarray], index: int, size: int, name: Callable[[int], str]
) -> tuple[np.ndarray, int, list[Broken]]:
    """Reads an image, or the next one, in order of index, that can be read.

    Args:
        read: index to (C, H, W) uint8; raises ImageError.
        index: in [0, size).
        size: number of images; after the last one comes the first.
        name: index to what the image is called in a message.

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


class EncodedImages(ABC):
    """Images that are decoded when they are read: subclasses say where the bytes of each one are.

    Attributes:
        image_size, channels: every image is (channels, image_size, image_size).
        crop: as ``data.crop``; "random" needs draws.
        labels: (len,) int64, one per image.
        num_classes, class_names: number and names of the classes.
    """

    num_classes: int
    class_names: tuple[str, ...]

    def __init__(self, image_size: int, channels: int, crop: Crop) -> None:
        what = type(self).__name__
        if image_size < 1:
            raise UserError(f"{what}: image_size must be at least 1, got {image_size}")
        if channels not in (1, 3):
            raise UserError(f"{what}: channels must be 1 or 3, got {channels}")
        if crop not in ("center", "fast", "random"):
            raise UserError(f"{what}: crop must be center, fast or random, got {crop}")
        self.image_size = image_size
        self.channels = channels
        self.crop: Crop = crop
        self.labels: Tensor = torch.empty(0, dtype=torch.int64)

    @abstractmethod
    def source(self, index: int) -> bytes | Path:
        """Returns the encoded image ``index``, or the file that holds it.

        Raises:
            ImageError: there is none.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what to call image ``index`` in a message."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns image ``index`` as uint8 (C, H, W) and its label; a random crop is the middle one.

        Raises:
            UserError: it cannot be read as an image; the message names it.
        """
        try:
            image = self._read(index, None)
        except ImageError as error:
            raise UserError(
                f"data: cannot read image {self.name(index)}: {error}; repair or remove the file"
            ) from error
        return torch.tensor(image), int(self.labels[index])

    def batch(
        self, indices: Sequence[int] | np.ndarray, draws: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `read_batch`, but what cannot be read is reported on stderr, each image once per process.

        Returns:
            Images (B, C, H, W) uint8 and labels (B,) int64.
        """
        read = self.read_batch(indices, draws)
        for path, reason in read.broken:
            report_broken(path, reason)
        return read.images, read.labels

    def read_batch(self, indices: Sequence[int] | np.ndarray, draws: np.ndarray | None = None) -> ReadBatch:
        """Reads the images of ``indices``, and the next readable one in place of one that cannot be read.

        Args:
            indices: (B,) integers.
            draws: (B, 3) uniform in [0, 1), which place a random crop; None for the middle one.

        Raises:
            UserError: no image can be read in place of one.
        """

        images = np.empty((len(indices), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        used, broken, num_replaced = [], [], 0
        for row, index in enumerate(indices):
            read = partial(self._read, draws=None if draws is None else draws[row])
            images[row], found, unreadable = read_or_next(read, int(index), len(self), self.name)
            used.append(found)
            broken += unreadable
            num_replaced += bool(unreadable)
        labels = self.labels[torch.tensor(used, dtype=torch.int64)]
        return ReadBatch(torch.from_numpy(images), labels, broken, num_replaced)

    def _read(self, index: int, draws: np.ndarray | None) -> np.ndarray:
        crop = "center" if self.crop == "random" and draws is None else self.crop
        return read_image(self.source(index), self.image_size, self.channels, crop, draws)


def report_broken(path: str, reason: str) -> None:
    """One line on stderr, the first time in this process."""
    print_once(f"data: cannot read image {path}: {reason}; another one takes its place")


_printed: set[str] = set()


def print_once(line: str) -> None:
    """One line on stderr, the first time in this process."""
    if line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr, flush=True)
