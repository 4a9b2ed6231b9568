"""Batches whose content is a function of (seed, step) alone.

Position ``p = step * batch_size + i`` of an endless stream holds image ``permutation(seed, p // n)[p % n]``
of the ``n`` images: a fresh shuffle per epoch, batches that run across epoch ends, any batch size. Nothing is
stored to resume, so PyTorch's plain DataLoader is enough: start it at the step to continue from.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch import Generator as TorchGenerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pixelgen.data.digits import Digits
from pixelgen.data.folder import ClassFolder
from pixelgen.errors import UserError


class ImageDataset(Protocol):
    """What the loader and the trainer need of a data set."""

    image_size: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        """Returns the number of images."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns one image, uint8 (C, H, W), and its label."""

    def name(self, index: int) -> str:
        """Returns what to call image ``index`` in a message."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns images, uint8 (B, C, H, W), and labels, int64 (B,)."""


def build_dataset(
    name: str, *, path: str | None = None, image_size: int, channels: int, num_classes: int | None = None
) -> ImageDataset:
    """Builds a data set from the fields of the ``data`` section of a config.

    Args:
        name: "digits" (embedded) or "folder" (class sub-folders under ``path``).
        path: folder of the class folders; for "folder" only.
        image_size: side of the square images, in pixels.
        channels: 1 (grey) or 3 (RGB).
        num_classes: number of classes the model is built for; None takes what the data has.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: path does not exist.
        UserError: an argument does not fit the data; the message names the option to change.
    """
    dataset: ImageDataset
    if name == "digits":
        if path is not None:
            raise UserError(
                f"data: digits are embedded and take no path, got {path}; did you mean --data.name folder?"
            )
        dataset = Digits(image_size=image_size, channels=channels)
    elif name == "folder":
        if not path:
            raise UserError(
                "data: folder needs --data.path, a folder that holds one sub-folder of images per class"
            )
        dataset = ClassFolder(path, image_size=image_size, channels=channels)
    else:
        raise UserError(f"data: name must be digits or folder, got {name}")
    if num_classes is not None and dataset.num_classes != num_classes:
        where = "the digits have" if name == "digits" else f"{path} holds"
        raise UserError(
            f"data: {where} {dataset.num_classes} classes but num_classes is {num_classes}; "
            f"set --data.num_classes {dataset.num_classes}"
        )
    return dataset


def stream_indices(
    step: int, *, dataset_size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Indices of the images that ``rank`` sees at ``step``: a pure function of its arguments.

    Ranks take consecutive parts of the global batch, so the global batch does not depend on ``world_size``.

    Args:
        step: training step, from 0.
        dataset_size: number of images n, at least 1.
        batch_size: images per step over all ranks; world_size divides it.
        seed: seed of the shuffles, any integer.
        rank: which part, 0 <= rank < world_size.
        world_size: number of parts.

    Returns:
        (batch_size // world_size,) int64.
    """
    local = batch_size // world_size
    first = step * batch_size + rank * local
    parts = []
    while local > 0:
        epoch, offset = divmod(first, dataset_size)
        part = _permutation(seed, epoch, dataset_size)[offset : offset + local]
        parts.append(part)
        first, local = first + len(part), local - len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Random order (size,) int64 of an epoch.

    Sorts raw Philox words instead of calling ``Generator.permutation``, which may change with NumPy.
    """
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(size)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)  # shared by all callers through the cache
    return order


def build_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Returns an endless iterator of batches, beginning with that of ``start_step``.

    The number of worker processes changes nothing but speed. The global random state is neither read nor
    advanced. ``close()`` ends the workers early; they ignore SIGINT and SIGTERM, so that the trainer can
    finish its step and save.

    Args:
        dataset: images and labels.
        batch_size: images per step over all ranks, at least 1; world_size divides it.
        seed: seed of the shuffles.
        start_step: step of the first batch, from 0.
        num_workers: processes that read images; 0 reads in this one.
        rank, world_size: which part of every global batch to yield.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.

    Yields:
        images (B, C, H, W) uint8 and labels (B,) int64 with B = batch_size // world_size.

    Raises:
        ValueError: an argument is out of range.
        UserError: while iterating, when an image cannot be read.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"build_loader: rank must satisfy 0 <= rank < world_size {world_size}, got {rank}")
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"build_loader: batch_size must be a multiple of world_size {world_size} and at least 1, "
            f"got {batch_size}"
        )
    if start_step < 0:
        raise ValueError(f"build_loader: start_step must be at least 0, got {start_step}")
    if num_workers < 0:
        raise UserError(f"build_loader: num_workers must be at least 0, got {num_workers}")
    if len(dataset) == 0:
        raise ValueError("build_loader: dataset must hold at least one image, got 0")
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        batch_size=None,  # an element of _Batches is a whole batch
        sampler=_Stream(len(dataset), batch_size, seed, start_step, rank, world_size),
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        generator=TorchGenerator(),  # without one, starting the loader draws from the global generator
    )
    return _iterate(loader)


def _iterate(loader: DataLoader[Any]) -> Generator[tuple[Tensor, Tensor], None, None]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        images, labels = batch
        yield images, labels


class _Stream(Sampler[np.ndarray]):
    """Index arrays of step ``start_step``, ``start_step + 1``, and so on for ever."""

    def __init__(
        self, dataset_size: int, batch_size: int, seed: int, start_step: int, rank: int, world_size: int
    ):
        self.start_step = start_step
        self.arguments = {
            "dataset_size": dataset_size,
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
        }

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.start_step
        while True:
            yield stream_indices(step, **self.arguments)
            step += 1


class _Batches(Dataset[Any]):
    """Looks up whole batches: in-memory data is indexed once instead of collated image by image."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.dataset.batch(indices)
        except UserError as error:
            # Handed over, not raised: the DataLoader would make a worker's traceback the message.
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    # Terminals and schedulers signal the whole process group; the trainer decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
