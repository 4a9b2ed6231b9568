"""Presets, YAML, and the checks of every section."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import torch
import yaml
from training import refused

import pixelgen
from pixelgen.config import (
    DataConfig,
    EmaConfig,
    LossConfig,
    ModelOptions,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    config_from_yaml,
    config_to_yaml,
    load_config,
    preset_names,
)
from pixelgen.encoders.dinov2 import MODELS
from pixelgen.errors import UserError
from pixelgen.models.families import build_denoiser
from pixelgen.models.pixeldit_sizes import PIXELDIT_SIZES
from pixelgen.models.sizes import ModelConfig
from pixelgen.sampling.samplers import SAMPLERS

PRESETS = [
    *("digits", "jit-b-256", "jit-l-256"),
    *("pixeldit-b-256", "pixeldit-digits", "pixeldit-l-256"),
    *("pixeldit-xl-256", "pixeldit-xl-256-paper", "pixeldit-xl-512"),
    *("pixelgen-dit-xl-256", "pixelgen-l-256", "pixelgen-xl-256"),
]


def load(*argv: str) -> TrainConfig:
    return load_config([*argv, "--name", "test"])[0]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_presets_are_those_documented():
    assert preset_names() == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_its_model_and_survives_yaml(preset):
    config = load("--config", preset)
    assert config_from_yaml(config_to_yaml(config)) == config
    with torch.device("meta"):
        model = build_denoiser(config.model_config())
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000


def test_the_defaults_are_the_preset_digits():
    assert load() == load("--config", "digits") == TrainConfig(name="test")


def test_the_released_recipes():
    """The numbers of arXiv 2602.02493 and 2511.13720, spelt out: a changed default must not move them."""
    xl, large, jit = (load("--config", name) for name in ("pixelgen-xl-256", "pixelgen-l-256", "jit-l-256"))
    assert xl.model_config() == pixelgen.model_config("PixelGen-XL/16")
    assert large.model_config() == pixelgen.model_config("PixelGen-L/16")
    for config in (xl, large):
        adam = OptimizerConfig(
            lr=1e-4, betas=(0.9, 0.999), warmup_steps=0, schedule="constant", max_grad_norm=None
        )
        assert config.optimizer == adam
        assert (config.train.batch_size, config.ema.decay, config.data.flip) == (256, 0.9999, False)
        loss = config.loss
        assert (loss.alignment_weight, loss.alignment_layer) == (0.5, 8)
        assert (loss.lpips_weight, loss.p_dino_weight, loss.gate_t) == (0.1, 0.01, 0.3)
        assert (loss.stages, loss.tokens, loss.p_dino_gate) == ("vgg16", "dinov2_vitb14", "paper")
        assert (config.time.mean, config.time.std, config.time.t_eps) == (-0.8, 0.8, 0.05)
    assert xl.sample == SampleConfig(
        sampler="heun", steps=50, guidance=2.25, guidance_low=0.1, guidance_high=0.9, timeshift=2.0
    )
    assert large.sample == SampleConfig(sampler="euler", steps=50, guidance=1.0)
    assert jit.model_config() == pixelgen.model_config("JiT-L/16")
    assert (jit.optimizer.lr, jit.optimizer.warmup_steps, jit.train.batch_size) == (2e-4, 6255, 1024)
    assert jit.loss.alignment_weight == jit.loss.lpips_weight == jit.loss.p_dino_weight == 0
    assert jit.data.flip and jit.sample.guidance_low == 0.1


def test_the_recipes_of_pixeldit():
    """The numbers of arXiv 2511.20645 and of its public code, as those above."""
    names = ("pixeldit-xl-256", "pixeldit-xl-256-paper", "pixeldit-xl-512", "pixelgen-dit-xl-256")
    xl, paper, large_images, perceptual = (load("--config", name) for name in names)
    small = {size: load("--config", f"pixeldit-{size.lower()}-256") for size in ("B", "L")}
    adam = OptimizerConfig(
        lr=1e-4, betas=(0.9, 0.999), warmup_steps=0, schedule="constant", max_grad_norm=1.0, label_drop=0.1
    )
    sample = SampleConfig(
        sampler="flow_dpm",
        steps=100,
        guidance=2.75,
        guidance_low=0.1,
        guidance_high=0.9,
        guidance_rule="pixeldit",
        timeshift=1.0,
    )
    assert xl.model_config() == PIXELDIT_SIZES["PixelDiT-XL/16"]
    assert (xl.optimizer, xl.sample) == (adam, sample)
    assert xl.ema == EmaConfig(decay=0.9999, warmup=False)
    assert (xl.train.batch_size, xl.train.max_steps, xl.data.flip) == (256, 320 * 5000, False)
    assert (xl.time.distribution, xl.time.mean, xl.time.std, xl.time.timeshift) == ("logit_normal", 0, 1, 1)
    loss = xl.loss
    assert (loss.alignment_weight, loss.alignment_layer, loss.projector_width) == (0.5, 8, 1152)
    assert (loss.lpips_weight, loss.p_dino_weight, loss.tokens) == (0, 0, "dinov2_vitb14")
    assert (xl.dtype, xl.compile) == ("bfloat16", True)

    later = dataclasses.replace(adam, lr_changes=((160 * 5000, 1e-5),))
    assert paper == dataclasses.replace(xl, optimizer=later)
    terms = dataclasses.replace(
        loss, lpips_weight=0.1, p_dino_weight=0.01, gate_t=0.3, stages="vgg16", stages_weights="pretrained"
    )
    assert perceptual == dataclasses.replace(xl, loss=terms)
    assert large_images == dataclasses.replace(
        xl,
        data=dataclasses.replace(xl.data, image_size=512),
        time=dataclasses.replace(xl.time, timeshift=3.0),
        optimizer=dataclasses.replace(adam, max_grad_norm=0.5),
        sample=dataclasses.replace(sample, guidance=3.5, guidance_high=1.0, timeshift=2.0),
    )
    for size, config in small.items():
        assert config.model_config() == PIXELDIT_SIZES[f"PixelDiT-{size}/16"]
        assert config.loss.projector_width == config.model_config().width
        assert config.loss.alignment_layer == {"B": 4, "L": 8}[size]
        assert dataclasses.replace(config, model=xl.model, loss=loss) == xl


def test_later_files_win_over_earlier_and_the_command_line_over_all(tmp_path):
    mine = write(tmp_path / "mine.yaml", "train: {batch_size: 8, max_steps: 5}\nseed: 4\n")
    config = load("--train.max_steps", "7", "--config", "pixelgen-l-256", "--config", mine)
    assert (config.train.batch_size, config.train.max_steps, config.seed) == (8, 7, 4)
    assert config.model.size == "PixelGen-L/16"
    assert config.loss == load("--config", "pixelgen-l-256").loss


def test_a_run_without_a_name_is_named_after_its_configuration_and_the_time(tmp_path):
    assert load_config([])[0].name.startswith("digits-20")
    assert load_config(["--data.name", "folder"])[0].name.startswith("folder-20")
    assert load_config(["--config", "jit-b-256"])[0].name.startswith("jit-b-256-20")
    mine = write(tmp_path / "mine.yaml", "seed: 4")
    assert load_config(["--config", mine])[0].name.startswith("mine-20")


def test_print_config_prints_what_can_be_read_back(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        load_config(["--print_config", "--optimizer.max_grad_norm", "null", "--optimizer.lr", "1e-4"])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert "  alignment_schedule: []\n" in text
    config = config_from_yaml(text)
    assert config == TrainConfig(optimizer=OptimizerConfig(max_grad_norm=None, lr=1e-4))


def test_resume_takes_the_runs_configuration_and_overrides(tmp_path):
    stored = TrainConfig(name="old", seed=7, loss=LossConfig(gate_t=0.1))
    write(tmp_path / "config.yaml", config_to_yaml(stored))
    config, resume = load_config(["--resume", str(tmp_path), "--train.max_steps", "9"])
    assert resume == str(tmp_path)
    assert (config.name, config.seed, config.loss.gate_t, config.train.max_steps) == ("old", 7, 0.1, 9)
    assert load_config([])[1] is None


@pytest.mark.parametrize("text", ["null", "~", "true", "1e3", "7", "off", "", "[a", "a: b #c", "x\ny", " x "])
def test_any_text_survives_yaml(text):
    config = TrainConfig(
        out_dir=text, data=DataConfig(name="folder", path=text), loss=LossConfig(tokens_weights=text)
    )
    assert config_from_yaml(config_to_yaml(config)) == config


def test_every_value_survives_yaml():
    config = TrainConfig(
        name="7",
        seed=2**40,
        data=DataConfig(flip=True),
        model=ModelOptions(depth=4, proj_dropout=1e-7),
        loss=LossConfig(balance="off", stages_weights="no", p_dino_layer=3),
        optimizer=OptimizerConfig(lr=1 / 3 * 1e-9, betas=(0.9, 0.999), max_grad_norm=None),
    )
    assert config_from_yaml(config_to_yaml(config)) == config


def test_yaml_as_people_write_it():
    config = config_from_yaml("loss: {balance: off}\noptimizer:\n  lr: 1e-4\n  betas: [0, 0.9]\nmodel:\n")
    assert config == TrainConfig(optimizer=OptimizerConfig(lr=1e-4, betas=(0.0, 0.9)))
    assert config_from_yaml("") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss:\n  lpips_wieght: 1", "unknown key loss.lpips_wieght; did you mean loss.lpips_weight?"),
        ("losss: {}", "x.yaml: unknown key losss; did you mean loss?"),
        ("traim:\n  max_steps: 3", "x.yaml: unknown key traim; did you mean train?"),
        ("resume: runs/a", "x.yaml: unknown key resume"),
        ("train: {batch_size: many}", "x.yaml: train.batch_size must be integer, got 'many'"),
        ("train: {batch_size: 2.5}", "x.yaml: train.batch_size must be integer, got 2.5"),
        ("train: {batch_size: null}", "x.yaml: train.batch_size must be integer, got null"),
        (
            "loss: {alignment_schedule: {5: 0.1}}",
            "x.yaml: loss.alignment_schedule must be [[integer, number], ...], got {5: 0.1}",
        ),
        ("data: {flip: often}", "x.yaml: data.flip must be true|false, got 'often'"),
        ("loss: {p_dino_gate: both}", "x.yaml: loss.p_dino_gate must be paper|released, got 'both'"),
        ("train: 3", "x.yaml: train is a section and must hold 'key: value' lines, got 3"),
        ("- a", "x.yaml: must hold 'key: value' lines"),
        ("a: b: c", "x.yaml: not valid YAML in line 1"),
        ("a: [1", "x.yaml: not valid YAML in line"),
        ("train: {batch_size: 0}", "train.batch_size must be at least 1, got 0"),
        ("\x00", "x.yaml: not a YAML file"),
    ],
)
def test_mistakes_in_yaml(text, message, tmp_path):
    with pytest.raises(UserError) as caught:
        config_from_yaml(text, "x.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        load("--config", path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "pixelgen-xxl-256"], "unknown preset pixelgen-xxl-256; did you mean pixelgen-xl-256?"),
        (["--config", "zzz"], f"unknown preset zzz; Presets: {', '.join(PRESETS)}"),
        (["--config", "digits", "--resume", "runs/a"], "leave out --config"),
        (["--model.size", "JiT-Q/16"], "model.size must be one of JiT-B/16, "),
        (["--model.patch_size", "3"], "image_size must be a multiple of patch_size 3, got 8"),
        (
            ["--model.depth", "2"],
            "loss.alignment_layer must be at least 1 and at most 1, got 2",
        ),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_option_of_presets(capsys):
    assert "Missing value for argument '--config'" in refused(capsys, load_config, ["--config"])
    error = refused(capsys, load_config, ["--conf", "digits"])
    assert (
        "Unrecognized options: --conf, digits Perhaps you meant: --config PRESET|FILE preset, one of digits, "
        in error
    )


def test_missing_files_are_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config: no such file: nowhere\.yaml"):
        load("--config", "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="--resume: no run at"):
        load_config(["--resume", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"--resume: .* has no config\.yaml"):
        load_config(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match="is a folder; give a preset or a YAML file"):
        load("--config", str(tmp_path))


WRONG = """
    name=a/b name=.. name="" device=tpu dtype=float16 kernels=fast seed=-1 threads=-1
    data.name=cifar data.image_size=0 data.channels=2 data.num_classes=0 data.workers=-1
    data.max_broken=-0.1 data.max_broken=1.5
    model.size=JiT
    time.distribution=normal time.std=0.0 time.std=.nan time.std=-1.0 time.timeshift=0.0 time.timeshift=-1.0
    time.timeshift=.nan time.timeshift=.inf time.t_eps=0.0 time.t_eps=.nan time.t_eps=1.0
    time.noise_scale=0.0
    loss.alignment_weight=-1.0 loss.alignment_layer=0 loss.alignment_layer=3 loss.projector_width=0
    loss.lpips_weight=-1.0 loss.p_dino_weight=-1.0 loss.gate_t=-0.1 loss.gate_t=1.1 loss.p_dino_gate=both
    loss.perceptual_ratio=-1.0 loss.balance="on" loss.balance_start_step=-1 loss.balance_every=0
    loss.stages=alexnet loss.tokens=clip loss.p_dino_layer=0
    optimizer.lr=0.0 optimizer.lr=.nan optimizer.betas=[1.0,0.9] optimizer.betas=[0.9,-0.1]
    optimizer.weight_decay=-1.0 optimizer.warmup_steps=-1 optimizer.schedule=linear
    optimizer.max_grad_norm=0.0 optimizer.label_drop=1.5
    ema.decay=1.0
    train.batch_size=0 train.max_steps=0 train.log_every=0 train.sample_every=-1 train.checkpoint_every=-1
    train.keep_checkpoints=-1
    sample.sampler=rk4 sample.steps=0 sample.guidance=-1.0 sample.guidance_low=-0.1 sample.guidance_low=1.0
    sample.guidance_high=0.0 sample.guidance_high=1.1 sample.guidance_rule=both
    sample.timeshift=0.0 sample.timeshift=-1.0 sample.timeshift=.nan sample.timeshift=.inf
    sample.steps=-1 sample.guidance=.nan sample.guidance=.inf
"""


@pytest.mark.parametrize("wrong", WRONG.split())
def test_a_value_out_of_range_is_refused_by_name(wrong):
    key, _, text = wrong.partition("=")
    value = yaml.safe_load(text)
    section, _, name = key.rpartition(".")
    config = TrainConfig()
    with pytest.raises(UserError, match=name):
        change = {name: tuple(value) if isinstance(value, list) else value}
        if section:
            change = {section: dataclasses.replace(getattr(config, section), **change)}
        dataclasses.replace(config, **change)


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.1), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_an_interval_of_guidance_must_be_one(low, high):
    with pytest.raises(UserError, match=r"^sample\.guidance_(low|high) must "):
        SampleConfig(guidance_low=low, guidance_high=high)


def test_the_model_takes_shapes_from_the_data_and_the_rest_from_its_options():
    config = load(
        "--model.depth", "4", "--model.width", "32", "--data.image_size", "16", "--data.channels", "3"
    )
    assert config.model_config() == pixelgen.model_config(
        "tiny/2", depth=4, width=32, image_size=16, channels=3
    )
    options = {field.name for field in dataclasses.fields(ModelOptions())}
    architecture = {field.name for field in dataclasses.fields(ModelConfig)}
    of_data = {"image_size", "channels", "num_classes"}
    assert options >= architecture - of_data | {"family", "size"}  # and those of other families
    assert not options & of_data


def test_choices_are_what_the_code_behind_them_knows():
    def choices(section: type, name: str) -> set[str]:
        return set(typing.get_args(typing.get_type_hints(section)[name]))

    assert choices(LossConfig, "stages") == {"vgg16", "embedded"}
    assert choices(LossConfig, "tokens") == {*MODELS, "embedded"}
    assert choices(SampleConfig, "sampler") == set(SAMPLERS)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]


def test_the_package_offers_its_names_without_loading_them():
    assert set(pixelgen.__all__) <= set(dir(pixelgen))
    assert pixelgen.TrainConfig is TrainConfig
    assert pixelgen.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pixelgen.nothing  # noqa: B018


def test_paths_are_kept_so_that_any_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Path("vgg16.pth").touch()

    def path(*options):
        return load_config(["--data.name", "hf", *options])[0].data.path

    assert path("--data.path", "photos") == str(tmp_path / "photos")
    assert path("--data.path", "shards/*.tar") == str(tmp_path / "shards" / "*.tar")
    assert path("--data.path", "user/photos") == "user/photos"  # of the hub
    loss = load_config(["--loss.stages_weights", "vgg16.pth", "--loss.tokens_weights", "random"])[0].loss
    assert (loss.stages_weights, loss.tokens_weights) == (str(tmp_path / "vgg16.pth"), "random")
