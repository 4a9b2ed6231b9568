"""Runs of PixelDiT: all terms train, a resumed run and one of two processes are those of one straight run."""

from __future__ import annotations

import math
import re
import signal

import pytest
import torch
from processes import EVERYTHING, differences, stored, train
from test_resume import stop_after
from training import curve, fails_with, options, start_trainer, train_steps

from pixelgen.train import main
from pixelgen.training.checkpoint import read as checkpoints

pytestmark = pytest.mark.usefixtures("no_curves")

DIGITS = ["--config", "pixeldit-digits", "--model.width", "32", "--model.heads", "2"]
# without embedded features, whose training takes seconds
TERMS_WITHOUT_NETWORKS = [
    "--loss.alignment_weight",
    "0",
    "--loss.lpips_weight",
    "0",
    "--loss.p_dino_weight",
    "0",
]
ALONE = [*TERMS_WITHOUT_NETWORKS, "--optimizer.schedule", "constant"]


def test_all_terms_are_trained_and_fall(tmp_path):
    quick = ["--optimizer.warmup_steps", "5", "--optimizer.lr", "0.003"]
    trainer = start_trainer(
        [*options(tmp_path, "run", 100), *DIGITS, *EVERYTHING, "--loss.balance", "global", *quick]
    )
    lines = train_steps(trainer, 60)
    assert {"adversarial", "discriminator"} <= lines[-1].keys()
    assert all(math.isfinite(value) for line in lines for value in line.values())
    for term in ("flow_matching", "alignment", "lpips", "p_dino"):
        early, late = (sum(line[term] for line in part) for part in (lines[:10], lines[-10:]))
        assert late < 0.85 * early, term


@pytest.mark.parametrize("model", [[], ["--model.recompute_modulation", "true", "--model.prediction", "x"]])
def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch, model):
    more = [*DIGITS, *ALONE, *model, "--train.log_every", "2"]
    assert main(options(tmp_path, "straight", 8, *more)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert main(options(tmp_path, "stopped", 8, *more)) == 128 + signal.SIGTERM
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000008"
    assert differences(*(stored(tmp_path / name) for name in ("straight", "stopped"))) == []
    assert curve(tmp_path / "straight")[-1]["loss"] == curve(tmp_path / "stopped")[-1]["loss"]


def test_what_the_weights_predict_is_compared(tmp_path, capsys):
    assert main(options(tmp_path, "velocity", 1, *DIGITS, *ALONE)) == 0
    run = tmp_path / "velocity"
    argv = options(tmp_path, "x", 1, *DIGITS, *ALONE, "--model.prediction", "x", "--init", str(run))
    error = fails_with(capsys, argv)
    assert re.search(r"--init: \S+ predicts velocity, and model.prediction is x", error)
    error = fails_with(capsys, ["--resume", str(run), "--model.prediction", "x"])
    told = r"model.prediction cannot change at a resume: it was velocity in \S+, and is x now"
    assert re.search(told, error)


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_are_one(tmp_path, mode):
    common = [*DIGITS, *ALONE, "--device", "cpu", "--threads", "1", "--train.batch_size", "12"]
    common += ["--train.sample_every", "0", "--train.log_every", "1", "--train.max_steps", "6"]
    common += ["--out_dir", str(tmp_path)]
    train([*common, "--name", "one"], log=tmp_path / "log")
    text = train([*common, "--name", "two", "--parallel.mode", mode], 2, log=tmp_path / "log")
    assert f"2 processes ({mode}, cpu)" in text
    for ours, theirs in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        for term in ("loss", "grad_norm"):
            assert ours[term] == pytest.approx(theirs[term], rel=2e-5), (ours["step"], term)
    ours, theirs = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.startswith(("model.", "ema.values.")):
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5, msg=key)


def test_the_alignment_may_read_what_leaves_the_last_patch_block(tmp_path, capsys):
    more = [*DIGITS, "--loss.alignment_layer"]
    trainer = start_trainer([*options(tmp_path, "run", 100), *more, "2"])
    assert train_steps(trainer, 1)[0]["alignment"] > 0
    error = fails_with(capsys, [*options(tmp_path, "other", 100), *more, "3"])
    assert "loss.alignment_layer must be at least 1 and at most 2, got 3" in error
