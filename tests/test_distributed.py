"""Several processes, really started: losses, checkpoints and stops do not depend on their number."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from images import fill
from processes import EVERYTHING, SMALL, Job, differences, stored, train
from training import FLOW_ONLY, curve

from pixelgen.config import ParallelConfig
from pixelgen.config.resolve import resolve_mode

# A balance that all processes agree on; "released" gives each its own by definition.
ALIKE = [*EVERYTHING, "--loss.balance", "global", "--optimizer.schedule", "constant"]
TERMS = ("loss", "flow_matching", "alignment", "lpips", "p_dino", "adversarial", "discriminator", "grad_norm")


def assert_alike(run: Path, alone: Path) -> None:
    """All terms of all steps to fp32 rounding, which the optimizer carries on."""
    ours, theirs = curve(run), curve(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for term in (*TERMS, "balance_weight", "gated_fraction"):
            if term in other:
                assert mine[term] == pytest.approx(other[term], rel=2e-5, abs=1e-6), (mine["step"], term)
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-6)


def flow_options(tmp_path: Path, *more: str) -> list[str]:
    return [*SMALL, *FLOW_ONLY, "--out_dir", str(tmp_path), "--name", "run", *more]


@pytest.fixture(scope="session")
def alone(made_once, embedded_file: Path) -> Path:
    """12 steps in one process."""

    def make(folder: Path) -> None:
        options = [*SMALL, *ALIKE, "--out_dir", str(folder), "--name", "run", "--train.max_steps", "12"]
        train(options, log=folder / "log", features=embedded_file)

    return made_once("alone", make) / "run"


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, ["--train.micro_batches", "3", "--train.activation_checkpointing", "selective"]),
        (2, ["--parallel.mode", "fsdp", "--train.sample_every", "6", "--sample.steps", "2"]),
        (2, ["--parallel.mode", "ddp", "--train.micro_batches", "2", "--data.workers", "1"]),
    ],
    ids=["micro-batches", "fsdp", "ddp"],
)
def test_the_loss_curve_does_not_depend_on_the_processes(tmp_path, alone, embedded_file, processes, options):
    common = [*SMALL, *ALIKE, "--out_dir", str(tmp_path), "--name", "run", "--train.max_steps", "12"]
    text = train([*common, *options], processes, log=tmp_path / "log", features=embedded_file)
    assert_alike(tmp_path / "run", alone)
    if processes > 1:
        assert f"{processes} processes ({options[1]}, cpu)" in text
    ours, theirs = stored(tmp_path / "run"), stored(alone)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.startswith(("model.", "ema.values.")):
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5, msg=key)
    grids = [path.name for path in (tmp_path / "run").glob("samples/*")]
    assert len(grids) == (2 if "--train.sample_every" in options else 0)


@pytest.mark.slow
def test_bf16_over_processes_is_that_of_one_but_for_rounding(tmp_path, embedded_file):
    """FSDP gathers all weights in bf16; one process keeps norms and tables in fp32."""
    common = [*SMALL, *ALIKE, "--out_dir", str(tmp_path), "--dtype", "bfloat16", "--train.max_steps", "6"]
    given = {"log": tmp_path / "log", "features": embedded_file}
    train([*common, "--name", "one"], **given)
    train([*common, "--name", "two", "--parallel.mode", "fsdp"], 2, **given)
    ours, theirs = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=5e-3)
    assert stored(tmp_path / "two").keys() == stored(tmp_path / "one").keys()
    assert all(value.dtype != torch.bfloat16 for value in stored(tmp_path / "two").values())


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, embedded_file):
    """2, then 1, 3, and 4 in two copies: same batches, same order, same losses."""
    run, log = tmp_path / "run", tmp_path / "log"
    first = [*SMALL, *ALIKE, "--out_dir", str(tmp_path), "--name", "run", "--train.max_steps", "3"]
    train([*first, "--parallel.mode", "fsdp"], 2, log=log, features=embedded_file)
    resume = ["--resume", str(run), "--train.max_steps"]
    train([*resume, "6"], 1, log=log)
    train([*resume, "9"], 3, log=log)
    copies = ["--parallel.mode", "hsdp", "--parallel.shard_size", "2", "--parallel.prefetch", "2"]
    assert "4 processes (hsdp, cpu)" in train([*resume, "12", *copies], 4, log=log)
    assert_alike(run, alone)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, embedded_file):
    """They save and leave; the resumed run ends as one that was never stopped, bit for bit."""
    common = [*SMALL, *EVERYTHING, "--out_dir", str(tmp_path), "--train.max_steps", "10"]
    given = {"log": tmp_path / "log", "features": embedded_file}
    train([*common, "--name", "straight"], 2, **given)
    job = Job([*common, "--name", "stopped"], 2, **given)
    job.until_step(3)
    job.signal(signal.SIGTERM, rank=1)
    code = 128 + signal.SIGTERM
    assert job.wait() == [code, code], (tmp_path / "log").read_text()
    train(["--resume", str(tmp_path / "stopped")], 2, log=tmp_path / "log")
    assert differences(stored(tmp_path / "straight"), stored(tmp_path / "stopped")) == []


def test_a_process_that_hangs_is_named(tmp_path):
    more = ["--train.max_steps", "100000", "--parallel.timeout_s", "8"]
    job = Job(flow_options(tmp_path, *more), 2, log=tmp_path / "log")
    job.until_step(2)
    job.signal(signal.SIGSTOP, rank=1)
    try:
        assert job.processes[0].wait(120) == 3
    finally:
        job.kill()
    text = (tmp_path / "log").read_text()
    assert "rank 0: no progress for" in text and "the others wait for rank 1" in text, text


def test_a_loss_that_is_not_finite_ends_all_processes_with_one_report(tmp_path, embedded_file):
    options = [*SMALL, *EVERYTHING, "--out_dir", str(tmp_path), "--name", "run", "--train.max_steps", "20"]
    options += ["--optimizer.lr", "1e35", "--optimizer.warmup_steps", "0"]
    options += ["--optimizer.skip_grad_norm", "null", "--optimizer.max_grad_norm", "null"]
    text = train(options, 2, log=tmp_path / "log", code=2, features=embedded_file)
    assert "training stopped at step" in text and "There is no checkpoint yet" in text
    assert "Traceback" not in text and text.count("pixelgen.train: error:") == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_images_that_one_process_cannot_read_end_all_after_the_same_step(tmp_path):
    """With a checkpoint of the last step that had all of its images, and one report."""
    fill(tmp_path / "images", per_class=12, side=(40, 40), nested=".")
    (tmp_path / "images" / "cat" / "003.png").write_bytes(b"")
    options = flow_options(tmp_path, "--data.max_broken", "0", "--data.name", "folder")
    options += ["--data.path", str(tmp_path / "images"), "--data.num_classes", "2", "--train.batch_size", "4"]
    options += ["--data.image_size", "16", "--data.channels", "3", "--model.size", "tiny/4"]
    text = train([*options, "--train.max_steps", "50"], 2, log=tmp_path / "log", code=2)
    assert "data.max_broken 0 allows" in text and "003.png" in text and "Traceback" not in text, text
    assert text.count("pixelgen.train: error:") == 1
    step = int(text.split("stopped after step ")[1].split(",")[0])
    found = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert found == [f"step_{step:08d}"]


def test_a_damaged_checkpoint_is_reported_once(tmp_path):
    train(flow_options(tmp_path, "--train.max_steps", "2"), 2, log=tmp_path / "log")
    for path in (tmp_path / "run" / "checkpoints").glob("step_*/__1_*.distcp"):
        path.write_bytes(b"")  # what the first process reads may be whole
    more = ["--resume", str(tmp_path / "run"), "--train.max_steps", "4"]
    text = train(more, 2, log=tmp_path / "resumed", code=2)
    assert "step_00000002 cannot be restored: " in text and "Traceback" not in text, text
    assert text.count("pixelgen.train: error:") == 1


def test_a_batch_that_cannot_be_divided_is_refused_once(tmp_path):
    options = [*SMALL, "--out_dir", str(tmp_path), "--name", "run", "--train.batch_size", "7"]
    text = train(options, 2, log=tmp_path / "log", code=2)
    assert "train.batch_size must be a multiple of 2 (2 processes x 1 micro-batches), such as 6 or 8" in text
    assert "Traceback" not in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "size", "local_size", "parameters", "expected"),
    [
        ("auto", 1, 1, 10**9, "none"),
        ("fsdp", 1, 1, 10**9, "none"),
        ("auto", 8, 8, 10**8, "ddp"),
        ("auto", 8, 8, 10**9, "fsdp"),
        ("auto", 16, 8, 10**9, "hsdp"),
        ("fsdp", 16, 8, 10**8, "fsdp"),
    ],
)
def test_the_mode_follows_from_model_and_machines(mode, size, local_size, parameters, expected):
    parallel = ParallelConfig(mode=mode)
    found = resolve_mode(parallel, size=size, local_size=local_size, num_parameters=parameters)
    assert found == expected


def test_shards_that_do_not_divide_the_processes_are_refused(tmp_path):
    more = ["--parallel.mode", "hsdp", "--parallel.shard_size", "3"]
    text = train(flow_options(tmp_path, *more), 2, log=tmp_path / "log", code=2)
    assert "parallel.shard_size must divide the 2 processes, got 3" in text and "Traceback" not in text


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    """The documented way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pixelgen.train", *flow_options(tmp_path, "--train.max_steps", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 processes (ddp, cpu)" in done.stdout
