"""Batches of a source: what it gives for (seed, step), whatever the number of processes that read it.

Nothing is stored to resume, so PyTorch's plain DataLoader is enough: start it at the step to continue from.
Only a stream has a state beyond that; every batch carries the one after it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixelgen.conditions import Condition
from pixelgen.data.order import Share
from pixelgen.data.source import Broken, ReadBatch, Source, report_broken
from pixelgen.errors import UserError

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MIN_JUDGED = 1000  # images of all processes: over fewer, a single unreadable one would be a large share


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
        self._broken_paths: set[str] = set()
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
            self.num_drawn += len(read.images)
            self.num_broken += read.num_replaced
            self._count_broken(read.broken)
        except UserError:
            self.close()
            raise
        return Batch(read.images, {"label": read.labels})

    def _fetch(self) -> Any:
        """What `_Batches` gave."""
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

    def _count_broken(self, broken: list[Broken]) -> None:
        for image in broken:
            if image.path not in self._broken_paths:
                self._broken_paths.add(image.path)
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
        """What `Source.state_dict` gave after the last batch."""
        return dict(self._state)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = self._batches = None


def build_loader(
    source: Source,
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
    """An endless iterator of batches, beginning with that of ``start_step``.

    The number of worker processes changes nothing but speed. The global random state is neither read nor
    advanced. ``close()`` ends the workers early; they outlive SIGINT and SIGTERM of others, so that the
    trainer can finish its step and save. In place of an image that cannot be read comes the next one that
    can, by index: the same on any number of ranks and workers.

    Args:
        source: images and labels.
        batch_size: images per step over all ranks; world_size divides it.
        seed: seed of the shuffles, and of random crops.
        start_step: step of the first batch, from 0.
        num_workers: processes that read images, 0 for this one; of a stream, threads of one that does.
        rank, world_size: which part of every global batch to yield, images (B, C, H, W) uint8 and labels (B,)
            int64 with B = batch_size // world_size.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
        max_broken: share of the images drawn by this rank that may be unreadable, counted over 1,000 /
            world_size of them at least; 0 for none at all.
        state: what ``state_dict()`` gave after step ``start_step - 1``; needed to continue a stream.
    """
    share = Share(batch_size, seed, start_step, rank, world_size)
    source = source.begin(share, state, threads=num_workers)
    first_state = source.state_dict()
    loader: DataLoader[Any] = DataLoader(
        _Batches(source),
        batch_size=None,  # an element is a whole batch
        sampler=_requests(source, share),
        num_workers=min(1, num_workers) if first_state else num_workers,
        collate_fn=_as_it_is,  # the DataLoader's own conversion takes 0.1 ms
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # without one, starting the loader draws from the global generator
    )
    return Loader(loader, max_broken, MIN_JUDGED // world_size, first_state)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    # Workers inherit the mask, so that no signal ends one before it has run `_outlive_signals`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    # The DataLoader's handler of SIGCHLD would raise a worker's death wherever the main thread is; without
    # it, it is raised where the DataLoader next waits for a batch, within five seconds.
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _requests(source: Source, share: Share) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What to read at step ``start_step``, ``start_step + 1``, and so on for ever."""
    for step in count(share.start_step):
        yield source.order(step, share), share.crop_draws(step) if source.crop == "random" else None


class _Batches(Dataset[Any]):
    """Reads whole batches, each with the state of the source after it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(
        self, request: tuple[np.ndarray, np.ndarray | None]
    ) -> tuple[ReadBatch, dict[str, int]] | UserError:
        try:
            read = self.source.read(*request)
            # tensors, which a worker sends through shared memory
            tensors: dict[str, Any] = {
                "images": torch.from_numpy(read.images),
                "labels": torch.from_numpy(read.labels),
            }
            return read._replace(**tensors), self.source.state_dict()
        except UserError as error:
            # Handed over, not raised: the DataLoader would make a worker's traceback the message.
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    # Terminals and schedulers signal the whole process group; the trainer decides when its workers end. The
    # trainer's own SIGTERM does end them: Python sends it to those that are left when it exits, then waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)  # in the threads to come, too
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent.pid:
            os._exit(128 + signal.SIGTERM)
