"""Hugging Face data sets read as a stream, shuffled and continued exactly.

An epoch visits the shards (files) in an order drawn from (seed, epoch). Their rows, one shard after the
other, are cut into blocks of ``data.shuffle_block``, and each block is shuffled on its own by (seed, epoch,
where it begins). So a position is four numbers, the same on every rank: the epoch, the shard and row where
the current block begins, and how much of it is used up. Continuing reads that block again. Every rank reads
the whole stream and decodes its own part of each batch: batches do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixelgen.data.encoded import read_or_next
from pixelgen.data.hub import HubOptions, cell_name, encoded_image, one_line, open_images, readable_errors
from pixelgen.data.order import Share, permutation
from pixelgen.data.source import Broken, ReadBatch, Source
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from pixelgen.data.options import DataConfig


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


_Batch = list[tuple[list[Row], int]]  # for each image the rows of its block, and its place among them


class _Position(NamedTuple):
    """Where a batch begins; saved as it is."""

    step: int = 0
    epoch: int = 0
    shard: int = 0
    row: int = 0
    offset: int = 0


class HubStream(Source):
    """A data set that is read from beginning to end, over and over.

    It has no length and no list of labels. Every process that reads it holds two blocks of encoded images:
    one that is being used up and the next one.
    """

    def __init__(self, data: DataConfig, options: HubOptions) -> None:
        """Opens the stream and reads which columns it has."""
        self._path, self._block_size = str(options.path), options.shuffle_block
        self._rows, self._columns = open_images(options, data.num_classes)
        super().__init__(data.image_size, data.channels, self._columns.class_names, crop=options.crop)
        self._share, self._position, self._threads = Share(1, seed=0), _Position(), 1
        self._batches: Iterator[tuple[_Batch, _Position]] | None = None

    def begin(self, share: Share, state: Mapping[str, int] | None, threads: int) -> HubStream:
        """The same stream at a position, to read from with one thread or more.

        Raises:
            ValueError: the state is of another step.
            UserError: the stream is not the one that the state was saved with, or the state is missing.
        """
        if not state and share.start_step > 0:
            raise UserError(
                f"data: a stream cannot begin at step {share.start_step}: the checkpoint is of data that was "
                f"not streamed; set --data.streaming false"
            )
        position = _Position(**{name: state[name] for name in _Position._fields}) if state else _Position()
        placed = copy(self)
        placed._share, placed._position, placed._threads = share, position, max(1, threads)
        placed._batches = None
        for name, now in placed.state_dict().items():
            if state and state[name] != now:
                raise UserError(
                    f"data: a stream continues only with the same {name}: it was {state[name]}, now it "
                    f"is {now}"
                )
        if position.step != share.start_step:
            raise ValueError(
                f"build_loader: state must be that of step {share.start_step}, got {position.step}"
            )
        return placed

    def state_dict(self) -> dict[str, int]:
        """The position, and what it depends on."""
        fixed = {"num_shards": self._rows.num_shards, "shuffle_block": self._block_size}
        return {**self._position._asdict(), "seed": self._share.seed, **fixed}

    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        """Reads the places ``order`` of the next batch."""
        if self._batches is None:
            # A copy reads: a stream that its own generator refers to would stay in memory after its loader.
            self._batches = copy(self)._read_batches()
            self._pool = ThreadPoolExecutor(self._threads)
        batch, self._position = next(self._batches)
        own = [batch[place] for place in order]
        done = list(self._pool.map(self._read_one, own, [None] * len(own) if draws is None else draws))
        return ReadBatch(
            np.stack([image for image, _, _ in done]),
            np.array([label for _, label, _ in done], dtype=np.int64),
            [image for _, _, broken in done for image in broken],
            sum(bool(broken) for _, _, broken in done),
        )

    def _read_one(
        self, asked: tuple[list[Row], int], draws: np.ndarray | None
    ) -> tuple[np.ndarray, int, list[Broken]]:
        from pixelgen.data.decode import read_image

        rows, index = asked

        def read(index: int) -> np.ndarray:
            image = encoded_image(rows[index].cell)
            return read_image(image, self.image_size, self.channels, self.crop, draws)

        image, found, broken = read_or_next(read, index, len(rows), lambda index: rows[index].name)
        return image, rows[found].label, broken

    def _read_batches(self) -> Iterator[tuple[_Batch, _Position]]:
        """Whole batches from the position on, and where the next one begins."""
        batch_size, seed = self._share.batch_size, self._share.seed
        step, epoch, shard, row, offset = self._position
        with ThreadPoolExecutor(1) as reader:
            blocks = _read_ahead(self._blocks(seed, epoch, shard, row), reader, seed)
            block, order = next(blocks)
            if offset > len(order):
                raise UserError(
                    f"data: {self._path} has changed: fewer rows than when the checkpoint was saved"
                )
            while True:
                batch: _Batch = []
                while len(batch) < batch_size:
                    if offset == len(order):
                        (block, order), offset = next(blocks), 0
                    part = order[offset : offset + batch_size - len(batch)]
                    batch += [(block.rows, int(index)) for index in part]
                    offset += len(part)
                step += 1
                yield batch, _Position(step, block.epoch, block.shard, block.row, offset)

    def _blocks(self, seed: int, epoch: int, shard: int, row: int) -> Iterator[Block]:
        """The blocks from a position on, endless."""
        while True:
            is_empty = (shard, row) == (0, 0)
            for block in self._blocks_of_epoch(seed, epoch, shard, row):
                is_empty = False
                yield block
            if is_empty:
                raise UserError(f"data: {self._path} holds no images")
            epoch, shard, row = epoch + 1, 0, 0

    def _blocks_of_epoch(self, seed: int, epoch: int, shard: int, row: int) -> Iterator[Block]:
        block = Block(epoch, shard, row, [])
        # Shards are files; a file's place in their random order is what "shard" counts.
        order = permutation(seed, epoch, self._rows.num_shards)
        for place in range(shard, len(order)):
            first = row if place == shard else 0
            for number, found in enumerate(self._read_shard(int(order[place]), first), start=first):
                block = block if block.rows else Block(epoch, place, number, [])
                block.rows.append(found)
                if len(block.rows) == self._block_size:
                    yield block
                    block = Block(epoch, shard, row, [])
        if block.rows:
            yield block

    def _read_shard(self, shard: int, first: int) -> Iterator[Row]:
        columns = self._columns
        column, *fields = columns.label
        try:
            rows = self._rows.shard(num_shards=self._rows.num_shards, index=shard).skip(first)
            for number, record in enumerate(rows, start=first):
                place = f"row {number} of shard {shard} of {self._path}"
                cell, label = record[columns.image], record[column]
                for field in fields:
                    label = (label or {}).get(field)
                yield Row(cell, columns.check_label(label, place), cell_name(cell, place))
        except UserError:
            raise
        except readable_errors() as error:
            raise UserError(f"data: cannot read shard {shard} of {self._path}: {one_line(error)}") from error


def _read_ahead(
    blocks: Iterator[Block], reader: ThreadPoolExecutor, seed: int
) -> Iterator[tuple[Block, np.ndarray]]:
    """Blocks and the random order of their rows; the next one is read while a block is used up."""
    coming = reader.submit(next, blocks)
    while True:
        block = coming.result()
        coming = reader.submit(next, blocks)
        yield block, permutation(seed, block.epoch, len(block.rows), (block.shard, block.row))
