"""Optimizers by name: what they move, that a resume continues them, and that processes share them."""

import pytest
import torch
from processes import train
from training import FLOW_ONLY, QUICK, curve, fails_with, options, refused, start_trainer, train_steps

from pixelgen.config import load_config
from pixelgen.planning.plan import plan_report
from pixelgen.train import main
from pixelgen.training.optim import OPTIMIZERS, learning_rate

pytestmark = pytest.mark.usefixtures("no_curves")
MUON = ("--optimizer.name", "muon")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_moved_by_one_optimizer_which_has_its_state(tmp_path, name, with_embedded):
    trainer = start_trainer(options(tmp_path, "run", 1, "--optimizer.name", name, "--loss.gate", "learned"))
    moved = [p for each in trainer.optimizers.main for group in each.param_groups for p in group["params"]]
    assert len(moved) == len({id(p) for p in moved}) == len(trainer.optimizers.parameters)
    assert all(optimizer.state[p] for optimizer in trainer.optimizers.main for p in optimizer.state)
    assert sum(len(optimizer.state) for optimizer in trainer.optimizers.main) == len(moved)
    before = [p.detach().clone() for p in moved]
    train_steps(trainer, 4)  # what is zero at first lets gradients through one layer after the other
    still = [p for p, old in zip(moved, before, strict=True) if torch.equal(p, old)]
    gate = {
        id(p) for p in trainer.objective.gate.parameters()
    }  # moves only where a sample is near its border
    assert all(id(p) in gate for p in still)


def test_muon_has_the_matrices_of_the_blocks_and_steps_as_large_as_adamw(tmp_path):
    sizes = {}
    for name in OPTIMIZERS:
        trainer = start_trainer(options(tmp_path, name, 3, *FLOW_ONLY, "--optimizer.name", name))
        matrices = {key: p for key, p in trainer.model.blocks.named_parameters() if p.ndim == 2}
        if name == "muon":
            (group,) = trainer.optimizers.main[0].param_groups
            assert {id(p) for p in group["params"]} == {id(p) for p in matrices.values()}
        train_steps(trainer, 4)
        before = {key: p.detach().clone() for key, p in matrices.items()}
        train_steps(trainer, 1)
        sizes[name] = {key: (p - before[key]).square().mean().sqrt().item() for key, p in matrices.items()}
    for key, size in sizes["muon"].items():
        assert 0.1 * sizes["adamw"][key] < size < 10 * sizes["adamw"][key], key


def test_a_resume_with_muon_is_bit_equal(tmp_path):
    common = [*FLOW_ONLY, *MUON, "--train.checkpoint_every", "2", "--train.log_every", "1"]
    assert main(options(tmp_path, "whole", 4, *common)) == 0
    assert main(options(tmp_path, "parts", 2, *common)) == 0
    assert main(["--resume", str(tmp_path / "parts"), "--train.max_steps", "4"]) == 0
    whole, parts = (curve(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_muon_on_two_processes_is_that_of_one(tmp_path, mode):
    common = [*QUICK, *FLOW_ONLY, *MUON, "--out_dir", str(tmp_path), "--train.max_steps", "6"]
    common += ["--train.log_every", "1", "--threads", "1", "--optimizer.warmup_steps", "0"]
    for name, processes, more in (("one", 1, []), ("two", 2, ["--parallel.mode", mode])):
        train([*common, "--name", name, *more], processes, log=tmp_path / f"log_{name}")
    ours, theirs = (curve(tmp_path / name) for name in ("two", "one"))
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), line["step"]


def test_the_learning_rate_changes_at_given_steps():
    changes = ("--optimizer.lr_changes", "[[6, 0.25], [9, 0.5]]")
    more = ("--optimizer.schedule", "constant", "--optimizer.lr", "1", "--optimizer.warmup_steps", "4")
    config, _ = load_config([*more, *changes])
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.5, 0.5]
    early, _ = load_config([*more, "--optimizer.lr_changes", "[[2, 0.1]]"])  # warm-up is of the first rate
    assert [learning_rate(early, step) for step in range(4)] == [0.25, 0.5, 0.1, 0.1]


@pytest.mark.parametrize(
    ("changes", "schedule", "said"),
    [
        ("[[6, 0.1]]", "cosine", "must be empty with optimizer.schedule cosine, got ((6, 0.1),)"),
        ("[[6, 0.1], [6, 0.2]]", "constant", "must have rising steps and rates above 0"),
        ("[[6, 0.1], [4, 0.2]]", "constant", "must have rising steps and rates above 0"),
        ("[[6, 0]]", "constant", "must have rising steps and rates above 0"),
        ("[[-1, 0.1]]", "constant", "must have rising steps and rates above 0"),
    ],
)
def test_changes_of_the_learning_rate_that_are_refused(capsys, changes, schedule, said):
    error = fails_with(capsys, ["--optimizer.schedule", schedule, "--optimizer.lr_changes", changes])
    assert f"optimizer.lr_changes {said}" in error


def test_changes_of_the_learning_rate_may_come_at_a_resume(tmp_path):
    more = ("--optimizer.schedule", "constant", "--train.log_every", "1", "--optimizer.warmup_steps", "0")
    assert main(options(tmp_path, "run", 2, *FLOW_ONLY, *more, "--optimizer.lr", "1e-3")) == 0
    changes = ("--optimizer.lr_changes", "[[3, 1e-4]]")
    assert main(["--resume", str(tmp_path / "run"), "--train.max_steps", "5", *changes]) == 0
    assert [line["lr"] for line in curve(tmp_path / "run")] == [1e-3, 1e-3, 1e-3, 1e-4, 1e-4]


def test_what_is_refused(tmp_path, capsys):
    common = ["--out_dir", str(tmp_path), *FLOW_ONLY]
    error = refused(capsys, main, [*common, "--optimizer.name", "lion"])
    assert "--optimizer.name: must be adamw|muon, got 'lion'" in error
    error = fails_with(capsys, [*common, *MUON, "--optimizer.skip_grad_norm", "5"])
    assert "optimizer.skip_grad_norm must be null with optimizer.name muon, got 5.0" in error
    assert main(options(tmp_path, "run", 1, *FLOW_ONLY)) == 0
    error = fails_with(capsys, ["--resume", str(tmp_path / "run"), "--train.max_steps", "2", *MUON])
    assert "optimizer.name cannot change so at a resume" in error


def test_the_plan_counts_what_muon_keeps():
    of = {
        name: plan_report(load_config(["--config", "jit-b-256", "--optimizer.name", name])[0], "8xH100")
        for name in OPTIMIZERS
    }
    assert "  AdamW  " in of["adamw"] and "  Muon and AdamW  " in of["muon"]

    def checkpoint(text: str) -> float:
        return float(text.split("\n  one ")[1].split()[0])

    assert checkpoint(of["muon"]) < 0.9 * checkpoint(of["adamw"])  # one average of a matrix, not two
