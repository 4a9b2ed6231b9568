"""Decoding a data set in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import numpy as np

from pixelgen.data.decode import read_image
from pixelgen.data.shards import Job
from pixelgen.data.source import ImageError
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from pixelgen.data.encoded import EncodedImages

JOB_BYTES, JOB_ROWS = 2**23, 64  # of what one worker decodes at a time


def stored_path(source: EncodedImages, index: int) -> str:
    """What an image is called in the shards: its path below a folder's root, as text that can be stored."""
    name = source.name(index)
    root = getattr(source, "root", None)
    if root is not None:
        name = os.path.relpath(name, root)
    return os.fsencode(name).decode(errors="backslashreplace")


class Decoder:
    """Decodes stretches of a source, in this process or in others.

    Args:
        source: the images.
        num_workers: processes that decode; 0 decodes in this one.
    """

    def __init__(self, source: EncodedImages, num_workers: int) -> None:
        self.source = source
        self.num_workers = num_workers
        self.image_bytes = source.channels * source.image_size**2

    def decode(self, begin: int, end: int) -> Job:
        """Decodes images begin to end - 1."""
        source = self.source
        images = np.empty((end - begin, self.image_bytes), dtype=np.uint8)
        indices: list[int] = []
        paths, broken = [], []
        for index in range(begin, end):
            path = stored_path(source, index)
            try:
                image = read_image(source.source(index), source.image_size, source.channels, source.crop)
            except ImageError as error:
                broken.append((path, str(error)))
                continue
            images[len(indices)] = image.ravel()
            indices.append(index)
            paths.append(path)
        return Job(images[: len(indices)], indices, paths, broken)

    def jobs(
        self, stretches: Sequence[tuple[int, int]], progress: Callable[[int], object]
    ) -> Generator[list[Job], None, None]:
        """Decodes stretches, in order, the parts of each side by side.

        Args:
            stretches: begin and end of each.
            progress: is called with the number of images that were just done.

        Yields:
            The parts of one stretch.

        Raises:
            UserError: a worker process died.
        """
        parts = [self._parts(*stretch) for stretch in stretches]
        done: Iterator[Job]
        if self.num_workers:
            done = self._by_workers(parts)
        else:
            done = (self.decode(*part) for of_stretch in parts for part in of_stretch)
        for of_stretch in parts:
            jobs = []
            for begin, end in of_stretch:
                jobs.append(next(done))
                progress(end - begin)
            yield jobs

    def _by_workers(self, parts: list[list[tuple[int, int]]]) -> Generator[Job, None, None]:
        # Not forked: a lock that a thread of a library holds would stay locked in the fork.
        pool = ProcessPoolExecutor(
            self.num_workers,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(pickle.dumps(self),),
        )
        waiting: deque[Future[Job]] = deque()
        try:
            for begin, end in (part for of_stretch in parts for part in of_stretch):
                if len(waiting) == 2 * self.num_workers:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(_decode, begin, end))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died; most often memory ran out: set a smaller --workers, and give the "
                "command again to continue"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _parts(self, begin: int, end: int) -> list[tuple[int, int]]:
        rows = max(1, min(JOB_ROWS, JOB_BYTES // self.image_bytes))
        return [(at, min(at + rows, end)) for at in range(begin, end, rows)]


_decoder: Decoder | None = None  # of this worker process


def _start_worker(decoder: bytes) -> None:
    global _decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal signals the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)  # the processes share the CPUs
    _decoder = pickle.loads(decoder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)  # the parent was killed: no one will collect what is decoded here


def _decode(begin: int, end: int) -> Job:
    assert _decoder is not None
    return _decoder.decode(begin, end)
