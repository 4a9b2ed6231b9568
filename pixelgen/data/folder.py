"""A folder with one sub-folder of images per class, and what all images that are decoded when read share."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from pixelgen.data.decode import ImageError, read_image
from pixelgen.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
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
    _print_once(f"data: cannot read image {path}: {reason}; another one takes its place")


_printed: set[str] = set()


def _print_once(line: str) -> None:
    if line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr, flush=True)


class ClassFolder(EncodedImages):
    """Images of ``root/<class>/**/<file>``; labels follow the sorted names of the classes.

    Hidden files and folders (a leading dot) are skipped, and so are links to a folder that holds the link.
    Files of other kinds are counted on stderr. See `read_image` for how files become pixels.

    Attributes:
        num_classes, class_names: number and sorted names of the class folders.
    """

    def __init__(
        self, root: str | os.PathLike[str], image_size: int, channels: int = 3, crop: Crop = "center"
    ) -> None:
        """Lists the images; none is opened yet.

        Args:
            root: folder that holds the class folders.
            image_size: side of the square crop, in pixels.
            channels: 3 for RGB, 1 for grey.
            crop: as ``data.crop``.

        Raises:
            FileNotFoundError: root does not exist.
            UserError: root is a file, has no class folder, or a class folder has no image; a folder cannot be
                listed; or a bad size, channel count or crop.
        """
        super().__init__(image_size, channels, crop)
        self.root = Path(root)
        self.class_names = _find_classes(self.root)
        self.num_classes = len(self.class_names)
        paths, labels = _find_images(self.root, self.class_names)
        # One array of bytes, not a million str: by counting references to those, a worker copies them.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def path(self, index: int) -> Path:
        """Returns the file that holds image ``index``."""
        return Path(os.fsdecode(self._paths[index].item()))

    def source(self, index: int) -> Path:
        """Returns the file that holds image ``index``."""
        return self.path(index)

    def name(self, index: int) -> str:
        """Returns the path of image ``index``."""
        return str(self.path(index))


def _find_classes(root: Path) -> tuple[str, ...]:
    """Sorted names of the class folders of ``root``."""
    if not root.exists():
        raise FileNotFoundError(
            f"data: folder {root} does not exist; data.path must hold one sub-folder of images per class"
        )
    if not root.is_dir():
        raise UserError(
            f"data: {root} is a file; data.path must be a folder with one sub-folder of images per class"
        )
    try:
        entries = list(os.scandir(root))
    except OSError as error:
        _cannot_list(error)
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(
            f"data: no class folders in {root}; data.path must hold one sub-folder of images per class"
        )
    return tuple(names)


def _find_images(root: Path, class_names: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Paths and labels of all images, sorted by class and path."""
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, class_name in enumerate(class_names):
        for folder, files in sorted(_walk(root, class_name)):
            found = [name for name in files if name.lower().endswith(EXTENSIONS)]
            others.update(Path(name).suffix.lower() for name in set(files).difference(found))
            paths += [os.path.join(folder, name) for name in sorted(found)]
            labels += [label] * len(found)
    kinds = " ".join(extension.removeprefix(".") for extension in EXTENSIONS)
    if not paths:
        raise UserError(
            f"data: no images in the {len(class_names)} class folders of {root}; looked for {kinds}"
        )
    empty = sorted(set(range(len(class_names))) - set(labels))
    if empty:
        shown = ", ".join(class_names[label] for label in empty[:3]) + (", ..." if len(empty) > 3 else "")
        raise UserError(
            f"data: {len(empty)} of {len(class_names)} class folders of {root} hold no images ({shown}); "
            f"looked for {kinds}"
        )
    _report_others(root, others)
    return paths, labels


def _walk(root: Path, class_name: str) -> Iterator[tuple[str, list[str]]]:
    """The folders of a class and the names of their files, without what is hidden.

    A folder that can be reached from itself by a link is visited once.
    """
    top = {_identity(root)}
    above: dict[str, set[tuple[int, int]]] = {}  # a folder itself and all that hold it
    # A folder that cannot be listed would otherwise be left out without a word.
    for folder, names, files in os.walk(root / class_name, onerror=_cannot_list, followlinks=True):
        holders = above.get(os.path.dirname(folder), top)
        identity = _identity(folder)
        if identity in holders:
            names.clear()
            continue
        above[folder] = holders | {identity}
        names[:] = [name for name in names if not name.startswith(".")]
        yield folder, [name for name in files if not name.startswith(".")]


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and number of a folder, whichever path leads to it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        _cannot_list(error)
    return status.st_dev, status.st_ino


def _report_others(root: Path, others: Counter[str]) -> None:
    """One line about the files that are no images by their names, from the first process of a run."""
    if not others or os.environ.get("RANK", "0") != "0":
        return
    most_first = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{suffix or 'no extension'} {count}" for suffix, count in most_first[:5])
    _print_once(
        f"data: files of other kinds in {root} were left out: {others.total():,} "
        f"({shown}{', ...' if len(others) > 5 else ''})"
    )


def _cannot_list(error: OSError) -> NoReturn:
    raise UserError(f"data: cannot list folder {error.filename}: {error.strerror}") from error
