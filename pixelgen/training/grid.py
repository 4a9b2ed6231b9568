"""The grid of samples that a run draws as it trains."""

from __future__ import annotations

from torch import Tensor

from pixelgen.sampling.pipeline import Pipeline
from pixelgen.training.step import Trainer

ROWS, COLUMNS = 10, 8


def sample_grid(trainer: Trainer) -> Tensor:
    """Samples of the first average with fixed noise, (N, C, H, W) uint8: a row for each of up to 10 classes.

    Each process draws a part; all get the whole grid.
    """
    config, model, world = trainer.config, trainer.model, trainer.world
    pipeline = Pipeline(
        model,
        config.sample,
        t_eps=config.time.t_eps,
        noise_scale=config.time.noise_scale,
        dtype=config.dtype,
    )
    num_classes = model.config.num_classes
    rows = min(ROWS, num_classes)
    classes = [row * num_classes // rows for row in range(rows)]
    labels = [label for label in classes for _ in range(COLUMNS)]
    share = -(-len(labels) // world.size)
    first = world.rank * share
    own = [labels[place % len(labels)] for place in range(first, first + share)]
    with trainer.averages.exchanged(model, next(iter(trainer.averages.values))):
        model.eval()
        images = pipeline.sample(own, seed=config.seed, first_index=first)
        model.train()
    return world.gather_rows(images.to(trainer.device)).cpu()[: len(labels)]
