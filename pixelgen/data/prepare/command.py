"""``python -m pixelgen.data.prepare SRC DST``: decodes a data set once, for training to read it as it lies.

The shards (`pixelgen.data.shards`) depend on the source and the settings alone, not on the number of workers
or on how often the command was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro
from tqdm import tqdm

from pixelgen.config.command_line import parse
from pixelgen.data.options import DataConfig
from pixelgen.data.prepare.decoder import decode_all, stored_path
from pixelgen.data.shards import FORMAT, MANIFEST, ShardFolder, replacing, shard_name, write_json
from pixelgen.data.source import SOURCES
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from pixelgen.data.encoded import EncodedImages

REPORT = "report.jsonl"
SHARD_BYTES, SHARD_ROWS = 2**28, 2**16  # of a shard by default; one shard is held in memory
CHUNK_BYTES, CHUNK_ROWS = 2**23, 64  # of what one worker decodes at a time


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Decodes and crops a data set into shards that training reads without decoding.

    python -m pixelgen.data.prepare SRC DST. A command that was stopped continues where it was when it is
    given again. DST/report.jsonl lists the images that cannot be read.

    Args:
        src: what to read; the first argument without an option.
        dst: folder to write; the second argument without an option.
        name: folder for a folder with one sub-folder of images per class; hf for a data set of the Hugging
            Face library: a hub id, or a folder or pattern of parquet files, webdataset tars or images.
        resolution: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        crop: center cuts the middle square exactly as ADM does; fast is within 2 grey levels of it.
        workers: processes that decode; 0 decodes in this one; null takes one per CPU.
        shard_size: source images per shard; null takes what fits into 256 MiB.
        max_broken: share of the images that may be unreadable; above it the command fails.
        subset: for hf, name of the data set's configuration, where it has several.
        split: for hf, the split.
        image_column: for hf, the column of the images; null finds it.
        label_column: for hf, the column of the class numbers; null finds it.
        num_classes: for hf, number of classes where the label column does not name them.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    name: Literal["folder", "hf"] = "folder"
    resolution: int = 256
    channels: int = 3
    crop: Literal["center", "fast"] = "center"
    workers: int | None = None
    shard_size: int | None = None
    max_broken: float = 0.01
    subset: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise UserError(f"--resolution must be at least 1, got {self.resolution}")
        if self.channels not in (1, 3):
            raise UserError(f"--channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must be 0 or more, got {self.workers}")
        if self.shard_size is not None and self.shard_size < 1:
            raise UserError(f"--shard-size must be at least 1, got {self.shard_size}")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"--max-broken must lie in [0, 1], got {self.max_broken}")

    @property
    def rows(self) -> int:
        """Source images per shard."""
        return self.shard_size or max(1, min(SHARD_ROWS, SHARD_BYTES // (self.channels * self.resolution**2)))


def usable_cpus() -> int:
    """CPUs that this process may use, where the system says; else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_source(options: PrepareOptions) -> EncodedImages:
    """Lists the images; FileNotFoundError where src does not exist."""
    if options.name == "folder" and not Path(options.src).exists():
        raise FileNotFoundError(f"folder {options.src} does not exist; a data set of the hub needs --name hf")
    chosen = SOURCES[options.name]
    shared = ("name", "channels", "num_classes", *chosen.options.__dataclass_fields__)
    given = {name: value for name, value in vars(options).items() if name in shared} | {"path": options.src}
    data = DataConfig(image_size=options.resolution, **given)
    return cast("EncodedImages", chosen.open(data, data.part(chosen.options)))


def describe(source: EncodedImages, options: PrepareOptions) -> dict[str, object]:
    """What the shards of a source depend on, as JSON. A folder that was moved is the same source."""
    listing = hashlib.sha256(source.labels.tobytes())
    if options.name == "folder":
        for index in range(len(source)):
            listing.update(stored_path(source, index).encode() + b"\0")
    else:
        listing.update(repr((options.src, options.subset, options.split, options.image_column)).encode())
    return {
        "format": FORMAT,
        "resolution": options.resolution,
        "channels": options.channels,
        "crop": options.crop,
        "shard_size": options.rows,
        "num_source_images": len(source),
        "class_names": list(source.class_names),
        "listing": listing.hexdigest(),
    }


def prepare(options: PrepareOptions) -> str:
    """Writes the folder, or what is missing in it.

    Returns:
        One line about what is there now.

    Raises:
        UserError: dst lies in src, or too much of it is broken.
    """
    started = time.perf_counter()
    if Path(options.src).is_dir() and Path(options.dst).resolve().is_relative_to(Path(options.src).resolve()):
        raise UserError(
            f"DST {options.dst} lies in SRC {options.src} and would be read as a part of it; choose a folder "
            "outside of SRC"
        )
    source = open_source(options)
    settings = describe(source, options)
    total = len(source)
    shards = _split(range(total), options.rows)
    chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (options.channels * options.resolution**2)))
    with (
        closing(ShardFolder(Path(options.dst), settings)) as folder,
        tqdm(total=total, desc="preparing", unit="img", dynamic_ncols=True) as bar,
    ):
        broken, missing = [], {}
        for number, indices in enumerate(shards):
            found = folder.broken(number, len(indices))
            if found is None:
                missing[number] = _split(indices, chunk_rows)
            else:
                broken += found
                bar.update(len(indices))
        kept = bar.n
        _judge(broken, total, folder.path, options)
        chunks = chain.from_iterable(missing.values())
        workers = usable_cpus() if options.workers is None else options.workers
        with closing(decode_all(source, chunks, workers)) as decoded:
            for number, parts in missing.items():
                shard = []
                for part in parts:
                    shard.append(next(decoded))
                    broken += shard[-1].broken
                    bar.update(len(part))
                folder.write(number, shard)
                _judge(broken, total, folder.path, options)
        _finish(folder, settings, shards)
    seconds = time.perf_counter() - started
    speed = f"  {(total - kept) / seconds:.0f} img/s" if missing else ""
    notes = f"; {len(broken)} cannot be read, see {folder.path / REPORT}" if broken else ""
    return f"{total - len(broken)} images in {folder.path}{notes}{speed}"


def _judge(broken: list[tuple[str, str]], total: int, folder: Path, options: PrepareOptions) -> None:
    """Raises where too many images are broken; only their report is written then."""
    if len(broken) < total and len(broken) <= options.max_broken * total:
        return
    _report(folder, broken)
    path, reason = broken[0]
    raise UserError(
        f"{len(broken)} of {total} images cannot be read, more than --max-broken {options.max_broken:g} "
        f"allows, beginning with {path} ({reason}); all are in {folder / REPORT}"
    )


def _report(folder: Path, broken: list[tuple[str, str]]) -> None:
    with replacing(folder / REPORT) as file:
        for path, reason in broken:
            file.write(json.dumps({"path": path, "reason": reason}).encode() + b"\n")


def _split(indices: range, size: int) -> list[range]:
    return [indices[begin : begin + size] for begin in range(0, len(indices), size)]


def _finish(folder: ShardFolder, settings: dict[str, object], shards: list[range]) -> None:
    """Checks all shards and writes the report and the manifest."""
    listed, broken = [], []
    for number, indices in enumerate(shards):
        file = folder.path / shard_name(number)
        found = folder.broken(number, len(indices))
        if found is None:
            raise UserError(f"{file} was changed by another; give the command again")
        broken += found
        num_images = len(indices) - len(found)
        listed.append({"name": file.name, "num_images": num_images, "bytes": file.stat().st_size})
    _report(folder.path, broken)
    num_images = sum(map(len, shards)) - len(broken)
    write_json(
        folder.path / MANIFEST,
        {**settings, "num_images": num_images, "num_broken": len(broken), "shards": listed},
    )


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and prepares."""
    # SRC and DST may be given as options too.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--src", "--dst"):
        first.add_argument(option, nargs=1, default=[])
    known, rest = first.parse_known_args(argv)
    options = parse(PrepareOptions, [*known.src, *rest, *known.dst], prog="pixelgen.data.prepare")
    print(prepare(options))
    return 0
