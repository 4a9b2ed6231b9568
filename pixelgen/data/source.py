"""What a source of images is, and the sources that are known by name. Imports no torch."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np

from pixelgen.data.order import Share, shuffled_indices
from pixelgen.errors import UserError
from pixelgen.options import Section

if TYPE_CHECKING:
    from torch import Tensor

    from pixelgen.data.options import DataConfig

Crop = Literal["center", "fast", "random"]


class ImageError(Exception):
    """A file that cannot be read as an image; the message is the reason, one line without the path."""


class Broken(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str


class ReadBatch(NamedTuple):
    """What `Source.read` gives.

    Attributes:
        images: (B, C, H, W) uint8.
        labels: (B,) int64.
        broken: the images that could not be read, of which one row may have met several.
        num_replaced: rows that hold another image than was asked for.
    """

    images: np.ndarray
    labels: np.ndarray
    broken: Sequence[Broken] = ()
    num_replaced: int = 0


class Source(ABC):
    """Images with labels, and the order in which they come.

    A subclass has to say how images are read. It is a stream where it has a state: its images can then be
    read only one batch after the other, by one process; ``begin`` takes up a state and ``state_dict``
    returns it. With all others the loader reads several batches at once, in processes to which the source is
    sent.

    Args:
        image_size: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        class_names: names of the classes, by label.
        labels: (N,) int64, those of all images; None where they are not known beforehand.
        crop: with "random", ``read`` gets the draws that place the crops.

    Attributes:
        num_classes: number of classes.
        num_images: number of images, N; None for a source without an end.
    """

    #: What a message calls an image, before its number.
    ITEM: ClassVar[str] = "image"

    def __init__(
        self,
        image_size: int,
        channels: int,
        class_names: Sequence[str],
        labels: np.ndarray | None = None,
        crop: Crop = "center",
    ) -> None:
        self.image_size, self.channels, self.crop = image_size, channels, crop
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.labels = labels
        self.num_images: int | None = None if labels is None else len(labels)

    @abstractmethod
    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        """Reads one process's part of a batch.

        Args:
            order: (B,) int64, what `order` gave for it.
            draws: (B, 3) uniform in [0, 1), which place random crops; None for the middle.

        Raises:
            UserError: the images cannot be read, nor others in their place.
        """

    def order(self, step: int, share: Share) -> np.ndarray:
        """What to read at a step, (B,) int64: a function of step and share alone.

        Numbers of shuffled images; where they are not counted, the places of the share in the batch.
        """
        return share.places if self.num_images is None else shuffled_indices(step, self.num_images, share)

    def name(self, index: int) -> str | None:
        """What a message calls the image that ``order`` has as ``index``; None where that is not known."""
        return None if self.num_images is None else f"{self.ITEM} {index}"

    def begin(self, share: Share, state: Mapping[str, int] | None, threads: int) -> Source:
        """The source to read batches from, at the state after the one before ``share.start_step``.

        Args:
            share: which part of every batch.
            state: as ``state_dict`` gave it; empty or None at the beginning, and for what is no stream.
            threads: that a stream may read with.

        Raises:
            UserError: the state is that of other data.
        """
        if state:
            raise UserError("data: the checkpoint is of a stream; set --data.streaming true")
        return self

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, the same in every process; {} where that is a function of the step."""
        return {}

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Up to ``count`` images and labels, as of ``batch``, to learn features from.

        Evenly spaced ones; of a stream its first.
        """
        if self.num_images is not None:
            count = min(count, self.num_images)
            return self.batch([i * self.num_images // count for i in range(count)])
        share = Share(count, seed)
        draws = share.crop_draws(0) if self.crop == "random" else None
        return self.begin(share, None, 0).batch(self.order(0, share), draws)

    def __len__(self) -> int:
        if self.num_images is None:
            raise TypeError(f"{type(self).__name__} has no length")
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``index``, uint8 (C, H, W), and its label.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        import torch

        read = self.read(np.array([index]), None)
        if read.num_replaced:
            path, reason = read.broken[0]
            raise UserError(f"data: cannot read image {path}: {reason}; repair or remove the file")
        return torch.from_numpy(read.images[0]), int(read.labels[0])

    def batch(
        self, indices: Sequence[int] | np.ndarray, draws: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """What ``read`` gives, as tensors: images (B, C, H, W) uint8 and labels (B,) int64.

        What cannot be read is reported on stderr, each image once per process.
        """
        import torch

        read = self.read(np.asarray(indices, dtype=np.int64), draws)
        for broken in read.broken:
            report_broken(*broken)
        return torch.from_numpy(read.images), torch.from_numpy(read.labels)


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Section):
    """A source without options of its own; those with some derive from this."""

    SECTION = "data."

    def __post_init__(self) -> None:
        self._require_choices()


class Registered(NamedTuple):
    """A source that is known by name; see `register`."""

    options: type[SourceOptions]
    path: str | None
    open: Callable[[DataConfig, Any], Source]


SOURCES: dict[str, Registered] = {}

Open = TypeVar("Open", bound=Callable[..., Source])


def register(
    name: str, options: type[SourceOptions] = SourceOptions, path: str | None = None
) -> Callable[[Open], Open]:
    """Makes a source known to ``data.name``; decorates ``open(data, options) -> Source``.

    Args:
        name: what ``data.name`` calls it.
        options: a frozen, keyword-only dataclass of its options, which are then also those of the ``data``
            section. Its docstring's first line says what the source is, its ``Args:`` explain the options.
        path: what ``data.path`` has to be, where the source needs it.

    Raises:
        ValueError: another source has the name.
    """

    def add(open_source: Open) -> Open:
        if name in SOURCES:
            raise ValueError(f"source {name} is registered already")
        SOURCES[name] = Registered(options, path, open_source)
        return open_source

    return add


def build_dataset(data: DataConfig) -> Source:
    """Opens the source that the ``data`` section of a configuration describes.

    Raises:
        UserError: an option does not fit the data; the message names the option to change.
    """
    chosen = SOURCES[data.name]
    if chosen.path and not data.path:
        raise UserError(f"data: {data.name} needs --data.path, {chosen.path}")
    source = chosen.open(data, data.part(chosen.options))
    if source.num_images == 0:
        raise UserError(f"data: {data.path or data.name} holds no images")
    if source.num_classes != data.num_classes:
        where = f"{data.path} holds" if data.path else f"{data.name} has"
        raise UserError(
            f"data: {where} {source.num_classes} classes but num_classes is {data.num_classes}; "
            f"set --data.num_classes {source.num_classes}"
        )
    return source


def report_broken(path: str, reason: str) -> None:
    """One line on stderr about an image, the first time in this process."""
    print_once(f"data: cannot read image {path}: {reason}; another one takes its place")


@cache
def print_once(line: str) -> None:
    """One line on stderr, the first time in this process."""
    print(line, file=sys.stderr, flush=True)
