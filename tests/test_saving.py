"""Checkpoints while training goes on: asynchronous, whole or absent, and never the last good one at risk."""

from __future__ import annotations

import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import SMALL, Job
from training import FLOW_ONLY, curve, fails_with, options

from pixelgen.sample import main as sample
from pixelgen.sampling.pipeline import Pipeline
from pixelgen.train import main
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.checkpoint.write import CheckpointWriter
from pixelgen.training.processes.world import World

pytestmark = pytest.mark.usefixtures("no_curves")


def make_state(value: float) -> dict:
    return {
        "model": {"weight": torch.full((4, 4), value)},
        "tables": {"table": torch.arange(3.0)},
        "ema": {"values": {"0.9": {"weight": torch.full((4, 4), value / 2)}}, "num_updates": 1},
        "step": int(value),
    }


def make_writer(run_dir: Path, keep: int = 0, keep_every: int = 0) -> CheckpointWriter:
    return CheckpointWriter(run_dir, World(torch.device("cpu")), keep, keep_every, {})


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is saved is the state at the start, though the weights change before a byte is written."""
    may_write, save = threading.Event(), dcp.save

    def late(*arguments, **named):
        assert may_write.wait(60)
        return save(*arguments, **named)

    monkeypatch.setattr(dcp, "save", late)
    writer, state = make_writer(tmp_path), make_state(1.0)
    begin = time.perf_counter()
    writer.start(1, state, "seed: 0\n")
    stall = time.perf_counter() - begin
    assert writer.last.seconds == 0 and not checkpoints.list_checkpoints(tmp_path)
    state["model"]["weight"].fill_(7.0)
    state["ema"]["values"]["0.9"]["weight"].fill_(7.0)
    may_write.set()
    done = writer.wait()
    assert done.error is None and stall < done.seconds
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    assert checkpoints.load_part(checkpoint, "model.")["weight"].eq(1.0).all()
    averages = checkpoints.load_ema_weights(checkpoint)
    assert averages["weight"].eq(0.5).all() and averages["table"].tolist() == [0, 1, 2]
    writer.start(2, make_state(2.0), "seed: 0\n")  # into the same memory
    writer.close()
    newest = checkpoints.find_checkpoint(tmp_path)
    assert checkpoints.load_part(newest, "model.")["weight"].eq(2.0).all()
    assert checkpoints.load_part(checkpoint, "model.")["weight"].eq(1.0).all()


@pytest.mark.parametrize("moment", ["write", "complete"])
def test_a_save_that_fails_is_reported_and_leaves_nothing(tmp_path, monkeypatch, moment):
    writer = make_writer(tmp_path, keep=1)
    writer.start(1, make_state(1.0), "")
    assert writer.wait().error is None

    def full(*_arguments, **_named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(dcp, "save", full)
        else:
            patch.setattr("pixelgen.training.checkpoint.write.save_file", full)
        writer.start(2, make_state(2.0), "")
        assert "No space left on device" in writer.wait().error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    writer.start(3, make_state(3.0), "")
    assert writer.wait().error is None
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step_00000003"]


def test_retention(tmp_path):
    writer = make_writer(tmp_path, keep=2, keep_every=4)
    for step in range(1, 10):
        writer.start(step, make_state(step), "")
    writer.close()
    kept = [int(path.name[5:]) for path in checkpoints.list_checkpoints(tmp_path)]
    assert kept == [4, 8, 9]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_an_old_checkpoint_that_cannot_be_removed_does_not_spoil_the_new_one(tmp_path, monkeypatch, capsys):
    writer = make_writer(tmp_path, keep=1)
    writer.start(1, make_state(1.0), "")
    writer.wait()

    def refuse(folder):
        if folder.name == "step_00000001":
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pixelgen.training.checkpoint.write._remove", refuse)
    writer.start(2, make_state(2.0), "")
    assert writer.wait().error is None
    assert "step_00000001 could not be removed" in capsys.readouterr().err
    assert checkpoints.find_checkpoint(tmp_path).name == "step_00000002"


def test_a_full_disk_in_a_run(tmp_path):
    """The kernel refuses to write more: training goes on, the last checkpoint stays, the end fails."""
    arguments = [*SMALL, *FLOW_ONLY, "--out_dir", str(tmp_path), "--name", "run", "--train.max_steps", "40"]
    job = Job([*arguments, "--train.checkpoint_every", "5"], log=tmp_path / "log")
    job.until_step(0, tmp_path / "run")
    resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    intact = checkpoints.find_checkpoint(tmp_path / "run")
    assert job.wait() == [2]
    log = (tmp_path / "log").read_text()
    assert "could not be written" in log and "File too large" in log, log
    assert "pixelgen.train: error: the checkpoint of step 40 could not be written" in log
    assert "Traceback" not in log
    assert curve(tmp_path / "run")[-1]["step"] == 40
    found = checkpoints.list_checkpoints(tmp_path / "run")
    assert found and found[0] == intact
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    Pipeline.from_run(tmp_path / "run").sample([0], steps=2)


def test_a_folder_that_cannot_be_written_to(flow_run, capsys):
    """A kernel file system, which refuses root too; and a place for checkpoints that is a file."""
    assert "cannot be made" in fails_with(capsys, ["--out_dir", "/sys", "--name", "run", "--device", "cpu"])
    shutil.rmtree(flow_run / "checkpoints")
    (flow_run / "checkpoints").write_text("")
    assert "has no checkpoint yet" in fails_with(capsys, ["--resume", str(flow_run)])


def test_one_process_at_a_time_trains_a_run(tmp_path, capsys):
    more = [*SMALL, *FLOW_ONLY, "--out_dir", str(tmp_path), "--name", "run", "--train.max_steps", "100000"]
    job = Job([*more, "--train.checkpoint_every", "2"], log=tmp_path / "log")
    try:
        job.until_step(0, tmp_path / "run")
        before = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
        error = fails_with(capsys, ["--resume", str(tmp_path / "run")])
        assert "another process is training this run" in error
        assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == before
    finally:
        job.kill()


def test_resume_auto_starts_continues_and_refuses(tmp_path, capsys):
    arguments = [*FLOW_ONLY, "--resume", "auto"]
    assert main(options(tmp_path, "run", 2, *arguments)) == 0
    longer = options(tmp_path, "run", 4, *arguments)
    assert main(longer) == 0
    found = [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")]
    assert found == ["step_00000002", "step_00000004"]
    assert "step 2 of 4" in capsys.readouterr().out
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.yaml").write_text("seed: 0\n")  # stopped before its first checkpoint
    assert main(options(tmp_path, "early", 2, *arguments)) == 0
    assert (tmp_path / "early.stopped-1" / "config.yaml").read_text() == "seed: 0\n"
    assert f"now {tmp_path / 'early.stopped-1'}, and the run starts anew" in capsys.readouterr().out
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    error = fails_with(capsys, options(tmp_path, "foreign", 2, *arguments))
    assert "not the folder of a run" in error and (tmp_path / "foreign" / "thesis.tex").exists()
    assert "needs --name" in fails_with(capsys, ["--resume", "auto"])
    for path in checkpoints.list_checkpoints(tmp_path / "run"):
        (path / "meta.json").unlink()  # a copy that was not finished
    error = fails_with(capsys, longer)
    assert "holds no complete checkpoint" in error and "step_00000004" in error
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_averages_are_chosen_by_name(tmp_path, capsys):
    more = ["--ema.decay", "[0.5,0.9]", "--ema.warmup", "false", "--ema.power", "[0.1]", *FLOW_ONLY]
    assert main(options(tmp_path, "run", 3, *more, "--optimizer.lr", "0.01")) == 0
    run = tmp_path / "run"
    weights = {
        name: Pipeline.from_run(run, weights=name).model.state_dict()["final_layer.linear.weight"]
        for name in ("raw", "ema", "0.5", "0.9", "power-0.1")
    }
    assert torch.equal(weights["ema"], weights["0.5"])
    different = [weights[name] for name in ("raw", "0.5", "0.9", "power-0.1")]
    for index, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[index + 1 :])
    argv = ["--model", str(run), "--weights", "0.7", "--out", str(tmp_path / "out"), "--device", "cpu"]
    error = fails_with(capsys, argv, sample, "pixelgen.sample")
    assert "has no average 0.7; it has 0.5, 0.9, power-0.1" in error
    error = fails_with(capsys, ["--resume", str(run), "--train.max_steps", "5", "--ema.decay", "0.5"])
    assert "ema.decay or ema.power cannot change so at a resume" in error
