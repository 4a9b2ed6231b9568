"""Hugging Face data sets read as a stream, shuffled and continued exactly.

An epoch visits the shards (files) in an order drawn from (seed, epoch). Their rows, one shard after the
other, are cut into blocks of ``data.shuffle_block``, and each block is shuffled on its own by (seed, epoch,
where it begins). So a position is four numbers, the same on every rank: the epoch, the shard and row where
the current block begins, and how much of it is used up. Continuing reads that block again. Every rank reads
the whole stream and decodes its own part of each batch: batches do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from pixelgen.data.decode import read_image
from pixelgen.data.encoded import Broken, Crop, ReadBatch, read_or_next
from pixelgen.data.loader import Share, permutation
from pixelgen.data.options import DataConfig
from pixelgen.data.sources.hf import (
    cell_name,
    encoded,
    find_columns,
    one_line,
    only_images,
    open_rows,
    readable_errors,
)
from pixelgen.errors import UserError


class Row(NamedTuple):
    """One encoded image."""

    cell: dict[str, Any] | None
    label: int
    name: str


class Block(NamedTuple):
    """Rows that are shuffled among each other, and where they begin."""

    epoch: int
    shard: int
    row: int
    rows: list[Row]


class HubStream:
    """A data set that is read from beginning to end, over and over; `build_loader` makes batches of it.

    It has no length and no list of labels. Every process that reads it holds two blocks of encoded images:
    one that is being used up and the next one.

    Attributes:
        image_size, channels, crop: as in the config.
        num_classes, class_names: as of `HubImages`.
        num_shards: number of files that are visited in random order.
        shuffle_block: rows that are shuffled among each other.
    """

    def __init__(self, data: DataConfig) -> None:
        """Opens the stream and reads which columns it has.

        Args:
            data: as for `HubImages`, and shuffle_block.

        Raises:
            FileNotFoundError: data.path is no hub id and does not exist.
            UserError: it cannot be read or streamed, or its columns do not fit.
        """
        rows = open_rows(data)
        if rows.info.builder_name == "imagefolder":
            # One shard, sorted by class: blocks of it would hold a few classes each.
            raise UserError(f"data: {data.path} is a folder of images; set --data.streaming false")
        self.path = str(data.path)
        self.image_size, self.channels = data.image_size, data.channels
        self.crop: Crop = data.crop
        self.shuffle_block = data.shuffle_block
        self._columns = find_columns(rows, data)
        self.class_names = self._columns.class_names
        self.num_classes = len(self.class_names)
        rows = rows.select_columns([self._columns.image, self._columns.label])
        self._rows = only_images(rows, self._columns.image)
        self.num_shards: int = self._rows.num_shards

    def first(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Returns the first images of the stream, (count, C, H, W) uint8, and labels (count,) int64."""
        share = Share(batch_size=count, seed=seed, start_step=0, rank=0, world_size=1)
        got = next(iter(StreamBatches(self, share)))
        if isinstance(got, UserError):
            raise got
        return got[0].images, got[0].labels

    def blocks(self, seed: int, epoch: int, shard: int, row: int) -> Iterator[Block]:
        """The blocks from a position on, endless; rows are in stored order.

        Raises:
            UserError: the stream cannot be read, a label is not the number of a class, or it has no rows.
        """
        while True:
            is_empty = (shard, row) == (0, 0)
            for block in self._blocks_of_epoch(seed, epoch, shard, row):
                is_empty = False
                yield block
            if is_empty:
                raise UserError(f"data: {self.path} holds no images")
            epoch, shard, row = epoch + 1, 0, 0

    def _blocks_of_epoch(self, seed: int, epoch: int, shard: int, row: int) -> Iterator[Block]:
        block = Block(epoch, shard, row, [])
        order = permutation(seed, epoch, self.num_shards)  # a file's place in it is what "shard" counts
        for place in range(shard, self.num_shards):
            first = row if place == shard else 0
            for number, found in enumerate(self._read_shard(int(order[place]), first), start=first):
                block = block if block.rows else Block(epoch, place, number, [])
                block.rows.append(found)
                if len(block.rows) == self.shuffle_block:
                    yield block
                    block = Block(epoch, shard, row, [])
        if block.rows:
            yield block

    def _read_shard(self, shard: int, first: int) -> Iterator[Row]:
        columns = self._columns
        try:
            rows = self._rows.shard(num_shards=self.num_shards, index=shard).skip(first)
            for number, record in enumerate(rows, start=first):
                place = f"row {number} of shard {shard} of {self.path}"
                cell, label = record[columns.image], record[columns.label]
                if columns.label_field is not None:
                    label = (label or {}).get(columns.label_field)
                yield Row(cell, columns.check_label(label, place), cell_name(cell, place))
        except UserError:
            raise
        except readable_errors() as error:
            raise UserError(f"data: cannot read shard {shard} of {self.path}: {one_line(error)}") from error


@dataclass
class _Position:
    """Where a batch begins; saved as it is."""

    step: int
    epoch: int = 0
    shard: int = 0
    row: int = 0
    offset: int = 0


class StreamBatches(IterableDataset[Any]):
    """Batches of one rank, each with the state after it, for a DataLoader with at most one worker.

    Attributes:
        state: where the first batch begins.
    """

    def __init__(
        self, stream: HubStream, share: Share, state: dict[str, int] | None = None, *, threads: int = 0
    ) -> None:
        """Takes up a stream where a state left it.

        Args:
            stream: what to read.
            share: which part of every batch.
            state: what came with the batch before ``share.start_step``; None at step 0.
            threads: that decode; 0 is one, too.

        Raises:
            ValueError: the state is of another step.
            UserError: the stream is not the one that the state was saved with, or the state is missing.
        """
        self.stream, self.share, self.threads = stream, share, max(1, threads)
        self._fixed = {
            "seed": share.seed,
            "num_shards": stream.num_shards,
            "shuffle_block": stream.shuffle_block,
        }
        self._position = _Position(0)
        if not state and share.start_step > 0:
            raise UserError(
                f"data: a stream cannot begin at step {share.start_step}: the checkpoint is of data that was "
                f"not streamed; set --data.streaming false"
            )
        if state:
            for name, now in self._fixed.items():
                if state[name] != now:
                    raise UserError(
                        f"data: a stream continues only with the same {name}: it was {state[name]}, now it "
                        f"is {now}"
                    )
            self._position = _Position(**{name: state[name] for name in vars(self._position)})
        if self._position.step != share.start_step:
            raise ValueError(
                f"build_loader: state must be that of step {share.start_step}, got {self._position.step}"
            )
        self.state = self._state(self._position)

    def __iter__(self) -> Iterator[tuple[ReadBatch, dict[str, int]] | UserError]:
        start = self._position
        blocks = self.stream.blocks(self.share.seed, start.epoch, start.shard, start.row)
        try:
            with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self.threads) as pool:
                yield from self._read(_read_ahead(blocks, reader), pool)
        except UserError as error:
            yield error  # handed over, not raised: the DataLoader would make a traceback the message

    def _state(self, position: _Position) -> dict[str, int]:
        return {**vars(position), **self._fixed}

    def _read(
        self, blocks: Iterator[Block], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[ReadBatch, dict[str, int]]]:
        share, step, offset = self.share, self._position.step, self._position.offset
        block, order = self._next(blocks)
        if offset > len(order):
            raise UserError(
                f"data: {self.stream.path} has changed: fewer rows than when the checkpoint was saved"
            )
        while True:
            parts, place = [], 0
            while place < share.batch_size:
                if offset == len(order):
                    (block, order), offset = self._next(blocks), 0
                count = min(share.batch_size - place, len(order) - offset)
                # What of these is the rank's own.
                low = max(share.first, place) - place
                high = min(share.first + share.size, place + count) - place
                if low < high:
                    parts.append((block.rows, order[offset + low : offset + high]))
                place, offset = place + count, offset + count
            draws = share.crop_draws(step) if self.stream.crop == "random" else None
            step += 1
            position = _Position(step, block.epoch, block.shard, block.row, offset)
            yield self._decode(parts, draws, pool), self._state(position)

    def _next(self, blocks: Iterator[Block]) -> tuple[Block, np.ndarray]:
        block = next(blocks)
        start = (block.shard, block.row)
        return block, permutation(self.share.seed, block.epoch, len(block.rows), start)

    def _decode(
        self,
        parts: list[tuple[list[Row], np.ndarray]],
        draws: np.ndarray | None,
        pool: ThreadPoolExecutor,
    ) -> ReadBatch:
        rows = [rows for rows, indices in parts for _ in indices]
        indices = [int(index) for _, indices in parts for index in indices]
        each = draws if draws is not None else [None] * len(indices)
        done = list(pool.map(self._read_one, rows, indices, each))
        return ReadBatch(
            torch.from_numpy(np.stack([image for image, _, _ in done])),
            torch.tensor([row.label for _, row, _ in done]),
            [image for _, _, broken in done for image in broken],
            sum(bool(broken) for _, _, broken in done),
        )

    def _read_one(
        self, rows: list[Row], index: int, draws: np.ndarray | None
    ) -> tuple[np.ndarray, Row, list[Broken]]:
        stream = self.stream

        def read(index: int) -> np.ndarray:
            cell = rows[index].cell
            return read_image(encoded(cell), stream.image_size, stream.channels, stream.crop, draws)

        image, found, broken = read_or_next(read, index, len(rows), lambda index: rows[index].name)
        return image, rows[found], broken


def _read_ahead(blocks: Iterator[Block], reader: ThreadPoolExecutor) -> Iterator[Block]:
    """Reads a block while the one before it is used up, so that batches do not wait at its end."""
    coming = reader.submit(next, blocks)
    while True:
        block = coming.result()
        coming = reader.submit(next, blocks)
        yield block
