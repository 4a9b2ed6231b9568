"""Options from dataclasses, the messages for mistyped ones, and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from pixelgen.config import DataConfig, TrainConfig, load_config
from pixelgen.config import command_line as cli
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


PAIRS = "a list of pairs, [[A, B], ...], A an integer and B a number"


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
            "unknown option --samples-per-lable; did you mean --samples-per-label?",
        ),
        (["--zzz"], "unknown option --zzz; --help lists all options"),
        (["--samples-per-label", "8.5"], "--samples-per-label must be an integer, got '8.5'"),
        (["--scale", "big"], "--scale must be a number, got 'big'"),
        (["--method", "rk4"], "--method must be one of euler, heun, got 'rk4'"),
        (["--limit", "some"], "--limit must be an integer or null, got 'some'"),
        (["--use-ema", "maybe"], "--use-ema must be true or false, got 'maybe'"),
        (["--pair", "[1]"], "--pair must be a list of 2 values, [A, B], got '[1]'"),
        (["--changes", "[5, 0.1]"], f"--changes must be {PAIRS}, got '[5, 0.1]'"),
        (["--changes", "[[5.5, 0.1]]"], f"--changes must be {PAIRS}, got '[[5.5, 0.1]]'"),
        (["--changes"], f"--changes needs a value: {PAIRS}"),
        (["--scale"], "--scale needs a value: a number"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_is_right(argv, message):
    with pytest.raises(UserError) as caught:
        parse("--model", "a", *argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_required_option_is_named():
    with pytest.raises(UserError, match=r"^missing --model$"):
        parse("--scale", "1")


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
    assert cli.nearest(name, cli.field_types(TrainConfig)) == expected


def test_a_section_given_as_an_option_lists_its_options():
    with pytest.raises(UserError, match=r"--data is a section; its options are --data\.name, --data\.image"):
        load_config(["--data", "imagenet"])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in cli.field_types(TrainConfig):
        entry = text.split(f"\n  --{key} ", 1)[1].split("\n  --", 1)[0]
        explanation = " ".join(entry.split()).split("(type:")[0]
        assert len(explanation.split()) >= 3, f"--{key} has no help: {entry}"
    assert all(f"\n  {option}" in text for option in ("--config", "--resume", "--print_config"))


def test_help_shows_a_presets_values_as_the_defaults(capsys):
    with pytest.raises(SystemExit):
        load_config(["--config", "jit-b-256", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "of all processes together. (type: int, default: 1024)" in text
    assert "two averages. (type: tuple[float, float], default: [0.9, 0.95])" in text
    assert "late. (type: tuple[tuple[int, float], ...], default: [])" in text


def test_help_shows_lists_as_they_are_written(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("loss: {alignment_schedule: [[5, 0.1], [7, 0]]}\n")
    with pytest.raises(SystemExit):
        load_config(["--config", str(mine), "--help"])
    assert "...], default: [[5, 0.1], [7, 0.0]])" in " ".join(capsys.readouterr().out.split())


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
import pixelgen.config, pixelgen.data, pixelgen.planning.flops
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
    message = "unknown option --loss.lpips_wieght; did you mean --loss.lpips_weight?"
    assert done.stderr == f"pixelgen.train: error: {message}\n"


def test_sections_are_read_like_nested_mappings():
    values = cli.read_values(TrainConfig, {"data": {"image_size": 16}, "seed": 3, "loss": None}, "file")
    assert values == {"data.image_size": 16, "seed": 3}
    assert cli.field_types(DataConfig)["image_size"] is int
