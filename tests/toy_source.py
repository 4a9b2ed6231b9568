"""Sources that the package does not have, in one file: all that an addition has to bring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixelgen.data.source import ReadBatch, Source, SourceOptions, register


@dataclass(frozen=True, kw_only=True)
class ToyOptions(SourceOptions):
    """Flat images.

    Args:
        toy_option: grey levels between two classes.
        toy_images: number of images.
    """

    toy_option: int = 20
    toy_images: int = 50

    def __post_init__(self) -> None:
        self._require("toy_option", 1 <= self.toy_option <= 25, "lie in [1, 25]")


def flat(numbers: np.ndarray, data: Source, step: int) -> ReadBatch:
    """Images of one level each, and the labels that it follows from."""
    labels = numbers % data.num_classes
    images = np.empty((len(numbers), data.channels, data.image_size, data.image_size), np.uint8)
    images[:] = (labels * step)[:, None, None, None]
    return ReadBatch(images, labels)


class Toy(Source):
    def __init__(self, data, options):
        labels = np.arange(options.toy_images) % data.num_classes
        super().__init__(data.image_size, data.channels, tuple("abcdefghij"), labels)
        self.step = options.toy_option

    def read(self, order, draws):
        return flat(order, self, self.step)


class ToyStream(Source):
    """Counts images as they come: its state is the number of those that are gone."""

    gone = 0

    def begin(self, share, state, threads):
        self.share, self.gone = share, (state or {"gone": 0})["gone"]
        return self

    def read(self, order, draws):
        numbers = self.gone + order
        self.gone += self.share.batch_size
        return flat(numbers, self, 20)

    def state_dict(self):
        return {"gone": self.gone}


def register_all() -> None:
    register("toy", ToyOptions)(Toy)

    @register("toy_stream")
    def open_stream(data, options):
        return ToyStream(data.image_size, data.channels, tuple("abcdefghij"))
