"""The suite of the data: how fast images are decoded, read from shards, and handed over by the loader."""

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.measure import Timing, in_turns, summarise
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from pixelgen.data.crop import center_crop, halve, near_center_crop
from pixelgen.data.decode import read_image
from pixelgen.data.loader import build_loader
from pixelgen.data.order import Share, shuffled_indices
from pixelgen.data.prepare.command import PrepareOptions, prepare, usable_cpus
from pixelgen.data.source import Source
from pixelgen.data.sources.folder import ClassFolder
from pixelgen.data.sources.prepared import PreparedImages

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

        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
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


def data_row(case: str, provider: str, shape: str, timing: Timing, off: int) -> Row:
    """A row; times are per image."""
    return row(case, provider, timing, shape=shape, images_per_s=1e3 / timing.median_ms, levels=off)


class Files:
    """JPEGs, their exact crops, and a folder and shards of those of the first size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._scratch = tempfile.TemporaryDirectory()  # goes with this object
        self.folder, self.prepared = Path(self._scratch.name, "folder"), Path(self._scratch.name, "prepared")
        self.pictures = {
            sides: [natural(*sides, seed) for seed in range(size.pictures)] for sides in size.sides
        }
        make_folder(self.folder, self.pictures[size.sides[0]], size.copies)
        wanted = PrepareOptions(
            src=str(self.folder), dst=str(self.prepared), resolution=size.image_size, workers=0
        )
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
            prepare(wanted)


def decode_rows(
    run: Run, files: Callable[[], Files], names: list[str], sides: tuple[int, int]
) -> Iterator[Row]:
    """Rows of the case `decode` for one picture size, the first one with the shards made of it."""
    size, pictures = files().size, files().pictures[sides]
    shape = f"{sides[0]}x{sides[1]} to {size.image_size}"
    exact = [decode("pil", data, size.image_size) for data in pictures]
    once, off = {}, {}
    for name in (name for name in DECODERS if name in names):
        got = (decode(name, data, size.image_size) for data in pictures)
        off[name] = max(map(levels, got, exact))
        once[name] = partial(_decode_all, name, pictures, size.image_size)
    if sides == size.sides[0]:
        data = PreparedImages(files().prepared, size.image_size)
        for name in (name for name in READERS if name in names):
            order = np.arange(len(data))
            if name == "prepared_random":
                order = np.random.default_rng(0).permutation(order)
            # The listing has the copies of a class one after the other, each with all pictures.
            off[name] = max(levels(data[index][0].numpy(), exact[index % size.pictures]) for index in order)
            once[name] = partial(_read_all, data, order)
    right = {}
    for name, call in once.items():
        bound = DECODERS.get(name, 0)
        if bound is not None and off[name] > bound:
            run.wrong(shape, name, f"it is {off[name]} grey levels off")
        else:
            right[name] = call
    for name, timing in in_turns(right, run.arguments.repeats).items():
        yield data_row("decode", name, shape, timing, off[name])


def _decode_all(name: str, pictures: list[bytes], size: int) -> float:
    return cpu_ms(lambda: [decode(name, data, size) for data in pictures], len(pictures))


def _read_all(data: PreparedImages, order: np.ndarray) -> float:
    batches = np.array_split(order, max(1, len(order) // 64))
    return cpu_ms(lambda: [data.batch(batch) for batch in batches], len(order))


def worker_counts() -> list[int]:
    """Numbers of workers to time: none, and powers of two up to the number of CPUs."""
    return [count for count in WORKERS if count <= usable_cpus()]


def loader_rows(
    run: Run, files: Callable[[], Files], names: list[str], batch: int, workers: int
) -> Iterator[Row]:
    """Rows of the case `loader`: wall time per image with some number of workers."""
    size, folder, prepared = files().size, files().folder, files().prepared
    side = size.image_size
    datasets: dict[str, Source] = {
        "folder": ClassFolder(folder, side),
        "folder_fast": ClassFolder(folder, side, crop="fast"),
        "prepared": PreparedImages(prepared, side),
    }
    for name in (name for name in LOADERS if name in names):
        shape = f"workers={workers} B={batch} {side}"
        run.show(f"{name} {shape}")
        order = shuffled_indices(0, len(datasets[name]), Share(batch, seed=0))
        expected = datasets["folder"].batch(order)[0].numpy()
        loader = build_loader(datasets[name], batch, seed=0, num_workers=workers)
        with contextlib.closing(loader):
            off = levels(next(loader).images.numpy(), expected)
            if off > (2 if name == "folder_fast" else 0):
                run.wrong(shape, name, f"it is {off} grey levels off")
                continue
            batches = size.batches * (8 if name == "prepared" else 1)  # calls of similar length
            milliseconds = []
            for _ in range(1 + (run.arguments.repeats or 5)):  # the first call empties what was read ahead
                begin = time.perf_counter()
                for _ in range(batches):
                    next(loader)
                milliseconds.append((time.perf_counter() - begin) * 1e3 / (batches * batch))
        yield data_row("loader", name, shape, summarise(milliseconds[1:]), off)


def parts(run: Run) -> list[Part]:
    names = run.chosen("providers", PROVIDERS, always=("pil", "folder"))  # what the others are held against
    size = Size()
    files = cache(lambda: Files(size))
    batch = run.arguments.batch or 64
    decoding = [
        Part(
            case="decode",
            label="decode {}x{}".format(*sides),
            rows=partial(decode_rows, run, files, names, sides),
        )
        for sides in size.sides
    ]
    loading = [
        Part(
            case="loader",
            label=f"loader, {workers} workers",
            rows=partial(loader_rows, run, files, names, batch, workers),
        )
        for workers in worker_counts()
    ]
    return [*decoding, *loading]


SUITE = Suite(
    name="data",
    parts=parts,
    baselines=("pil", "folder"),
    plots={"": ("images_per_s",)},
    device="cpu",
)
