"""Shards of decoded images: Arrow files that are mapped into memory and read as they lie.

A shard is an Arrow IPC file with one record batch, the columns ``image`` (C * H * W bytes, CHW, as training
wants them: a batch is then plain copies), ``label`` (int32) and ``path``. It holds the readable images of one
range of the source's listing; its metadata say which, and what could not be read. Beside the shards lie
``settings.json``, what they depend on, and ``manifest.json``, which is written last and makes the folder
complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixelgen import files
from pixelgen.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
SETTINGS, MANIFEST = "settings.json", "manifest.json"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Decoded(NamedTuple):
    """Decoded images of a range of the source."""

    images: np.ndarray  # (n, C * H * W) uint8, the readable ones
    labels: list[int]
    paths: list[str]  # what they are called in the source
    broken: list[tuple[str, str]]  # path and reason of the others


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.arrow"


def open_shard(path: Path) -> pa.RecordBatch:
    """Maps a shard into memory.

    Raises:
        UserError: it is not there, cut short, or no shard.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        reason = error.strerror if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"data: cannot read shard {path}: {' '.join(str(reason).split())}") from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[Any]]:
    """As `pixelgen.files.replacing`, with errors for a user.

    Raises:
        UserError: it cannot be written, most often because the disk is full or the folder is read-only.
    """
    try:
        with files.replacing(path) as file:
            yield file
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            raise _not_writable(path.parent, error) from error
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was finished before is intact: make room "
            "and give the command again to continue"
        ) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to folder {folder}: {error.strerror or error}; choose another folder")


def write_json(path: Path, content: object) -> None:
    """Writes JSON as `replacing` does."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a settings file or a manifest.

    Raises:
        UserError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # no JSON, or no object
        raise UserError(f"data: {path} is damaged: {error}") from error


class ShardFolder:
    """A folder of shards that is being written; locked until it is closed.

    Args:
        path: the folder; made where it does not exist.
        settings: what its shards depend on.

    Raises:
        UserError: it is a file, cannot be made or written, holds something else or shards of other settings,
            or is being written already.
    """

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path = path
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{path} is no folder, or lies in a file; choose another folder") from error
        except OSError as error:
            raise _not_writable(path, error) from error
        try:
            self._claim(settings)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _not_writable(path, error) from error
            raise

    def _claim(self, settings: dict[str, object]) -> None:
        if not files.lock(self._lock):
            raise UserError(f"{self.path} is being written by another process")
        if not (self.path / SETTINGS).exists():
            if any(entry != files.partial(self.path / SETTINGS) for entry in self.path.iterdir()):
                raise UserError(
                    f"{self.path} is not empty and was not made by this command; choose another folder"
                )
            write_json(self.path / SETTINGS, settings)
        found = read_json(self.path / SETTINGS)
        for name, value in settings.items():
            if found.get(name) != value:
                how = f"with {name} {found.get(name)}, not {value}"
                if name in ("listing", "class_names", "num_source_images"):
                    how = "from another source"
                raise UserError(
                    f"{self.path} was made {how}; choose another folder, or delete it and begin again"
                )

    def close(self) -> None:
        """Unlocks the folder."""
        os.close(self._lock)

    def write(self, number: int, chunks: Sequence[Decoded]) -> None:
        """Writes a shard of chunks of images, as `replacing` does."""
        import pyarrow as pa

        images = np.concatenate([chunk.images for chunk in chunks])
        broken = [entry for chunk in chunks for entry in chunk.broken]
        num_rows, image_bytes = images.shape
        schema = pa.schema(
            [("image", pa.binary(image_bytes)), ("label", pa.int32()), ("path", pa.string())],
            metadata={"key": self.key, "number": str(number), "broken": json.dumps(broken)},
        )
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(schema.types[0], num_rows, [None, pa.py_buffer(images)]),
            pa.array([label for chunk in chunks for label in chunk.labels], pa.int32()),
            pa.array([path for chunk in chunks for path in chunk.paths], pa.string()),
        ]
        with replacing(self.path / shard_name(number)) as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))

    def broken(self, number: int, size: int) -> list[tuple[str, str]] | None:
        """Path and reason of the images that are missing in a shard of ``size`` source images.

        None where the shard itself is missing, cut short or another one's.
        """
        try:
            shard = open_shard(self.path / shard_name(number))
        except UserError:
            return None
        found = shard.schema.metadata or {}
        if (found.get(b"key"), found.get(b"number")) != (self.key.encode(), str(number).encode()):
            return None
        broken = [(path, reason) for path, reason in json.loads(found[b"broken"])]
        return broken if len(shard) + len(broken) == size else None
