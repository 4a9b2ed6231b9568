"""Stopping and going on: signals, checkpoints, exact resume."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Forked, allow_interrupts
from processes import differences, stored
from training import FLOW_ONLY, curve, fails_with, options

from pixelgen.config import load_config
from pixelgen.train import main
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.log import TrainLog, truncate_metrics
from pixelgen.training.processes.world import start_world
from pixelgen.training.start import resume_run
from pixelgen.training.step import Trainer

pytestmark = pytest.mark.usefixtures("no_curves")


def stop_after(monkeypatch, step: int) -> None:
    train_step = Trainer.train_step

    def stopping(self, *batch):
        terms = train_step(self, *batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms

    monkeypatch.setattr(Trainer, "train_step", stopping)


@contextmanager
def command(tmp_path: Path, arguments: list[str], **more: bool) -> Iterator[Forked]:
    """A Python command with its errors in the file `errors`."""
    with (tmp_path / "errors").open("w") as errors:
        process = Forked(arguments, stderr=errors, **more)
    try:
        yield process
    finally:
        process.kill()


# All terms, dropout and the balance weight, so that every kind of state takes part.
EVERY_STATE = [
    *("--loss.balance", "released", "--loss.balance_start_step", "3", "--loss.balance_every", "3"),
    *("--loss.gate", "learned", "--loss.adversarial_weight", "0.1", "--loss.adversarial_start_step", "2"),
    *("--model.proj_dropout", "0.1", "--model.depth", "4", "--train.log_every", "3"),
    *("--loss.alignment_schedule", "[[4, 0.2], [9, 0.0]]"),
]


def test_resume_in_another_process_is_bit_equal(tmp_path, monkeypatch, with_embedded):
    assert main(options(tmp_path, "straight", 12, *EVERY_STATE)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert main(options(tmp_path, "stopped", 12, *EVERY_STATE)) == 128 + signal.SIGTERM
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000006"
    with command(tmp_path, ["-m", "pixelgen.train", "--resume", str(tmp_path / "stopped")]) as process:
        assert list(process.lines(120)) and process.wait(60) == 0, (tmp_path / "errors").read_text()
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000012"
    straight, stopped = (stored(tmp_path / name) for name in ("straight", "stopped"))
    assert straight["objective.balance.weight"] != 1.0
    assert differences(straight, stopped) == []
    losses = [[line["loss"] for line in curve(tmp_path / name)] for name in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize(
    "late",
    [
        [
            *("--loss.alignment_weight", "0", "--loss.alignment_schedule", "[[4, 0.5]]"),
            *("--loss.adversarial_weight", "0.1", "--loss.adversarial_start_step", "4"),
            *("--loss.balance", "global", "--loss.balance_start_step", "4", "--loss.balance_every", "2"),
        ],
        [*FLOW_ONLY[2:], "--loss.gate", "learned"],
    ],
    ids=["terms", "gate"],
)
def test_saving_and_resuming_before_a_part_starts_changes_nothing(tmp_path, monkeypatch, with_embedded, late):
    """Parts that start after the first checkpoint, whose optimizers have not moved when it is written."""
    assert main(options(tmp_path, "straight", 7, *late, "--train.checkpoint_every", "0")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        main(options(tmp_path, "stopped", 7, *late, "--train.checkpoint_every", "2"))
    assert checkpoints.find_checkpoint(tmp_path / "stopped").name == "step_00000003"
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    assert differences(stored(tmp_path / "straight"), stored(tmp_path / "stopped")) == []


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--loss.gate", "learned"], "loss.gate"),
        (["--loss.balance", "global"], "loss.balance"),
        (["--loss.adversarial_weight", "0.1"], "loss.adversarial_weight"),
        (["--loss.alignment_weight", "0.5"], "loss.alignment_weight"),
    ],
)
def test_what_a_run_trains_cannot_change_at_a_resume(flow_run, capsys, with_embedded, option, named):
    error = fails_with(capsys, ["--resume", str(flow_run), "--train.max_steps", "7", *option])
    assert named in error and "cannot change so at a resume" in error


def test_the_model_cannot_change_at_a_resume(flow_run, capsys):
    error = fails_with(capsys, ["--resume", str(flow_run), "--train.max_steps", "7", "--model.width", "32"])
    assert re.search(r"model.width cannot change at a resume: it was 64 in \S+, and is 32 now", error)
    other = ["--model.family", "pixeldit", "--model.size", "PixelDiT-tiny/4"]
    error = fails_with(capsys, ["--resume", str(flow_run), *other])
    assert re.search(r"model.family cannot change at a resume: it was jit in \S+, and is pixeldit now", error)


def test_interrupt_saves_and_the_run_continues(tmp_path):
    arguments = options(tmp_path, "run", 100_000, *FLOW_ONLY, "--train.log_every", "5", "--threads", "1")
    with command(tmp_path, ["-m", "pixelgen.train", *arguments]) as process:
        for line in process.lines():
            if line.startswith("step 10 "):
                break
        process.send_signal(signal.SIGINT)
        out = "".join(process.lines(60))
        code = process.wait(60)
    err = (tmp_path / "errors").read_text()
    assert code == 128 + signal.SIGINT and "Traceback" not in err, err
    assert f"--resume {tmp_path / 'run'}" in out
    step = checkpoints.read_meta(checkpoints.find_checkpoint(tmp_path / "run"))["step"]
    assert main(["--resume", str(tmp_path / "run"), "--train.max_steps", str(step + 3)]) == 0
    assert curve(tmp_path / "run")[-1]["step"] == step + 3


def test_children_can_be_interrupted_though_sigint_was_ignored_by_inheritance():
    """As in the background of a script: what conftest does first, or the tests around would hang."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        allow_interrupts()
        child = subprocess.Popen(["sleep", "60"])
    finally:
        signal.signal(signal.SIGINT, before)
    child.send_signal(signal.SIGINT)
    try:
        assert child.wait(20) == -signal.SIGINT
    finally:
        child.kill()


@pytest.mark.parametrize("damage", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_names_the_one_before(flow_run, capsys, damage):
    damaged = flow_run / "checkpoints" / "step_00000005" / damage
    damaged.write_bytes(damaged.read_bytes()[:50])
    resume = ["--resume", str(flow_run), "--train.max_steps", "6"]
    error = fails_with(capsys, resume)
    assert f"{damaged.parent} cannot be restored: " in error
    assert error.endswith("; remove it to go on from step_00000004\n")
    shutil.rmtree(damaged.parent)
    assert main(resume) == 0


@pytest.mark.parametrize("method", ["write", "curves", "image"])
def test_a_signal_while_logging_saves_too(tmp_path, monkeypatch, method):
    original = getattr(TrainLog, method)

    def interrupted(self, *args):
        if not hasattr(self, "was_interrupted"):
            self.was_interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(TrainLog, method, interrupted)
    more = ["--train.log_every", "2", "--train.sample_every", "2", "--train.checkpoint_every", "4"]
    assert main(options(tmp_path, "run", 50, *FLOW_ONLY, *more)) == 128 + signal.SIGTERM
    assert checkpoints.read_meta(checkpoints.find_checkpoint(tmp_path / "run"))["step"] == 2


def test_a_signal_to_the_process_group_saves_with_workers(tmp_path):
    arguments = options(tmp_path, "run", 100_000, *FLOW_ONLY, "--train.log_every", "5", "--data.workers", "1")
    with command(tmp_path, ["-m", "pixelgen.train", *arguments], own_group=True) as process:
        for line in process.lines():
            if line.startswith("step 5 "):
                break
        os.killpg(process.pid, signal.SIGTERM)
        for _ in process.lines(60):
            pass
        assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "errors").read_text()
    assert checkpoints.list_checkpoints(tmp_path / "run")


def test_old_checkpoints_are_removed_and_partial_ones_never_found(flow_run):
    found = [path.name for path in checkpoints.list_checkpoints(flow_run)]
    assert found == ["step_00000004", "step_00000005"]
    (flow_run / "checkpoints" / ".step_00000009.partial").mkdir()
    (flow_run / "checkpoints" / "step_00000008").mkdir()  # no meta.json: not complete
    assert checkpoints.find_checkpoint(flow_run).name == "step_00000005"


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 1}\n{"step": 10, "loss": 1}\n{"step": 15, "lo')
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 5, "loss": 1}\n'


def test_resume_goes_on_from_the_newest_checkpoint_only(flow_run, capsys):
    older, newest = (str(flow_run / "checkpoints" / f"step_0000000{step}") for step in (4, 5))
    assert "step_00000005 is" in fails_with(capsys, ["--resume", older, "--train.max_steps", "6"])
    assert main(["--resume", newest, "--train.max_steps", "3"]) == 0  # nothing to do
    assert "max_steps: 5" in (flow_run / "config.yaml").read_text()
    assert main(["--resume", newest, "--train.max_steps", "6"]) == 0
    assert "max_steps: 6" in (flow_run / "config.yaml").read_text()
    assert checkpoints.find_checkpoint(flow_run).name == "step_00000006"


def test_resume_paths_that_hold_no_checkpoint(tmp_path, flow_run, capsys):
    run_ = ["--resume", str(flow_run)]
    (tmp_path / "other").mkdir()
    assert "not the folder of a run" in fails_with(capsys, ["--resume", str(tmp_path / "other")])
    assert "leave out --name" in fails_with(capsys, [*run_, "--name", "other"])
    assert "leave out --config" in fails_with(capsys, [*run_, "--config", "digits"])
    meta = checkpoints.find_checkpoint(flow_run) / "meta.json"
    text = meta.read_text()
    meta.write_text(text.replace('"format": 2', '"format": 1'))
    assert "format 1; this version reads format 2" in fails_with(capsys, run_)
    for folder in checkpoints.list_checkpoints(flow_run):
        (folder / "meta.json").unlink()
    assert "no complete checkpoint" in fails_with(capsys, run_)


def test_options_of_the_optimizer_hold_after_a_resume(tmp_path, with_embedded):
    more = ["--loss.gate", "learned", "--loss.adversarial_weight", "0.1"]
    assert main(options(tmp_path, "run", 2, *more)) == 0
    changed = ["--optimizer.betas", "[0.8, 0.9]", "--optimizer.weight_decay", "0.1"]
    changed += ["--loss.adversarial_lr", "1e-5", "--train.max_steps", "4"]
    config, path = load_config(["--resume", str(tmp_path / "run"), *changed])
    trainer = resume_run(path, config, start_world("cpu", config.parallel)).trainer
    weights, gate = trainer.optimizers.main[0].param_groups
    assert weights["betas"] == gate["betas"] == (0.8, 0.9)
    assert (weights["weight_decay"], gate["weight_decay"]) == (0.1, 0.0)
    assert trainer.optimizers.alone["discriminator"].param_groups[0]["lr"] == 1e-5


_HANGS = """
import os, signal, sys, time
from pixelgen.train import main
from pixelgen.training import loop
from pixelgen.training.step import Trainer

def hanging(self, images, labels):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.5)
    print("goes on after two at once")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)

loop._REPEATED_SIGNAL_S, Trainer.train_step = 1.0, hanging
main(sys.argv[1:])
"""


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    """Not one that comes within seconds of the first: schedulers signal every process, which pass it on."""
    with command(tmp_path, ["-c", _HANGS, *options(tmp_path, "run", 10, *FLOW_ONLY)]) as process:
        printed = list(process.lines(60))
        assert process.wait(60) == 128 + signal.SIGINT, (tmp_path / "errors").read_text()
    assert printed[-1] == "goes on after two at once\n"
    assert not checkpoints.list_checkpoints(tmp_path / "run")
