"""What the tests of data share: folders of images, tars, and batches of several ranks."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixelgen.data.loader import Batch


def fill(
    root: Path,
    classes: Sequence[str] = ("cat", "ant"),
    per_class: int = 5,
    side: tuple[int, int] = (14, 20),
    nested: str = "nested",
    kind: str = "png",
) -> Path:
    """A folder of classes of noise, width and height ``side``; every second image lies in a folder deeper."""
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name / nested).mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
            place = root / name / (nested if index % 2 else "")
            Image.fromarray(pixels).save(place / f"{index:03}.{kind}")
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels."""
    return batch.images, batch.condition["label"]


def assert_same(first: Sequence, second: Sequence) -> None:
    """Images and labels of batches, to the bit."""
    assert len(first) == len(second)
    for batch, other in zip(first, second, strict=True):
        assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])


def united(ranks: Iterable[Sequence]) -> list[tuple[torch.Tensor, ...]]:
    """The batches of a run from those of its ranks."""
    return [
        tuple(torch.cat([part[field] for part in parts]) for field in (0, 1))
        for parts in zip(*ranks, strict=True)
    ]
