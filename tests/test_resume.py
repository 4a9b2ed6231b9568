"""Stopping and going on: signals, checkpoints, exact resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forked
from processes import differences, stored
from training import FLOW_ONLY, fails_with, options

from pixelgen import checkpoint as checkpoints
from pixelgen.config import load_config
from pixelgen.distributed import start_world
from pixelgen.loop import resume_run
from pixelgen.train import main
from pixelgen.trainer import Trainer
from pixelgen.trainlog import TrainLog, truncate_metrics

pytestmark = pytest.mark.usefixtures("no_curves")


def assert_same(a: Path, b: Path) -> None:
    """Everything in the newest checkpoints of two runs."""
    assert differences(stored(a), stored(b)) == []


def stop_after(monkeypatch, step: int) -> None:
    train_step = Trainer.train_step

    def stopping(self, images, labels):
        terms = train_step(self, images, labels)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_resume_in_another_process_is_bit_equal(tmp_path, monkeypatch, with_embedded):
    # All terms, dropout and the balance weight, so that every kind of state takes part.
    more = ["--loss.balance", "released", "--loss.balance_start_step", "4", "--loss.balance_every", "4"]
    more += ["--model.proj_dropout", "0.1", "--model.depth", "4", "--train.log_every", "5"]
    more += [
        "--loss.gate",
        "learned",
        "--loss.adversarial_weight",
        "0.1",
        "--loss.adversarial_start_step",
        "3",
    ]
    more += ["--loss.alignment_schedule", "[[8, 0.2], [15, 0.0]]"]
    assert main(options(tmp_path, "straight", 20, *more)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        assert main(options(tmp_path, "stopped", 20, *more)) == 128 + signal.SIGTERM
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000010"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "pixelgen.train", "--resume", str(tmp_path / "stopped")]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000020"
    assert stored(tmp_path / "straight")["objective.balance.weight"] != 1.0
    assert_same(tmp_path / "straight", tmp_path / "stopped")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "stopped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


# Parts that start after the first checkpoint, whose optimizers have not moved when it is written.
LATE = {
    "alignment": ["--loss.alignment_weight", "0", "--loss.alignment_schedule", "[[6, 0.5]]"],
    "adversarial": ["--loss.adversarial_weight", "0.1", "--loss.adversarial_start_step", "6"],
    "gate": [*FLOW_ONLY[2:], "--loss.gate", "learned"],
    "balance": ["--loss.balance", "global", "--loss.balance_start_step", "6", "--loss.balance_every", "2"],
}


@pytest.mark.parametrize("part", LATE)
def test_saving_and_resuming_before_a_part_starts_changes_nothing(tmp_path, monkeypatch, with_embedded, part):
    for name, every in (("straight", "0"), ("saved", "2"), ("stopped", "2")):
        with monkeypatch.context() as patch:
            if name == "stopped":
                stop_after(patch, 4)
            main(options(tmp_path, name, 10, *LATE[part], "--train.checkpoint_every", every))
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000004"
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    for other in ("saved", "stopped"):
        assert_same(tmp_path / "straight", tmp_path / other)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--loss.gate", "learned"], "loss.gate"),
        (["--loss.balance", "global"], "loss.balance"),
        (["--loss.adversarial_weight", "0.1"], "loss.adversarial_weight"),
        (["--loss.alignment_weight", "0.5"], "loss.alignment_weight"),
        (["--model.width", "32"], "model"),
    ],
)
def test_what_a_run_trains_cannot_change_at_a_resume(tmp_path, capsys, with_embedded, option, named):
    if not (tmp_path / "run").exists():
        assert main(options(tmp_path, "run", 2, *FLOW_ONLY)) == 0
    error = fails_with(capsys, ["--resume", str(tmp_path / "run"), "--train.max_steps", "4", *option])
    assert f"{named}" in error and "cannot change so at a resume" in error


def test_interrupt_saves_and_the_run_continues(tmp_path):
    arguments = options(tmp_path, "run", 100_000, *FLOW_ONLY, "--train.log_every", "5", "--threads", "1")
    with (tmp_path / "errors").open("w") as errors:
        process = Forked(["-m", "pixelgen.train", *arguments], stderr=errors)
    try:
        for line in process.lines():
            if line.startswith("step 10 "):
                break
        process.send_signal(signal.SIGINT)
        out = "".join(process.lines(60))
        code = process.wait(60)
    finally:
        process.kill()
    err = (tmp_path / "errors").read_text()
    assert code == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    assert f"--resume {tmp_path / 'run'}" in out
    step = checkpoints.read_meta(checkpoints.find_checkpoint(tmp_path / "run"))["step"]
    assert main(["--resume", str(tmp_path / "run"), "--train.max_steps", str(step + 3)]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == step + 3


@pytest.mark.parametrize("damage", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_names_the_one_before(tmp_path, capsys, damage):
    run = tmp_path / "run"
    assert main(options(tmp_path, "run", 4, *FLOW_ONLY, "--train.checkpoint_every", "2")) == 0
    damaged = run / "checkpoints" / "step_00000004" / damage
    damaged.write_bytes(damaged.read_bytes()[:50])
    error = fails_with(capsys, ["--resume", str(run), "--train.max_steps", "6"])
    assert f"{damaged.parent} cannot be restored: " in error
    assert error.endswith("; remove it to go on from step_00000002\n")
    shutil.rmtree(damaged.parent)
    assert main(["--resume", str(run), "--train.max_steps", "6"]) == 0


@pytest.mark.curves
@pytest.mark.parametrize("method", ["write", "curves", "image"])
def test_a_signal_while_logging_saves_too(tmp_path, monkeypatch, method):
    original = getattr(TrainLog, method)

    def interrupted(self, *args):
        if not hasattr(self, "was_interrupted"):
            self.was_interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(TrainLog, method, interrupted)
    more = [
        "--train.log_every",
        "2",
        "--train.sample_every",
        "2",
        "--train.checkpoint_every",
        "4",
        *FLOW_ONLY,
    ]
    assert main([*options(tmp_path, "run", 50), *more]) == 128 + signal.SIGTERM
    assert checkpoints.read_meta(checkpoints.find_checkpoint(tmp_path / "run"))["step"] == 2


def test_a_signal_to_the_process_group_saves_with_workers(tmp_path):
    more = [*FLOW_ONLY, "--train.log_every", "5", "--data.workers", "1"]
    command = ["-m", "pixelgen.train", *options(tmp_path, "run", 100_000, *more)]
    with (tmp_path / "errors").open("w") as errors:
        process = Forked(command, stderr=errors, own_group=True)
    try:
        for line in process.lines():
            if line.startswith("step 5 "):
                break
        os.killpg(process.pid, signal.SIGTERM)
        for _ in process.lines(60):
            pass
        code = process.wait(60)
    finally:
        process.kill()
    assert code == 128 + signal.SIGTERM, (tmp_path / "errors").read_text()
    assert checkpoints.list_checkpoints(tmp_path / "run")


def test_old_checkpoints_are_removed_and_partial_ones_never_found(tmp_path):
    more = ["--train.checkpoint_every", "2", "--train.keep_checkpoints", "2", *FLOW_ONLY]
    assert main(options(tmp_path, "run", 7, *more)) == 0
    found = [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")]
    assert found == ["step_00000006", "step_00000007"]
    (tmp_path / "run" / "checkpoints" / ".step_00000009.partial").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_00000008").mkdir()  # no meta.json: not complete
    assert checkpoints.find_checkpoint(tmp_path / "run").name == "step_00000007"


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 1}\n{"step": 10, "loss": 1}\n{"step": 15, "lo')
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 5, "loss": 1}\n'


def test_resume_goes_on_from_the_newest_checkpoint_only(tmp_path, capsys):
    more = ["--train.checkpoint_every", "2", *FLOW_ONLY]
    assert main(options(tmp_path, "run", 4, *more)) == 0
    older = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert "step_00000004 is" in fails_with(capsys, ["--resume", str(older), "--train.max_steps", "6"])
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    assert main(["--resume", str(newest), "--train.max_steps", "3"]) == 0  # nothing to do
    assert "max_steps: 4" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["--resume", str(newest), "--train.max_steps", "5"]) == 0
    assert "max_steps: 5" in (tmp_path / "run" / "config.yaml").read_text()
    assert checkpoints.find_checkpoint(tmp_path / "run").name == "step_00000005"


def test_resume_paths_that_hold_no_checkpoint(tmp_path, capsys):
    assert main(options(tmp_path, "run", 2, *FLOW_ONLY)) == 0
    checkpoint = checkpoints.find_checkpoint(tmp_path / "run")
    folder = tmp_path / "other"
    folder.mkdir()
    assert "not the folder of a run" in fails_with(capsys, ["--resume", str(folder)])
    run_ = ["--resume", str(tmp_path / "run")]
    assert "leave out --name" in fails_with(capsys, [*run_, "--name", "other"])
    assert "leave out --config" in fails_with(capsys, [*run_, "--config", "digits"])
    text = (checkpoint / "meta.json").read_text()
    (checkpoint / "meta.json").write_text(text.replace('"format": 2', '"format": 1'))
    assert "format 1; this version reads format 2" in fails_with(capsys, ["--resume", str(tmp_path / "run")])
    (checkpoint / "meta.json").write_text(text)
    shard = next(checkpoint.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert "cannot be restored" in fails_with(
        capsys, ["--resume", str(tmp_path / "run"), "--train.max_steps", "4"]
    )
    shutil.rmtree(checkpoint)
    assert "no complete checkpoint" in fails_with(capsys, ["--resume", str(tmp_path / "run")])


def test_options_of_the_optimizer_hold_after_a_resume(tmp_path, with_embedded):
    more = ["--loss.gate", "learned", "--loss.adversarial_weight", "0.1"]
    assert main(options(tmp_path, "run", 2, *more)) == 0
    changed = ["--optimizer.betas", "[0.8, 0.9]", "--optimizer.weight_decay", "0.1"]
    changed += ["--loss.adversarial_lr", "1e-5", "--train.max_steps", "4"]
    config, path = load_config(["--resume", str(tmp_path / "run"), *changed])
    trainer = resume_run(path, config, start_world("cpu", config.parallel)).trainer
    weights, gate = trainer.optimizer.param_groups
    assert weights["betas"] == gate["betas"] == (0.8, 0.9)
    assert (weights["weight_decay"], gate["weight_decay"]) == (0.1, 0.0)
    assert trainer.discriminator_optimizer.param_groups[0]["lr"] == 1e-5


_HANGS = """
import os, signal, sys, time
from pixelgen import loop
from pixelgen.train import main
from pixelgen.trainer import Trainer

def hanging(self, images, labels):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.5)
    print("goes on after two at once")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)

loop._ONCE_S, Trainer.train_step = 1.0, hanging
main(sys.argv[1:])
"""


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    """Not one that comes within seconds of the first: schedulers signal every process, which pass it on."""
    with (tmp_path / "errors").open("w") as errors:
        process = Forked(["-c", _HANGS, *options(tmp_path, "run", 10, *FLOW_ONLY)], stderr=errors)
    try:
        printed = list(process.lines(60))
    finally:
        process.kill()
    assert process.wait(60) == 128 + signal.SIGINT, (tmp_path / "errors").read_text()
    assert printed[-1] == "goes on after two at once\n"
    assert not checkpoints.list_checkpoints(tmp_path / "run")


def test_small_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    checkpoints.write_whole(path, "seed: 1\n")

    def killed(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_whole(path, "seed: 2\n")
    assert path.read_text() == "seed: 1\n"
