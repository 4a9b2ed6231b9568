"""Writing a file so that it is always the old one or the new one, never a part; and keeping others out."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal


@contextmanager
def replacing(path: Path, mode: Literal["w", "wb"] = "wb") -> Iterator[IO[Any]]:
    """A file that takes the place of ``path`` once all of it is on the disk; after an error nothing does.

    One process at a time may write a path. One that is killed leaves the old file and ``partial(path)``,
    which the next one overwrites.

    Args:
        path: the file, in a folder that exists.
        mode: of what is yielded; text is written as it is, without other line ends.
    """
    beside = partial(path)
    try:
        with beside.open(mode, newline="" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        flush(path.parent)  # the new name
    except BaseException:
        with suppress(OSError):  # a file system that takes no writes
            beside.unlink(missing_ok=True)
        raise


def partial(path: Path) -> Path:
    """The file that ``replacing`` writes before it takes the place of ``path``."""
    return path.with_name(f"{path.name}.tmp")


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file, as ``replacing`` does."""
    with replacing(path, "w") as file:
        file.write(text)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: int | IO[Any]) -> bool:
    """Locks an open file or folder for this process, until it is closed or the process ends, however it does.

    Returns:
        False where another process has it locked.

    Raises:
        OSError: the disk knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
