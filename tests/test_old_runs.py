"""A run that an older version wrote: what it holds is loaded exactly, and it goes on as it would have."""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from training import curve

from pixelgen import Pipeline
from pixelgen.config import load_config
from pixelgen.train import main
from pixelgen.training.processes.world import start_world
from pixelgen.training.start import resume_run

pytestmark = pytest.mark.usefixtures("no_curves")
# Written by the last version without families, by python -m pixelgen.train with
#   --name run --device cpu --threads 1 --train.batch_size 16 --train.sample_every 0 --sample.steps 2
#   --loss.alignment_weight 0 --loss.lpips_weight 0 --loss.p_dino_weight 0 --model.width 16 --model.heads 2
#   --model.depth 1 --model.in_context_start 0 --train.log_every 1 --train.checkpoint_every 4
#   --train.max_steps 4
# expected.json: hashes of all tensors, and the losses of its own resume to step 8.
ARCHIVE = Path(__file__).parent / "data" / "run_of_version_0.tar.xz"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def tensors(state: Mapping, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def test_its_tensors_are_loaded_exactly(old_run):
    expected = json.loads((old_run / "expected.json").read_text())["sha256"]
    config, _ = load_config(["--resume", str(old_run)])
    trainer = resume_run(old_run, config, start_world(config.device, config.parallel)).trainer
    found = {
        name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, value in tensors(trainer.state_dict())
    }
    assert trainer.step == 4 and len(expected) > 100
    assert found == {name: expected[name] for name in found}
    assert {name.split(".")[0] for name in expected} <= {name.split(".")[0] for name in found} | {"step"}


def test_it_goes_on_and_can_be_sampled(old_run):
    expected = json.loads((old_run / "expected.json").read_text())["losses"]
    assert main(["--resume", str(old_run), "--train.max_steps", "8"]) == 0
    losses = {str(line["step"]): line["loss"] for line in curve(old_run)}
    assert losses == {step: pytest.approx(loss, rel=1e-6) for step, loss in expected.items()}
    assert Pipeline.from_run(old_run).sample([0, 1], steps=2).shape == (2, 1, 8, 8)
