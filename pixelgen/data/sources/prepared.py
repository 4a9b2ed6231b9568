"""Images that `pixelgen.data.prepare` decoded, mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pixelgen.data.shards import FORMAT, MANIFEST, SETTINGS, open_shard, read_json
from pixelgen.errors import UserError


class PreparedImages:
    """The images of a folder that ``python -m pixelgen.data.prepare`` wrote, in the order of its source.

    Nothing is decoded or held in memory: a batch is copied out of the mapped files, one copy an image.

    Attributes:
        image_size, channels: every image is (channels, image_size, image_size).
        labels: (len,) int64, one per image.
        num_classes, class_names: number and names of the classes.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int, channels: int = 3) -> None:
        """Opens the shards.

        Args:
            path: the folder.
            image_size: side of the images it must hold.
            channels: channels of the images it must hold.

        Raises:
            FileNotFoundError: path does not exist.
            UserError: it was not written by prepare, is incomplete or damaged, or holds other images.
        """
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        for option, name, asked in (
            ("image_size", "resolution", image_size),
            ("channels", "channels", channels),
        ):
            if manifest[name] != asked:
                raise UserError(
                    f"data: {path} holds images of {name} {manifest[name]} but {option} is {asked}; set "
                    f"--data.{option} {manifest[name]} or prepare it again"
                )
        self.image_size = image_size
        self.channels = channels
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.num_classes = len(self.class_names)
        self._shards = manifest["shards"]
        # First image of every shard, and the number of all.
        self._starts = np.cumsum([0, *(shard["num_images"] for shard in self._shards)])
        self._open()
        labels = [batch.column(1).to_numpy() for batch in self._batches]
        self.labels: Tensor = torch.from_numpy(np.concatenate(labels).astype(np.int64))

    def _open(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._images: list[np.ndarray] = []  # (n, C, H, W) uint8 views of the files
        shape = (self.channels, self.image_size, self.image_size)
        for shard in self._shards:
            file = self.path / shard["name"]
            if not file.exists():
                raise UserError(f"data: {file} is missing; {_AGAIN}")
            if file.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"data: {file} must have {shard['bytes']} bytes, got {file.stat().st_size}; {_AGAIN}"
                )
            batch = open_shard(file)
            if len(batch) != shard["num_images"] or batch.schema.types[0] != pa.binary(int(np.prod(shape))):
                raise UserError(f"data: {file} does not hold what {MANIFEST} says; {_AGAIN}")
            pixels = np.frombuffer(
                batch.column(0).buffers()[1], dtype=np.uint8, count=len(batch) * np.prod(shape)
            )
            self._batches.append(batch)
            self._images.append(pixels.reshape(-1, *shape))

    # Sent to a spawned worker, the files are mapped again there; their bytes are not.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the path below its source of image ``index``."""
        shards, rows = self._find([index])
        return self._batches[shards[0]].column(2)[int(rows[0])].as_py()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns image ``index`` as uint8 (C, H, W) and its label."""
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the images (B, C, H, W) uint8 and labels (B,) int64 of ``indices`` (B,)."""
        shards, rows = self._find(indices)
        images = np.empty((len(rows), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for image, shard, row in zip(images, shards.tolist(), rows.tolist(), strict=True):
            image[...] = self._images[shard][row]
        return torch.from_numpy(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def _find(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row (B,) of images."""
        index = np.asarray(indices, dtype=np.int64)
        if ((index < 0) | (index >= len(self))).any():
            raise IndexError(f"PreparedImages: indices must lie in [0, {len(self)}), got {indices}")
        shards = np.searchsorted(self._starts, index, side="right") - 1
        return shards, index - self._starts[shards]


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
