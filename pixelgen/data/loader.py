"""Batches whose content is a function of (seed, step) alone.

Position ``p = step * batch_size + i`` of an endless stream holds image ``permutation(seed, p // n)[p % n]``
of the ``n`` images: a fresh shuffle per epoch, batches that run across epoch ends, any batch size. Nothing is
stored to resume, so PyTorch's plain DataLoader is enough: start it at the step to continue from. Only data
that is streamed has a state beyond that (`pixelgen.data.sources.stream`); every
batch carries the one after it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from pixelgen_kernels import philox_uniform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pixelgen.conditions import Condition
from pixelgen.data.encoded import Broken, EncodedImages, ReadBatch, report_broken
from pixelgen.data.options import DataConfig
from pixelgen.data.sources.digits import Digits
from pixelgen.data.sources.folder import ClassFolder
from pixelgen.data.sources.hf import HubImages
from pixelgen.data.sources.synthetic import SyntheticImages
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from pixelgen.data.sources.stream import HubStream

# Stream of the counter-based generator that places random crops; the trainer's own are 0 to 3.
CROP_STREAM = 4
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MIN_JUDGED = 1000  # images of all processes: over fewer, a single unreadable one would be a large share


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


def build_dataset(data: DataConfig) -> ImageDataset | HubStream:
    """Builds the data set that the ``data`` section of a config describes; a stream for ``data.streaming``.

    Raises:
        FileNotFoundError: data.path does not exist.
        UserError: an option does not fit the data; the message names the option to change.
    """
    dataset = _open(data)
    if dataset.num_classes != data.num_classes:
        where = "the digits have" if data.name == "digits" else f"{data.path} holds"
        raise UserError(
            f"data: {where} {dataset.num_classes} classes but num_classes is {data.num_classes}; "
            f"set --data.num_classes {dataset.num_classes}"
        )
    return dataset


def _open(data: DataConfig) -> ImageDataset | HubStream:
    size, channels = data.image_size, data.channels
    holds = {
        "folder": "a folder that holds one sub-folder of images per class",
        "prepared": "a folder that pixelgen.data.prepare wrote",
        "hf": "a hub id, or a folder or pattern of parquet files, webdataset tars or images",
    }
    if data.name in holds and not data.path:
        raise UserError(f"data: {data.name} needs --data.path, {holds[data.name]}")
    if data.name not in holds and data.path is not None:
        raise UserError(f"data: {data.name} takes no path, got {data.path}; did you mean --data.name folder?")
    if data.name == "digits":
        return Digits(size, channels)
    if data.name == "synthetic":
        return SyntheticImages(size, channels, data.num_classes)
    if data.name == "folder":
        return ClassFolder(str(data.path), size, channels, data.crop)
    if data.name == "prepared":
        from pixelgen.data.sources.prepared import PreparedImages

        return PreparedImages(str(data.path), size, channels)
    if not data.streaming:
        return HubImages(data)
    from pixelgen.data.sources.stream import HubStream

    return HubStream(data)


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
        part = permutation(seed, epoch, dataset_size)[offset : offset + local]
        parts.append(part)
        first, local = first + len(part), local - len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int, block: tuple[int, int] | None = None) -> np.ndarray:
    """Random order (size,) int64 of an epoch, or of the block of it that begins at a (shard, row).

    Sorts raw Philox words instead of calling ``Generator.permutation``, which may change with NumPy.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, 0] if block is None else [0, *block, 1], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(size)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)  # shared by all callers through the cache
    return order


@dataclass(frozen=True)
class Share:
    """Which batches a rank reads: parts of ``batch_size`` images, from ``start_step`` on."""

    batch_size: int
    seed: int
    start_step: int
    rank: int
    world_size: int

    @property
    def first(self) -> int:
        """Place of the rank's first image in the global batch."""
        return self.rank * self.size

    @property
    def size(self) -> int:
        """Images per step of the rank."""
        return self.batch_size // self.world_size

    def crop_draws(self, step: int) -> np.ndarray:
        """Uniform draws (size, 3) float32 that place the random crops of the rank's images."""
        places = torch.arange(self.first, self.first + self.size)
        return philox_uniform(self.seed, step, places, 3, stream=CROP_STREAM).numpy()


class Batch(NamedTuple):
    """Images (B, C, H, W) uint8, and what is known of them: ``{"label": (B,) int64}``."""

    images: Tensor
    condition: Condition


class Loader:
    """An endless iterator of batches; see `build_loader`.

    Attributes:
        broken: images that this rank could not read so far, each once.
        num_broken: rows of this rank that another image had to fill.
        num_drawn: rows that this rank has yielded.
    """

    def __init__(
        self, loader: DataLoader[Any], max_broken: float, min_judged: int, state: dict[str, int]
    ) -> None:
        self.broken: list[Broken] = []
        self.num_broken = self.num_drawn = 0
        self._loader: DataLoader[Any] | None = loader
        self._batches: Iterator[Any] | None = None
        self._max_broken, self._min_judged = max_broken, min_judged
        self._state = state

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: too many images cannot be read, or a worker process died; the loader is closed then.
            StopIteration: the loader was closed.
        """
        try:
            read, self._state = self._fetch()
            self.num_drawn += len(read.labels)
            self.num_broken += read.num_replaced
            self._note(read.broken)
        except UserError:
            self.close()
            raise
        return Batch(read.images, {"label": read.labels})

    def _fetch(self) -> tuple[ReadBatch, dict[str, int]]:
        if self._loader is None:
            raise StopIteration
        if self._batches is None:
            self._batches = _start(self._loader)
        try:
            got = next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"data: {error}; if memory ran out, set a smaller --data.workers") from error
        if isinstance(got, UserError):
            raise got
        return got

    def _note(self, broken: list[Broken]) -> None:
        if not broken:
            return
        known = {image.path for image in self.broken}
        for image in broken:
            if image.path not in known:
                known.add(image.path)
                self.broken.append(image)
                report_broken(*image)
        if self.num_broken > self._max_broken * max(self.num_drawn, self._min_judged):
            shown = ", ".join(f"{path} ({reason})" for path, reason in self.broken[:3])
            raise UserError(
                f"data: {self.num_broken} of {self.num_drawn} images drawn "
                f"({self.num_broken / self.num_drawn:.1%}) could not be read, more than data.max_broken "
                f"{self._max_broken:g} allows: {shown}{', ...' if len(self.broken) > 3 else ''}"
            )

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, the same on every rank; {} where that is a function of the step."""
        return dict(self._state)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = self._batches = None


def build_loader(
    dataset: ImageDataset | HubStream,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    max_broken: float = 0.01,
    state: dict[str, int] | None = None,
) -> Loader:
    """Returns an endless iterator of batches, beginning with that of ``start_step``.

    The number of worker processes changes nothing but speed. The global random state is neither read nor
    advanced. ``close()`` ends the workers early; they outlive SIGINT and SIGTERM of others, so that the
    trainer can finish its step and save. In place of an image that cannot be read comes the next one that
    can, by index: the same on any number of ranks and workers.

    Args:
        dataset: images and labels.
        batch_size: images per step over all ranks, at least 1; world_size divides it.
        seed: seed of the shuffles, and of random crops.
        start_step: step of the first batch, from 0.
        num_workers: processes that read images, 0 for this one; for a stream, threads of one that does.
        rank, world_size: which part of every global batch to yield, images (B, C, H, W) uint8 and labels (B,)
            int64 with B = batch_size // world_size.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
        max_broken: share of the images drawn by this rank that may be unreadable, counted over 1,000 /
            world_size of them at least; 0 for none at all.
        state: what ``state_dict()`` gave after step ``start_step - 1``; needed to continue a stream.

    Raises:
        ValueError: an argument is out of range.
        UserError: batch_size, num_workers or max_broken is; or the state is that of other data.
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
    if not 0 <= max_broken <= 1:
        raise UserError(f"build_loader: max_broken must lie in [0, 1], got {max_broken}")
    from pixelgen.data.sources.stream import HubStream, StreamBatches

    share = Share(batch_size, seed, start_step, rank, world_size)
    source: Dataset[Any]
    sampler = None
    if isinstance(dataset, HubStream):
        source = StreamBatches(dataset, share, state, threads=num_workers)
        state = source.state
        num_workers = min(1, num_workers)
    else:
        if len(dataset) == 0:
            raise ValueError("build_loader: dataset must hold at least one image, got 0")
        if state:
            raise UserError("data: the checkpoint is of a stream; set --data.streaming true")
        source, sampler, state = _Batches(dataset), _Stream(dataset, share), {}
    loader: DataLoader[Any] = DataLoader(
        source,
        batch_size=None,  # an element is a whole batch
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # without one, starting the loader draws from the global generator
    )
    return Loader(loader, max_broken, MIN_JUDGED // world_size, state)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    # Workers inherit the mask, so that no signal ends one before it has run `_outlive_signals`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    # By its handler of SIGCHLD a worker's death would raise wherever the main thread is; without it, where
    # the DataLoader next waits for a batch, within five seconds.
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Stream(Sampler[tuple[np.ndarray, np.ndarray | None]]):
    """What to read at step ``start_step``, ``start_step + 1``, and so on for ever."""

    def __init__(self, dataset: ImageDataset, share: Share) -> None:
        self.dataset_size = len(dataset)
        self.is_random = getattr(dataset, "crop", "center") == "random"
        self.share = share

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        share, step = self.share, self.share.start_step
        while True:
            indices = stream_indices(
                step,
                dataset_size=self.dataset_size,
                batch_size=share.batch_size,
                seed=share.seed,
                rank=share.rank,
                world_size=share.world_size,
            )
            yield indices, share.crop_draws(step) if self.is_random else None
            step += 1


class _Batches(Dataset[Any]):
    """Looks up whole batches: in-memory data is indexed once instead of collated image by image."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(
        self, request: tuple[np.ndarray, np.ndarray | None]
    ) -> tuple[ReadBatch, dict[str, int]] | UserError:
        indices, draws = request
        try:
            if isinstance(self.dataset, EncodedImages):
                return self.dataset.read_batch(indices, draws), {}
            return ReadBatch(*self.dataset.batch(indices), [], 0), {}
        except UserError as error:
            # Handed over, not raised: the DataLoader would make a worker's traceback the message.
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    # Terminals and schedulers signal the whole process group; the trainer decides when its workers end. A
    # SIGTERM of its own does end them: Python sends it to those that are left when it exits, then waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)  # in the threads to come, too
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent.pid:
            os._exit(128 + signal.SIGTERM)
