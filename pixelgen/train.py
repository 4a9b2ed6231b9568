"""``python -m pixelgen.train``: trains a pixel diffusion transformer from a configuration."""

from __future__ import annotations

import os

from pixelgen.config import TrainConfig, load_config
from pixelgen.config.command_line import run
from pixelgen.errors import USER_ERRORS


def _plan(config: TrainConfig, gpus: str) -> str:
    from pixelgen.planning.plan import plan_report  # which imports torch

    return plan_report(config, gpus)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, trains, returns the exit code."""
    try:
        config, resume = load_config(argv, plan=_plan)
    except USER_ERRORS:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        return 2  # one process on each machine reports it: all have the same command line
    # torch is imported only after the command line has been checked.
    import torch

    from pixelgen.training.processes.world import leaving_together, start_world
    from pixelgen.training.start import continue_or_start, resume_run, start_run

    torch.set_float32_matmul_precision("high")
    if config.threads:
        torch.set_num_threads(config.threads)
    world = start_world(config.device, config.parallel)
    with leaving_together():
        config = world.on_main(lambda: config)  # a name made from the time differs
        if resume == "auto":
            return continue_or_start(config, world).train()
        return (start_run(config, world) if resume is None else resume_run(resume, config, world)).train()


if __name__ == "__main__":
    run(main, "pixelgen.train")
