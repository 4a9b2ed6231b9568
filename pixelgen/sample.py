"""``python -m pixelgen.sample``: images from a trained run, as PNGs, one grid and an ``.npz``."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pixelgen.config.command_line import parse, run
from pixelgen.config.resolve import pick_device
from pixelgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Samples images from a trained model.

    Writes one PNG per image, grid.png with one row per label, and samples.npz (arr_0 uint8 NHWC, arr_1
    labels: the form the ADM evaluator reads).

    Args:
        model: a run (runs/NAME), one of its checkpoints, or a .ckpt of the public PixelGen or PixelDiT code.
        size: architecture of a .ckpt file, such as PixelGen-XL/16 or PixelDiT-XL/16; runs know their own.
        image_size: side in pixels of a .ckpt file's images where it is not that of its size: 512 for the
            PixelDiT weights of that resolution; runs know their own.
        labels: class indices separated by commas, or "all".
        samples_per_label: images per label.
        guidance: scale of classifier-free guidance, 1 for none; null takes the run's setting.
        guidance_low: guidance acts from this t on; null takes the run's setting.
        guidance_high: guidance acts up to this t; null takes the run's setting.
        guidance_rule: how a time is tested, paper, released or pixeldit; null takes the run's setting.
        steps: solver steps; null takes the run's setting.
        sampler: euler, heun, heun-reuse, adams or flow_dpm; null takes the run's setting.
        timeshift: moves the steps towards the noise for values above 1; null takes the run's setting.
        weights: ema for the first of the averaged weights, raw, or the name of an average such as 0.9999.
        seed: of the starting noise; image i depends on the seed and i alone.
        batch_size: images drawn at once.
        device: auto, cpu or cuda.
        kernels: auto for the fused ops, eager for plain PyTorch.
        out: a new or empty folder; null makes samples/NAME-TIME.
    """

    model: str
    size: str | None = None
    image_size: int | None = None
    labels: str = "all"
    samples_per_label: int = 8
    guidance: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None
    guidance_rule: Literal["paper", "released", "pixeldit"] | None = None
    steps: int | None = None
    sampler: Literal["euler", "heun", "heun-reuse", "adams", "flow_dpm"] | None = None
    timeshift: float | None = None
    weights: str = "ema"
    seed: int = 0
    batch_size: int = 256
    device: str = "auto"
    kernels: Literal["auto", "eager"] = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples_per_label", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must lie in [0, 2^63), got {self.seed}")
        is_released = Path(self.model).suffix == ".ckpt"
        if is_released and self.size is None:
            raise UserError(
                f"{self.model}: a .ckpt does not name its architecture; give --size, such as PixelGen-XL/16"
            )
        for option, value in (("--size", self.size), ("--image-size", self.image_size)):
            if not is_released and value is not None:
                raise UserError(f"{self.model}: {option} is for .ckpt files; a run knows its architecture")


def parse_labels(text: str, num_classes: int) -> list[int]:
    """``"0,1,2"`` or ``"all"`` to class indices; a UserError where one is no number or no class."""
    if text == "all":
        return list(range(num_classes))
    labels = []
    for part in text.split(","):
        try:
            label = int(part)
        except ValueError:
            raise UserError(f"--labels must be numbers separated by commas, or all; got {part!r}") from None
        if not 0 <= label < num_classes:
            raise UserError(f"--labels must lie in [0, {num_classes - 1}], got {label}")
        labels.append(label)
    return labels


def new_folder(path: Path) -> Path:
    """Makes ``path``; a UserError where it holds anything."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples."""
    options = parse(SampleOptions, argv, prog="pixelgen.sample")

    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from pixelgen.sampling.images import save_grid
    from pixelgen.sampling.options import SampleConfig
    from pixelgen.sampling.pipeline import Pipeline

    torch.set_float32_matmul_precision("high")
    device = pick_device(options.device)
    if options.size is None:
        pipeline = Pipeline.from_run(
            options.model, weights=options.weights, device=device, kernels=options.kernels
        )
    else:
        pipeline = Pipeline.from_released(
            options.model,
            options.size,
            weights=options.weights,
            device=device,
            kernels=options.kernels,
            image_size=options.image_size,
        )
    labels = parse_labels(options.labels, pipeline.model.config.num_classes)
    labels = [label for label in labels for _ in range(options.samples_per_label)]
    name = Path(options.model).resolve().name.removesuffix(".ckpt")
    out = new_folder(Path(options.out or f"samples/{name}-{time.strftime('%Y%m%d-%H%M%S')}"))

    started = time.perf_counter()
    with tqdm(total=len(labels), desc="sampling", unit="img", dynamic_ncols=True) as bar:
        images = pipeline.sample(
            labels,
            **{field.name: getattr(options, field.name) for field in fields(SampleConfig)},
            seed=options.seed,
            batch_size=options.batch_size,
            progress=lambda done: bar.update(done - bar.n),
        )
    seconds = time.perf_counter() - started

    pixels = images.permute(0, 2, 3, 1).numpy()  # NHWC
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            out / f"{index:06d}_label{label}.png"
        )
    save_grid(images, out / "grid.png", columns=options.samples_per_label)
    np.savez(out / "samples.npz", arr_0=pixels, arr_1=np.array(labels))
    print(f"{len(labels)} images in {out}  NFE {pipeline.nfe}  {len(labels) / seconds:.1f} img/s")
    return 0


if __name__ == "__main__":
    run(main, "pixelgen.sample")
