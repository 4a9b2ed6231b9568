"""Options from dataclasses, the messages for mistyped ones, and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from typing import Literal

import pytest
from training import refused, unframed

from pixelgen.config import TrainConfig, load_config, preset_names
from pixelgen.config import command_line as cli
from pixelgen.config.values import nearest, option_names, option_types, read_yaml
from pixelgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Flat:
    """Draws things.

    Args:
        model: which run, 100% required.
        samples_per_label: how many.
        scale: how large.
        method: which way.
        pair: two numbers.
        changes: pairs of a step and a value.
        limit: at most this many.
        use_ema: averaged weights.
    """

    model: str
    samples_per_label: int = 1
    scale: float = 2.0
    method: Literal["euler", "heun"] = "heun"
    pair: tuple[float, float] = (0.0, 1.0)
    changes: tuple[tuple[int, float], ...] = ()
    limit: int | None = None
    use_ema: bool = True


PAIRS = "[[integer, number], ...]"


def parse(*argv: str) -> Flat:
    return cli.parse(Flat, argv, prog="pixelgen.draw")


def test_values_reach_the_dataclass_in_their_types():
    args = ["--samples-per-label", "8", "--scale=-1e-3", "--pair", "[0.1, 1]", "--limit", "null"]
    args += ["--use-ema", "false"]
    assert parse("--model", "runs/7", *args) == Flat(
        model="runs/7", samples_per_label=8, scale=-1e-3, pair=(0.1, 1.0), limit=None, use_ema=False
    )
    assert isinstance(parse("--model", "3").model, str)
    assert parse("--model", "a", "--scale", "-8e-1").scale == -0.8


def test_dashes_and_underscores_are_the_same_option():
    assert parse("--model", "a", "--samples_per_label", "8") == parse("--model=a", "--samples-per-label=8")
    dashes, underscores = (["--name", "n", f"--train.batch{mark}size", "3"] for mark in "-_")
    assert load_config(dashes) == load_config(underscores)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--samples-per-lable", "8"],
            "--samples-per-lable, 8 Perhaps you meant: --samples-per-label integer",
        ),
        (["--samples_per_lable=8"], "--samples_per_lable=8 Perhaps you meant: --samples-per-label integer"),
        (["--zzz"], "Unrecognized options: --zzz For full helptext, run"),
        (["--samples-per-label", "8.5"], "--samples-per-label: must be integer, got '8.5'"),
        (["--scale", "big"], "--scale: must be number, got 'big'"),
        (["--method", "rk4"], "--method: must be euler|heun, got 'rk4'"),
        (["--limit", "some"], "--limit: must be integer|null, got 'some'"),
        (["--use-ema", "maybe"], "--use-ema: must be true|false, got 'maybe'"),
        (["--pair", "[1]"], "--pair: must be [number, number], got '[1]'"),
        (["--changes", "[5, 0.1]"], f"--changes: must be {PAIRS}, got '[5, 0.1]'"),
        (["--changes", "[[5.5, 0.1]]"], f"--changes: must be {PAIRS}, got '[[5.5, 0.1]]'"),
        (["--changes", "[[5, 0.1]"], f"--changes: must be {PAIRS}, got '[[5, 0.1]'"),
        (["--changes"], "Missing value for argument '--changes'"),
        (["--scale"], "Missing value for argument '--scale'"),
        (["stray"], "Unrecognized options: stray"),
    ],
)
def test_a_mistake_is_named_with_what_is_right(argv, message, capsys):
    assert message in refused(capsys, parse, "--model", "a", *argv)


def test_a_missing_required_option_is_named(capsys):
    error = refused(capsys, parse, "--scale", "1")
    assert "--model text which run, 100% required. (required)" in error and "--scale" not in error


def test_a_mistake_is_told_by_one_process_of_several(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse("--scale", "big")
    assert stop.value.code == 2 and not capsys.readouterr().err


def test_truth_needs_no_value():
    assert parse("--model", "a", "--use-ema").use_ema is True
    assert parse("--use-ema", "--model", "a").use_ema is True


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss.lpips_wieght", "loss.lpips_weight"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("train.steps", "train.max_steps"),
        ("batch-size", "train.batch_size"),
        ("lpips_wieght", "loss.lpips_weight"),
        ("qqqqqq", None),
    ],
)
def test_the_nearest_option_is_the_one_meant(name, expected):
    assert nearest(name, option_names(TrainConfig)) == expected


def test_an_option_of_another_section_is_named():
    with pytest.raises(UserError, match=r"unknown option --train\.lr; did you mean --optimizer\.lr\?"):
        load_config(["--train.lr", "1e-3"])
    with pytest.raises(
        UserError, match=r"unknown option --optimiser\.max_grad_norm; .* --optimizer\.max_grad"
    ):
        load_config(["--optimiser.max-grad-norm=1"])


def test_a_section_given_as_an_option_lists_its_options(capsys):
    error = refused(capsys, load_config, ["--data", "imagenet"])
    assert "--data, imagenet Perhaps you meant:" in error
    assert " --data.name " in error and " --data.path " in error


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load_config([*argv, "--help"])
    assert caught.value.code == 0
    return unframed(capsys.readouterr().out)


def test_help_explains_every_option(capsys):
    text = help_of(capsys)
    sections = {name for name, hint in option_types(TrainConfig).items() if is_dataclass(hint)}
    names = [*option_names(TrainConfig), "config", "resume", "print_config"]
    for name in set(names) - sections:
        entry = re.search(rf" --{re.escape(name)} (\S.*?) \((default: |repeatable)", text)
        assert entry and len(entry[1].split()) >= 3, f"--{name} has no help"  # a type and an explanation
    for name in sections:
        assert f" {name} options " in text
    assert f" --config PRESET|FILE preset, one of {', '.join(preset_names())}, or YAML file; " in text
    assert "Trains a class-conditional" in text


def test_help_shows_a_presets_values_as_the_defaults(capsys):
    text = help_of(capsys, "--config", "jit-b-256")
    assert "--train.batch_size integer images per step, of all processes together. (default: 1024)" in text
    assert (
        "--optimizer.betas [number, number] decay of AdamW's two averages. (default: '[0.9, 0.95]')" in text
    )
    assert "late. (default: '[]')" in text
    assert "--data.flip [true|false]" in text and "must not be mirrored. (default: true)" in text


def test_help_shows_lists_as_they_are_written(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("loss: {alignment_schedule: [[5, 0.1], [7, 0]]}\n")
    text = help_of(capsys, "--config", str(mine))
    assert "--loss.alignment_schedule [[integer, number], ...]" in text
    assert "(default: '[[5, 0.1], [7, 0.0]]')" in text


def exit_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(main, "pixelgen.draw", [])
    code = caught.value.code
    assert isinstance(code, int) or code is None
    return code or 0, capsys.readouterr().err


def raising(error: BaseException):
    def main(argv: list[str] | None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("sample: labels must lie in [0, 9], got 11"), "sample: labels must lie in [0, 9], got 11"),
        (UserError("two\n  lines"), "two lines"),
        (FileNotFoundError("no run at runs/x"), "no run at runs/x"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "No such file or directory: a.yaml"),
        (FileExistsError("runs/x exists"), "runs/x exists"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(error, line, capsys):
    assert exit_of(raising(error), capsys) == (2, f"pixelgen.draw: error: {line}\n")


def test_an_interrupt_is_exit_code_130(capsys):
    assert exit_of(raising(KeyboardInterrupt()), capsys) == (130, "pixelgen.draw: interrupted\n")


def test_exit_codes_of_main_pass_through(capsys):
    assert exit_of(lambda argv: None, capsys) == (0, "")
    assert exit_of(lambda argv: 3, capsys) == (3, "")


@pytest.mark.parametrize(("set_before", "seen"), [(None, "1000"), ("7", "7")])
def test_waiting_threads_do_not_spin_unless_the_user_says_so(set_before, seen, capsys, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if set_before is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", set_before)
    exit_of(lambda argv: None, capsys)
    assert os.environ["GOMP_SPINCOUNT"] == seen


@pytest.mark.parametrize(
    "error", [ValueError("bug"), RuntimeError("bug"), KeyError("bug"), OSError(28, "disk full")]
)
def test_other_exceptions_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error), "pixelgen.draw", [])


def test_what_starts_quickly_needs_no_torch():
    code = """
import io, sys
import pixelgen.config, pixelgen.data, pixelgen.planning.devices
assert not {"torch", "PIL"} & set(sys.modules)
from PIL import Image
from pixelgen.data.decode import read_image
file = io.BytesIO()
Image.new("RGB", (90, 70)).save(file, "JPEG")
read_image(file.getvalue(), 16, 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_and_errors_come_before_torch_is_imported():
    program = """
import runpy, sys
import pixelgen
codes = []
for argv in (["--help"], ["--loss.lpips_wieght", "1"]):
    sys.argv = ["pixelgen.train", *argv]
    try:
        runpy.run_module("pixelgen.train", run_name="__main__")
    except SystemExit as stop:
        codes.append(stop.code or 0)
heavy = {"torch", "PIL", "pyarrow", "datasets", "timm", "torchvision", "matplotlib", "sklearn"}
heavy &= set(sys.modules)
print("\\n", codes, sorted(heavy))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1].strip() == "[0, 2] []", done.stdout[-300:] + done.stderr
    message = "--loss.lpips_wieght, 1 Perhaps you meant: --loss.lpips_weight number"
    assert message in unframed(done.stderr) and "Traceback" not in done.stderr


def test_sections_are_read_like_nested_mappings():
    values = {"data": {"flip": True}}
    text = b"data: {image_size: '16'}\nseed: 3\nloss:\ntime.std: 1"
    read_yaml(TrainConfig, text, values, "file")
    assert values == {"data": {"flip": True, "image_size": 16}, "seed": 3, "loss": {}, "time": {"std": 1.0}}
    with pytest.raises(UserError, match=r"^file: unknown key loss\.lr; did you mean optimizer\.lr\?$"):
        read_yaml(TrainConfig, b"loss: {lr: 1}", {}, "file")
