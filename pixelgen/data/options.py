"""The ``data`` section of a configuration: what all sources share; each adds its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pixelgen.data.sources  # noqa: F401  registers those of the package
from pixelgen.data.source import SOURCES
from pixelgen.options import OpenSection


@dataclass(frozen=True, kw_only=True)
class DataConfig(OpenSection):
    """What to train on.

    Args:
        name: where the images come from: {parts}.
        image_size: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        num_classes: number of classes; the model has one more, the null label.
        flip: mirror every other image at random. Digits and letters must not be mirrored.
        workers: processes that read images; 0 reads in the training process.
        max_broken: images that cannot be read are replaced by others and reported; above this share of the
            images drawn, the run stops.
    """

    SECTION = "data."
    CHOOSES = "name"

    name: str = "digits"
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    flip: bool = False
    workers: int = 0
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        self._require_own_options()
        self._require("image_size", self.image_size >= 1, "be at least 1")
        self._require("channels", self.channels in (1, 3), "be 1 (grey) or 3 (RGB)")
        self._require("num_classes", self.num_classes >= 1, "be at least 1")
        self._require("workers", self.workers >= 0, "be 0 or more")
        self._require("max_broken", 0 <= self.max_broken <= 1, "lie in [0, 1]")
        self.part(SOURCES[self.name].options)  # which checks itself

    @classmethod
    def parts(cls) -> Mapping[str, type]:
        """The options of the sources that are registered by now."""
        return {name: source.options for name, source in SOURCES.items()}
