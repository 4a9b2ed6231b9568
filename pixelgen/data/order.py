"""Which images a batch holds: a function of (seed, step) alone.

Position ``p = step * batch_size + i`` of an endless order holds image ``permutation(seed, p // n)[p % n]`` of
the ``n`` images: a fresh shuffle per epoch, batches that run across epoch ends, any batch size. Nothing is
stored to resume: the loader starts at the step to continue from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CROP_STREAM = 4  # the Philox stream that places random crops; the trainer's own are 0 to 3


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process reads.

    Attributes:
        batch_size: images per step over all processes; world_size divides it.
        seed: of the shuffles and of random crops, any integer.
        start_step: step of the first batch, from 0.
        rank: which part, 0 <= rank < world_size.
        world_size: number of parts, which are consecutive: the whole batch does not depend on it.
    """

    batch_size: int
    seed: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def places(self) -> np.ndarray:
        """Places of the process's images in the whole batch, (batch_size // world_size,) int64."""
        size = self.batch_size // self.world_size
        return np.arange(self.rank * size, (self.rank + 1) * size, dtype=np.int64)

    def crop_draws(self, step: int) -> np.ndarray:
        """Uniform draws (batch_size // world_size, 3) float32 that place the random crops of its images."""
        import torch
        from pixelgen_kernels import philox_uniform

        places = torch.from_numpy(self.places)
        return philox_uniform(self.seed, step, places, 3, stream=CROP_STREAM).numpy()


def shuffled_indices(step: int, num_images: int, share: Share) -> np.ndarray:
    """Which of ``num_images`` images a process reads at a step, (batch_size // world_size,) int64."""
    left = share.batch_size // share.world_size
    first = step * share.batch_size + share.rank * left
    parts = []
    while left > 0:
        epoch, place = divmod(first, num_images)
        part = permutation(share.seed, epoch, num_images)[place : place + left]
        parts.append(part)
        first, left = first + len(part), left - len(part)
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
