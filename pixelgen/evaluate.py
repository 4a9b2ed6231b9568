"""``python -m pixelgen.evaluate``: how good a run's samples are, in figures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from pixelgen.config.command_line import parse, run
from pixelgen.config.resolve import pick_device
from pixelgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Samples one image for each real label of the digits and compares with the real ones.

    Prints, per guidance scale: the Frechet distance on the 64 raw pixels (0-16 scale), the variance within
    classes as a share of the real one, and how often a classifier trained on the real digits agrees with the
    label.

    Args:
        model: a run (runs/NAME) or one of its checkpoints.
        guidance: guidance scales separated by commas.
        weights: ema for the first of the averaged weights, raw, or the name of an average such as 0.9999.
        seed: of the starting noise.
        steps: solver steps; null takes the run's setting.
        batch_size: images drawn at once.
        device: auto, cpu or cuda.
        out: a .json file for the figures; null prints only.
    """

    model: str
    guidance: str = "1.0,2.0"
    weights: str = "ema"
    seed: int = 0
    steps: int | None = None
    batch_size: int = 256
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must lie in [0, 2^63), got {self.seed}")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, samples and prints the figures."""
    options = parse(EvaluateOptions, argv, prog="pixelgen.evaluate")
    try:
        scales = [float(part) for part in options.guidance.split(",")]
    except ValueError:
        raise UserError(f"--guidance must be numbers separated by commas, got {options.guidance!r}") from None
    out = Path(options.out) if options.out else None
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another --out")

    import torch
    from tqdm import tqdm

    from pixelgen.data.sources.digits import Digits
    from pixelgen.evaluation.metrics import evaluate_digits
    from pixelgen.sampling.pipeline import Pipeline

    torch.set_float32_matmul_precision("high")
    pipeline = Pipeline.from_run(options.model, weights=options.weights, device=pick_device(options.device))
    config = pipeline.model.config
    if (config.num_classes, config.channels, config.image_height_width) != (10, 1, (8, 8)):
        raise UserError(
            f"{options.model} was not trained on the 8x8 digits, the only images that can be evaluated"
        )
    labels = Digits().labels
    figures = []
    for scale in scales:
        started = time.perf_counter()
        with tqdm(
            total=len(labels), desc=f"guidance {scale:g}", unit="img", leave=False, dynamic_ncols=True
        ) as bar:
            images = pipeline.sample(
                torch.from_numpy(labels),
                guidance=scale,
                steps=options.steps,
                seed=options.seed,
                batch_size=options.batch_size,
                progress=lambda done: bar.update(done - bar.n),
            )
        seconds = time.perf_counter() - started
        report = evaluate_digits(images.numpy(), labels)
        figures.append({"guidance": scale, **report, "nfe": pipeline.nfe, "img_per_s": len(labels) / seconds})
    print(f"{options.model}, {options.weights} weights, {len(labels)} samples, seed {options.seed}")
    print(f"{'guidance':>8}  {'Frechet':>8}  {'variance':>8}  {'agreement':>9}  {'NFE':>4}")
    for row in figures:
        print(
            f"{row['guidance']:8.2f}  {row['frechet_distance']:8.2f}  {row['variance_ratio']:8.3f}  "
            f"{row['svc_agreement']:9.4f}  {row['nfe']:4d}"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main, "pixelgen.evaluate")
