"""The suite of the data: how fast images are decoded, read from shards, and handed over by the loader."""

import argparse
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import plots, report, setting, tables
from benchmarks.measure import Timing, in_turns, summarise
from pixelgen.data.crop import center_crop, halve, near_center_crop
from pixelgen.data.decode import read_image
from pixelgen.data.folder import ClassFolder
from pixelgen.data.loader import ImageDataset, build_loader, stream_indices
from pixelgen.data.prepare import PrepareOptions, prepare
from pixelgen.data.prepared import PreparedImages
from pixelgen.errors import UserError

# Grey levels from the exact crop that a provider may be off by; None: it is timed to show what it would cost.
DECODERS: dict[str, int | None] = {
    "pil": 0,
    "simplejpeg+pil": 0,
    "center": 0,
    "torchvision": 2,
    "fast": 2,
    "dct": None,
}
READERS = ("prepared", "prepared_random")
LOADERS = ("folder", "folder_fast", "prepared")
PROVIDERS = list(dict.fromkeys((*DECODERS, *READERS, *LOADERS)))
WORKERS = (0, 1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is timed.

    Attributes:
        image_size: side of the squares that are cut.
        sides: width and height of the pictures; those of the loader and the shards come first.
        pictures: of each size, all different.
        copies: files of each picture in the folder, for shards that are larger than a cache.
        batches: that the loader yields in one timed call.
    """

    image_size: int = 256
    sides: tuple[tuple[int, int], ...] = ((500, 375), (375, 500), (1024, 768))
    pictures: int = 16
    copies: int = 48
    batches: int = 4


def natural(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90: smooth noise at scales from the whole picture down to two pixels."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    strength = 1.0
    for cells in 2 ** np.arange(1, 9):
        grid = rng.normal(size=(min(cells, height), min(cells, width), 3)).astype(np.float32)
        for band in range(3):
            layer = Image.fromarray(grid[..., band]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., band] += strength * np.asarray(layer)
        strength *= 0.6
    pixels = 127 + 55 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def adm(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop, step by step as it was published, (3, size, size)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(sides, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size].transpose(2, 0, 1))


def decode(provider: str, data: bytes, size: int) -> np.ndarray:
    """Decodes and crops one picture, (3, size, size)."""
    if provider == "pil":
        return adm(Image.open(io.BytesIO(data)).convert("RGB"), size)
    if provider in ("center", "fast"):
        return read_image(data, size, 3, provider)
    if provider == "simplejpeg+pil":
        image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
        return np.ascontiguousarray(center_crop(image, size).transpose(2, 0, 1))
    if provider == "torchvision":
        from torchvision.io import ImageReadMode, decode_jpeg

        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return near_center_crop(_halved(pixels, size), size)
    # The decoder itself scales by a power of two, in place of the halving.
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size))
    return near_center_crop(_halved(pixels.permute(2, 0, 1), size), size)


def _halved(pixels: torch.Tensor, size: int) -> torch.Tensor:
    if min(pixels.shape[1:]) < 2 * size:
        return pixels
    image = halve(Image.fromarray(pixels.permute(1, 2, 0).numpy()), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(got: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two images of uint8."""
    return int(np.abs(got.astype(np.int16) - expected).max())


def make_folder(root: Path, pictures: list[bytes], copies: int) -> Path:
    """A folder of two classes that holds every picture so often."""
    for copy in range(copies):
        folder = root / f"class{copy % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(pictures):
            (folder / f"{copy:03d}_{index:03d}.jpg").write_bytes(data)
    return root


def cpu_ms(call: Callable[[], object], images: int) -> float:
    """Milliseconds that one core spends on an image, whatever else the machine does."""
    begin = time.process_time()
    call()
    return (time.process_time() - begin) * 1e3 / images


def row(op: str, provider: str, shape: str, timing: Timing, off: int) -> report.Row:
    """A row without the columns of `setting`; times are per image."""
    return {
        "op": op,
        "provider": provider,
        "shape": shape,
        "median_ms": f"{timing.median_ms:.4g}",
        "p20_ms": f"{timing.p20_ms:.4g}",
        "p80_ms": f"{timing.p80_ms:.4g}",
        "images_per_s": f"{1e3 / timing.median_ms:.4g}",
        "levels": str(off),
    }


def decode_rows(
    size: Size, root: Path, names: list[str], repeats: int | None, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of the op `decode`: each picture size, and for the first one the shards made of it."""
    for place, (width, height) in enumerate(size.sides):
        shape = f"{width}x{height} to {size.image_size}"
        bar.set_postfix_str(shape)
        pictures = [natural(width, height, seed) for seed in range(size.pictures)]
        exact = [decode("pil", data, size.image_size) for data in pictures]
        once, off = {}, {}
        for name in (name for name in DECODERS if name in names):
            got = (decode(name, data, size.image_size) for data in pictures)
            off[name] = max(map(levels, got, exact))
            once[name] = partial(_decode_all, name, pictures, size.image_size)
        if place == 0:
            make_folder(root / "folder", pictures, size.copies)
            prepare(
                PrepareOptions(
                    src=str(root / "folder"),
                    dst=str(root / "prepared"),
                    resolution=size.image_size,
                    workers=0,
                )
            )
            data = PreparedImages(root / "prepared", size.image_size)
            for name in (name for name in READERS if name in names):
                order = np.arange(len(data))
                if name == "prepared_random":
                    order = np.random.default_rng(0).permutation(order)
                # The listing has the copies of a class one after the other, each with all pictures.
                off[name] = max(
                    levels(data[index][0].numpy(), exact[index % size.pictures]) for index in order
                )
                once[name] = partial(_read_all, data, order)
        right = {}
        for name, call in once.items():
            bound = DECODERS.get(name, 0)
            if bound is not None and off[name] > bound:
                tqdm.write(f"{shape}: {name} is {off[name]} grey levels off and not timed")
            else:
                right[name] = call
        for name, timing in in_turns(right, repeats).items():
            yield row("decode", name, shape, timing, off[name])
        bar.update()


def _decode_all(name: str, pictures: list[bytes], size: int) -> float:
    return cpu_ms(lambda: [decode(name, data, size) for data in pictures], len(pictures))


def _read_all(data: PreparedImages, order: np.ndarray) -> float:
    batches = np.array_split(order, max(1, len(order) // 64))
    return cpu_ms(lambda: [data.batch(batch) for batch in batches], len(order))


def worker_counts() -> list[int]:
    """Numbers of workers to time: none, and powers of two up to the number of CPUs."""
    return [count for count in WORKERS if count <= len(os.sched_getaffinity(0))]


def loader_rows(
    size: Size, root: Path, names: list[str], batch: int, repeats: int | None, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of the op `loader`: wall time per image with some numbers of workers."""
    side = size.image_size
    datasets: dict[str, ImageDataset] = {
        "folder": ClassFolder(root / "folder", side),
        "folder_fast": ClassFolder(root / "folder", side, crop="fast"),
        "prepared": PreparedImages(root / "prepared", side),
    }
    for workers in worker_counts():
        for name in (name for name in LOADERS if name in names):
            shape = f"workers={workers} B={batch} {side}"
            bar.set_postfix_str(f"{name} {shape}")
            order = stream_indices(0, dataset_size=len(datasets[name]), batch_size=batch, seed=0)
            expected = datasets["folder"].batch(order)[0].numpy()
            loader = build_loader(datasets[name], batch, seed=0, num_workers=workers)
            try:
                off = levels(next(loader).images.numpy(), expected)
                if off > (2 if name == "folder_fast" else 0):
                    tqdm.write(f"{shape}: {name} is {off} grey levels off and not timed")
                    continue
                batches = size.batches * (8 if name == "prepared" else 1)  # calls of similar length
                milliseconds = []
                for _ in range(1 + (repeats or 5)):  # the first call empties what was read ahead
                    begin = time.perf_counter()
                    for _ in range(batches):
                        next(loader)
                    milliseconds.append((time.perf_counter() - begin) * 1e3 / (batches * batch))
                yield row("loader", name, shape, summarise(milliseconds[1:]), off)
            finally:
                loader.close()
                bar.update()


def run(arguments: argparse.Namespace, size: Size | None = None) -> int:
    """Times what the command line asks for, writes CSV, table and plot, prints the ratios.

    Returns:
        0, or 1 when a provider was wrong somewhere.
    """
    if arguments.device == "cuda":
        raise UserError("--device must be cpu with --suite data: images are decoded there")
    arguments.device = "cpu"
    names = setting.chosen("--providers", arguments.providers, PROVIDERS)
    names = list(dict.fromkeys(("pil", "folder", *names)))  # what the others are held against
    size = size or Size()
    _, columns, folder = setting.start(arguments)
    batch = arguments.batch or 64
    path = folder / "data.csv"
    rows: list[report.Row] = []
    num_loaders = len(worker_counts()) * sum(name in names for name in LOADERS)
    with (
        tempfile.TemporaryDirectory() as root,
        tqdm(total=len(size.sides) + num_loaders, unit="part", dynamic_ncols=True) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's decoder
        for timed in (
            decode_rows(size, Path(root), names, arguments.repeats, bar),
            loader_rows(size, Path(root), names, batch, arguments.repeats, bar),
        ):
            measured = [{**found, **columns} for found in timed]
            report.write_csv(path, report.DATA, measured)  # now: a run that is stopped keeps its rows
            rows.extend(measured)

    recorded = report.read_csv(path, columns)
    (folder / "data.md").write_text(tables.data(recorded))
    plots.data(recorded, folder / "data.png")
    print(tables.data_ratios(rows))
    print(f"\n{path} and, drawn from it, data.md and data.png")
    expected = len(size.sides) * sum(name in names for name in DECODERS)
    expected += sum(name in names for name in READERS) + num_loaders
    return 0 if len(rows) == expected else 1
