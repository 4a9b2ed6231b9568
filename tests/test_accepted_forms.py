"""Every form in which options may be given, and the values that they lead to."""

from __future__ import annotations

import math
from operator import attrgetter

import pytest
import toy_family  # noqa: F401  registers a family
import yaml

from pixelgen.config import config_from_yaml, config_to_yaml, load_config
from pixelgen.config.command_line import parse
from pixelgen.data.prepare import command as prepare_command
from pixelgen.evaluate import EvaluateOptions
from pixelgen.planning.plan import plan_report
from pixelgen.sample import SampleOptions


def read(*argv: str):
    return load_config(["--name", "test", *argv])[0]


SINGLE = [
    ("data.image_size", "16", 16),
    ("train.max_steps", "1_000", 1000),
    ("train.max_steps", "0x10", 16),
    ("train.max_steps", "+5", 5),
    ("seed", "9223372036854775807", 2**63 - 1),
    ("optimizer.lr", "1e-4", 1e-4),
    ("optimizer.lr", "1E-4", 1e-4),
    ("optimizer.lr", ".5", 0.5),
    ("optimizer.lr", "5.", 5.0),
    ("optimizer.lr", "1", 1.0),
    ("optimizer.lr", ".inf", math.inf),
    ("time.mean", "-0.8", -0.8),
    ("time.mean", "-8e-1", -0.8),
    ("time.mean", "-.5", -0.5),
    ("time.mean", "-1", -1.0),
    ("data.flip", "true", True),
    ("data.flip", "True", True),
    ("data.flip", "yes", True),
    ("data.flip", "on", True),
    ("train.wandb", "TRUE", True),
    ("parallel.reshard_after_forward", "false", False),
    ("parallel.reshard_after_forward", "False", False),
    ("parallel.reshard_after_forward", "FALSE", False),
    ("parallel.reshard_after_forward", "no", False),
    ("parallel.reshard_after_forward", "off", False),
    ("optimizer.max_grad_norm", "null", None),
    ("optimizer.max_grad_norm", "~", None),
    ("optimizer.max_grad_norm", "2", 2.0),
    ("model.depth", "null", None),
    ("loss.p_dino_layer", "3", 3),
    ("init", "null", None),
    ("init", "~", None),
    ("out_dir", "null", "null"),
    ("out_dir", "7", "7"),
    ("out_dir", "true", "true"),
    ("out_dir", "1e3", "1e3"),
    ("out_dir", "off", "off"),
    ("out_dir", "a: b", "a: b"),
    ("out_dir", "[a", "[a"),
    ("out_dir", "", ""),
    ("init", "no/7", "no/7"),
    ("init", "None", "None"),
    ("init", "'a'", "'a'"),
    ("name", "2024-01-01", "2024-01-01"),
    ("optimizer.betas", "[0.9,0.95]", (0.9, 0.95)),
    ("optimizer.betas", "[0.9, 0.95]", (0.9, 0.95)),
    ("optimizer.betas", "[0, .5]", (0.0, 0.5)),
    ("optimizer.betas", "[1e-4, '0.5']", (1e-4, 0.5)),
    ("ema.power", "[]", ()),
    ("ema.power", "[0.05, 0.1]", (0.05, 0.1)),
    ("ema.decay", "0.9", 0.9),
    ("ema.decay", "[0.9, 0.99]", (0.9, 0.99)),
    ("ema.decay", "[0.9]", (0.9,)),
    ("loss.alignment_schedule", "[]", ()),
    ("loss.alignment_schedule", "[[100000, 0.1], [200000, 0]]", ((100000, 0.1), (200000, 0.0))),
    ("optimizer.lr_changes", "[]", ()),
    ("loss.balance", "off", "off"),
    ("loss.balance", "global", "global"),
    ("sample.sampler", "heun-reuse", "heun-reuse"),
    ("model.size", "tiny/4", "tiny/4"),
]


@pytest.mark.parametrize(("option", "text", "value"), SINGLE)
def test_a_value_on_the_command_line(option, text, value):
    spellings = {option, option.replace("_", "-")}
    for argv in ([f"--{name}", text] for name in spellings):
        found = attrgetter(option)(read(*argv))
        assert found == value and type(found) is type(value)
    assert attrgetter(option)(read(f"--{option}={text}")) == value


IN_YAML = [
    ("seed: 1_000", "seed", 1000),
    ("seed: '5'", "seed", 5),
    ("optimizer: {lr: 1e-4}", "optimizer.lr", 1e-4),
    ("optimizer: {lr: '0.5'}", "optimizer.lr", 0.5),
    ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
    ("optimizer: {lr: .inf}", "optimizer.lr", math.inf),
    ("optimizer:\n  betas: [0, 0.5]", "optimizer.betas", (0.0, 0.5)),
    ("optimizer:\n  betas:\n  - 1e-4\n  - 0.5\n", "optimizer.betas", (1e-4, 0.5)),
    ("optimizer: {max_grad_norm: null}", "optimizer.max_grad_norm", None),
    ("optimizer: {max_grad_norm: }", "optimizer.max_grad_norm", None),
    ("data: {flip: true}", "data.flip", True),
    ("data: {flip: yes}", "data.flip", True),
    ("data: {flip: 'true'}", "data.flip", True),
    ("init: 'null'", "init", "null"),
    ("init: null", "init", None),
    ("init: off", "init", "off"),
    ("data.image_size: 16", "data.image_size", 16),
    ("out_dir: '7'", "out_dir", "7"),
    ("loss: {balance: off}", "loss.balance", "off"),
    ("loss: {alignment_schedule: [[5, 0.1], [7, 0]]}", "loss.alignment_schedule", ((5, 0.1), (7, 0.0))),
    ("ema: {decay: 0.9}", "ema.decay", 0.9),
    ("ema: {decay: [0.9, 0.99]}", "ema.decay", (0.9, 0.99)),
    ("ema:\nloss: null\nmodel: {}\nseed: 3", "seed", 3),
    ("", "seed", 0),
    ("model: {depth: null, size: tiny/4}", "model.size", "tiny/4"),
    ("seed: 1\nseed: 2", "seed", 2),
]


@pytest.mark.parametrize(("text", "option", "value"), IN_YAML)
def test_a_value_in_yaml(text, option, value, tmp_path):
    found = attrgetter(option)(config_from_yaml(text))
    assert found == value and type(found) is type(value)
    (tmp_path / "mine.yml").write_text(text)
    assert attrgetter(option)(read("--config", str(tmp_path / "mine.yml"))) == value


def test_the_last_of_several_values_counts():
    assert read("--seed", "1", "--seed=2", "--out_dir", "a", "--out-dir", "b").seed == 2
    assert read("--out_dir", "a", "--out-dir", "b").out_dir == "b"


def test_configurations_of_every_kind_at_any_place(tmp_path):
    mine, more = tmp_path / "mine.yaml", tmp_path / "more.yaml"
    # neither file would do alone: only what they say together is checked
    mine.write_text("data: {streaming: true}\ntrain: {max_steps: 5}\nloss: {alignment_layer: 9}")
    more.write_text("data: {name: hf, path: a/b}\ntrain: {batch_size: 8}")
    config = read("--config=jit-b-256", "--seed", "3", f"--config={mine}", "--config", str(more))
    assert (config.data.streaming, config.data.name, config.data.image_size) == (True, "hf", 256)
    assert (config.train.max_steps, config.train.batch_size, config.loss.alignment_layer) == (5, 8, 9)
    assert config.model.size == "JiT-B/16" and config.seed == 3
    alone = read("--config", str(mine), "--data.name", "hf", "--loss.alignment_layer", "1")
    assert alone.data.streaming and alone.loss.alignment_layer == 1


@pytest.mark.parametrize("option", ["--print_config", "--print-config"])
@pytest.mark.parametrize("is_first", [True, False])
def test_printing_the_configuration(option, is_first, capsys):
    others = ["--config", "jit-b-256", "--data.flip", "false", "--optimizer.max-grad-norm", "null"]
    with pytest.raises(SystemExit) as stop:
        load_config([option, *others] if is_first else [*others, option])
    assert not stop.value.code
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["data"]["flip"] is False and printed["optimizer"]["max_grad_norm"] is None
    assert printed["train"]["batch_size"] == 1024 and "slope" not in printed["model"]
    assert config_to_yaml(config_from_yaml(text)) == text


@pytest.mark.parametrize("plan", [["--plan"], ["--plan", "8xH100"], ["--plan=8xH100"]])
def test_planning(plan, capsys):
    for argv in ([*plan, "--train.max_steps", "7"], ["--train.max_steps", "7", *plan]):
        with pytest.raises(SystemExit) as stop:
            load_config(argv, plan=plan_report)
        assert not stop.value.code
    first, second = capsys.readouterr().out.split("tiny/2")[1:]
    assert first == second and "time to step 7," in first


def test_resuming(tmp_path):
    (tmp_path / "config.yaml").write_text("name: old\nseed: 7\ntrain: {max_steps: 5}")
    for argv in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        config, resume = load_config([*argv, "--train.max-steps=9"])
        assert (config.name, config.seed, config.train.max_steps, resume) == ("old", 7, 9, str(tmp_path))
    for argv in (["--resume", "auto", "--name", "a"], ["--name=a", "--resume=auto", "--config=jit-b-256"]):
        config, resume = load_config(argv)
        assert (config.name, resume) == ("a", "auto")


def test_options_of_what_is_registered_late(tmp_path):
    toy = ["--model.family", "toy", "--model.size", "toy/2"]
    assert read(*toy, "--model.slope", "0.5").model.slope == 0.5
    assert read(*toy, "--model.slope=null").model.slope is None
    text = "model: {family: toy, size: toy/2, slope: 0.5, patch_size: 4}"
    assert config_from_yaml(text).model == read(*toy, "--model.slope=.5", "--model.patch-size", "4").model


def test_options_of_sampling_and_evaluation():
    for mark in "-_":
        argv = [f"--samples{mark}per{mark}label", "3", f"--guidance{mark}rule=released", "--model=a=b"]
        argv += ["--steps", "null", f"--guidance{mark}low", "1e-1", f"--batch{mark}size=2", "--labels", "0,1"]
        assert parse(SampleOptions, argv, prog="p") == SampleOptions(
            model="a=b",
            samples_per_label=3,
            guidance_rule="released",
            guidance_low=0.1,
            batch_size=2,
            labels="0,1",
        )
        argv = ["--model", "7", "--guidance", "1", f"--batch{mark}size", "2", "--out", "null"]
        assert parse(EvaluateOptions, argv, prog="p") == EvaluateOptions(
            model="7", guidance="1", batch_size=2
        )


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "7", "--shard-size", "3", "--max-broken", "0.5", "--crop", "fast"],
        ["--shard_size=3", "a", "--max_broken=.5", "7", "--crop=fast"],
        ["--crop", "fast", "--shard-size", "3", "--max-broken", "5e-1", "a", "7"],
        ["--src", "a", "--dst", "7", "--shard-size", "3", "--max-broken", "0.5", "--crop", "fast"],
        ["--dst=7", "--crop", "fast", "a", "--shard-size", "3", "--max-broken", "0.5"],
        ["--crop", "fast", "7", "--src=a", "--shard-size", "3", "--max-broken", "0.5"],
    ],
)
def test_source_and_folder_of_preparing(argv, monkeypatch, capsys):
    monkeypatch.setattr(prepare_command, "prepare", repr)
    assert prepare_command.main(argv) == 0
    options = prepare_command.PrepareOptions(src="a", dst="7", shard_size=3, max_broken=0.5, crop="fast")
    assert capsys.readouterr().out.strip() == repr(options)
