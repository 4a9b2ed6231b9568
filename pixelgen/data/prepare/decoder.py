"""Decoding a data set in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import numpy as np

from pixelgen.data.decode import read_image
from pixelgen.data.shards import Decoded
from pixelgen.data.source import ImageError
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from pixelgen.data.encoded import EncodedImages


def stored_path(source: EncodedImages, index: int) -> str:
    """What an image is called in the shards: its path below a folder's root, as text that can be stored."""
    name = source.name(index)
    root = getattr(source, "root", None)
    if root is not None:
        name = os.path.relpath(name, root)
    return os.fsencode(name).decode(errors="backslashreplace")


def decode_all(
    source: EncodedImages, chunks: Iterable[range], num_workers: int
) -> Generator[Decoded, None, None]:
    """Decodes chunks of images, in order, with some worker processes; 0 decodes in this one.

    Raises:
        UserError: a worker process died.
    """
    if num_workers == 0:
        yield from (_decode(source, indices) for indices in chunks)
        return
    # Not forked: a lock that a thread of a library holds would stay locked in the fork.
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(pickle.dumps(source),),
    )
    waiting: deque[Future[Decoded]] = deque()
    try:
        for indices in chunks:
            if len(waiting) == 2 * num_workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_decode_in_worker, indices))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died; most often memory ran out: set a smaller --workers, and give the "
            "command again to continue"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(source: EncodedImages, indices: range) -> Decoded:
    image_bytes = source.channels * source.image_size**2
    decoded = Decoded(np.empty((len(indices), image_bytes), dtype=np.uint8), [], [], [])
    for index in indices:
        path = stored_path(source, index)
        try:
            image = read_image(source.encoded(index), source.image_size, source.channels, source.crop)
        except ImageError as error:
            decoded.broken.append((path, str(error)))
            continue
        decoded.images[len(decoded.paths)] = image.ravel()
        decoded.labels.append(int(source.labels[index]))
        decoded.paths.append(path)
    return decoded._replace(images=decoded.images[: len(decoded.paths)])


_source: EncodedImages  # what this worker process reads


def _start_worker(source: bytes) -> None:
    global _source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal signals the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)  # the processes share the CPUs
    _source = pickle.loads(source)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)  # the parent was killed: no one will collect what is decoded here


def _decode_in_worker(indices: range) -> Decoded:
    return _decode(_source, indices)
