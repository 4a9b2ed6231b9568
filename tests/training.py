"""What the tests of the training command share: short runs, single steps and messages about mistakes."""

import json
import re
from pathlib import Path

import pytest

from pixelgen.config import load_config
from pixelgen.config.command_line import run
from pixelgen.data import build_loader
from pixelgen.train import main
from pixelgen.training.processes.world import start_world
from pixelgen.training.start import start_run
from pixelgen.training.step import Trainer

FLOW_ONLY = ["--loss.alignment_weight", "0", "--loss.lpips_weight", "0", "--loss.p_dino_weight", "0"]
QUICK = ["--device", "cpu", "--train.batch_size", "16", "--train.sample_every", "0", "--sample.steps", "2"]


def options(tmp_path: Path, name: str, steps: int, *more: str) -> list[str]:
    return ["--out_dir", str(tmp_path), "--name", name, "--train.max_steps", str(steps), *QUICK, *more]


def unframed(text: str) -> str:
    """A message without the frame around it, in one line."""
    return " ".join(re.sub(r"[\u2500-\u257f]|--{9,}", " ", text).split())


def refused(capsys, call, *args, **named) -> str:
    """What is said about a command line that the parser refuses; exit code 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        call(*args, **named)
    assert stop.value.code == 2
    error = unframed(capsys.readouterr().err)
    assert error.endswith("--help") and "Traceback" not in error
    return error


def fails_with(capsys, argv: list[str], main=main, program: str = "pixelgen.train") -> str:
    """The one line that a user error prints; exit code 2, no traceback."""
    with pytest.raises(SystemExit) as exit_:
        run(main, program, argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1, error
    return error


def start_trainer(argv: list[str]) -> Trainer:
    """The trainer of a new run, for single steps."""
    config, _ = load_config(argv)
    return start_run(config, start_world(config.device, config.parallel)).trainer


def train_steps(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """The terms of a few steps on the run's own batches, without its log and checkpoints."""
    config = trainer.config
    batches = build_loader(
        trainer.dataset, config.train.batch_size, seed=config.seed, start_step=trainer.step
    )
    found = []
    for _ in range(steps):
        terms = trainer.train_step(*next(batches))
        found.append({name: value.item() for name, value in terms.items()})
    batches.close()
    return found


def curve(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
