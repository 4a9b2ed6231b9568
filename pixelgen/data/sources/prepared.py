"""Images that `pixelgen.data.prepare` decoded, mapped into memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixelgen.data.shards import FORMAT, MANIFEST, SETTINGS, open_shard, read_json
from pixelgen.data.source import ReadBatch, Source, SourceOptions, register
from pixelgen.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class PreparedOptions(SourceOptions):
    """What pixelgen.data.prepare wrote.

    Args:
        path: the folder that pixelgen.data.prepare wrote
    """

    path: str | None = None


class PreparedImages(Source):
    """The images of a folder that ``python -m pixelgen.data.prepare`` wrote, in the order of its source.

    Nothing is decoded or held in memory: a batch is copied out of the mapped files, one copy an image.
    """

    labels: np.ndarray

    def __init__(self, path: str | os.PathLike[str], image_size: int, channels: int = 3) -> None:
        """Opens the shards.

        Raises:
            FileNotFoundError: path does not exist.
            UserError: it was not written by prepare, is incomplete or damaged, or holds other images.
        """
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        expected = (("image_size", "resolution", image_size), ("channels", "channels", channels))
        for option, name, asked in expected:
            if manifest[name] != asked:
                raise UserError(
                    f"data: {path} holds images of {name} {manifest[name]} but {option} is {asked}; set "
                    f"--data.{option} {manifest[name]} or prepare it again"
                )
        self._shape = (channels, image_size, image_size)
        self._shards = manifest["shards"]
        # First image of every shard, and the number of all.
        self._starts = np.cumsum([0, *(shard["num_images"] for shard in self._shards)])
        self._open()
        labels = np.concatenate([batch.column(1).to_numpy() for batch in self._batches])
        super().__init__(image_size, channels, manifest["class_names"], labels.astype(np.int64))

    def _open(self) -> None:
        import pyarrow as pa

        self._batches: list[pa.RecordBatch] = []
        self._images: list[np.ndarray] = []  # (n, C, H, W) uint8 views of the files
        num_bytes = int(np.prod(self._shape))
        for shard in self._shards:
            file = self.path / shard["name"]
            if not file.exists():
                raise UserError(f"data: {file} is missing; {_AGAIN}")
            if file.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"data: {file} must have {shard['bytes']} bytes, got {file.stat().st_size}; {_AGAIN}"
                )
            batch = open_shard(file)
            if len(batch) != shard["num_images"] or batch.schema.types[0] != pa.binary(num_bytes):
                raise UserError(f"data: {file} does not hold what {MANIFEST} says; {_AGAIN}")
            buffer = batch.column(0).buffers()[1]
            pixels = np.frombuffer(buffer, dtype=np.uint8, count=len(batch) * num_bytes)
            self._batches.append(batch)
            self._images.append(pixels.reshape(-1, *self._shape))

    # Sent to a spawned worker, the files are mapped again there; their bytes are not.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def name(self, index: int) -> str:
        """The path below its source of image ``index``."""
        shards, rows = self._find(np.array([index]))
        return self._batches[shards[0]].column(2)[int(rows[0])].as_py()

    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        """Copies images out of the files."""
        shards, rows = self._find(order)
        images = np.empty((len(rows), *self._shape), dtype=np.uint8)
        for image, shard, row in zip(images, shards.tolist(), rows.tolist(), strict=True):
            image[...] = self._images[shard][row]
        return ReadBatch(images, self.labels[order])

    def _find(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row (B,) of images."""
        if ((order < 0) | (order >= len(self))).any():
            raise IndexError(f"PreparedImages: indices must lie in [0, {len(self)}), got {order}")
        shards = np.searchsorted(self._starts, order, side="right") - 1
        return shards, order - self._starts[shards]


register("prepared", PreparedOptions, path="a folder that pixelgen.data.prepare wrote")(
    lambda data, options: PreparedImages(options.path, data.image_size, data.channels)
)


_AGAIN = "give the command pixelgen.data.prepare again, which writes what is missing"


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"data: folder {path} does not exist; pixelgen.data.prepare makes it")
    if not (path / MANIFEST).is_file():
        if (path / SETTINGS).is_file():
            raise UserError(f"data: {path} is incomplete: it has no {MANIFEST}; {_AGAIN}")
        raise UserError(
            f"data: {path} was not written by pixelgen.data.prepare: it has no {MANIFEST}; for a folder of "
            "class folders set --data.name folder"
        )
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"data: {path / MANIFEST} must have format {FORMAT}, got {manifest.get('format')}")
    return manifest
