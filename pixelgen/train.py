"""``python -m pixelgen.train``: trains a pixel diffusion transformer from a configuration."""

from __future__ import annotations

from pixelgen.cli import run
from pixelgen.config import load_config


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, trains, returns the exit code."""
    config, resume = load_config(argv)
    # torch is imported only after the command line has been checked.
    import torch

    from pixelgen.trainer import Trainer

    torch.set_float32_matmul_precision("high")
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer.start(config) if resume is None else Trainer.resume(resume, config)
    return trainer.train()


if __name__ == "__main__":
    run(main, "pixelgen.train")
