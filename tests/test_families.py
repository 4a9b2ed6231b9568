"""Families of denoisers: one from outside trains, resumes, samples and is sharded as the package's own."""

import pickle
import re
from copy import deepcopy

import pytest
import torch
import toy_family
from pixelgen_kernels import philox_normal, philox_uniform, select
from processes import train
from training import (
    FLOW_ONLY,
    QUICK,
    curve,
    fails_with,
    options,
    refused,
    start_trainer,
    train_steps,
    unframed,
)

from pixelgen import Pipeline
from pixelgen.conditions import dropped, joined, part_of
from pixelgen.config import config_from_yaml, config_to_yaml, load_config
from pixelgen.flow import interpolate
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import Family, build_denoiser, register
from pixelgen.models.jit import JiT
from pixelgen.models.sizes import SIZES
from pixelgen.planning.plan import plan_report
from pixelgen.train import main
from pixelgen.training.step import LABEL_DROP_STREAM

pytestmark = pytest.mark.usefixtures("no_curves")
TOY = ("--model.family", "toy", "--model.size", "toy/2")


# --- names and options


def test_a_family_is_known_by_its_name_and_its_options_are_its_own():
    config, _ = load_config([*TOY, "--model.slope", "0.5", "--model.width", "16"])
    architecture = config.model_config()
    of_data = {"image_size": 8, "channels": 1, "num_classes": 10}
    assert architecture == toy_family.ToyConfig(width=16, depth=3, patch_size=2, slope=0.5, **of_data)
    assert isinstance(build_denoiser(architecture), toy_family.Toy)
    assert isinstance(build_denoiser(SIZES["tiny/2"]), JiT)
    text = config_to_yaml(config)
    assert "slope" in text and "bottleneck_dim" not in text  # nor what other families would have there
    assert config_from_yaml(text) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.slope", "2"], "model.slope is an option of model.family toy, not of jit: leave it out"),
        (
            [*TOY, "--model.mlp_ratio", "2"],
            "model.mlp_ratio is an option of model.family jit, not of toy: leave it out",
        ),
        ([*TOY[:2]], "model.size must be one of toy/2, got 'tiny/2', which is a size of model.family jit"),
    ],
)
def test_what_is_refused(tmp_path, capsys, given, said):
    assert f"error: {said}" in fails_with(capsys, ["--out_dir", str(tmp_path), *given])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.family", "dit"], "--model.family: must be jit|pixeldit|toy, got 'dit'"),
        ([*TOY, "--model.slope", "steep"], "--model.slope: must be number|null, got 'steep'"),
        ([*TOY, "--model.slop", "1"], "--model.slop, 1 Perhaps you meant: --model.slope number|null"),
    ],
)
def test_what_the_parser_refuses(capsys, given, said):
    assert said in refused(capsys, load_config, given)


def test_the_help_explains_the_options_of_every_family(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"])
    text = unframed(capsys.readouterr().out)
    assert "factor of every block's branch" in text and "attention heads N" in text


def test_a_denoiser_that_lacks_something_cannot_be_built():
    class Half(toy_family.Toy):
        null = Denoiser.null

    with pytest.raises(TypeError, match=r"abstract method '?null"):
        Half(toy_family.SIZES["toy/2"])


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="family toy is registered already"):
        register(Family(name="toy", config=toy_family.ToyConfig, sizes={}, module="other:Toy"))


# --- training, sampling, several processes


def test_it_trains_resumes_to_the_bit_and_samples(tmp_path, with_embedded):
    def run(name: str, steps: int, *more: str) -> list[dict[str, float]]:
        common = (*TOY, "--train.log_every", "1", "--train.checkpoint_every", "2", *more)
        assert main(options(tmp_path, name, steps, *common)) == 0
        return curve(tmp_path / name)

    whole = run("whole", 4)
    assert {"flow_matching", "alignment", "lpips", "p_dino"} <= whole[-1].keys()
    run("parts", 2)
    assert main(["--resume", str(tmp_path / "parts"), "--train.max_steps", "4"]) == 0
    assert [line["loss"] for line in curve(tmp_path / "parts")] == [line["loss"] for line in whole]
    pipeline = Pipeline.from_run(tmp_path / "parts")
    images = pipeline.sample([0, 3], steps=2, guidance=2.0)
    assert images.shape == (2, 1, 8, 8) and images.float().std() > 0
    assert torch.equal(images, Pipeline.from_run(tmp_path / "whole").sample([0, 3], steps=2, guidance=2.0))


def test_one_batch_is_learnt_by_heart(tmp_path):
    trainer = start_trainer(options(tmp_path, "run", 200, *FLOW_ONLY, *TOY, "--time.mean", "0"))
    images, labels = trainer.dataset.batch(range(16))
    losses = [trainer.train_step(images, {"label": labels})["flow_matching"].item() for _ in range(200)]
    assert losses[-1] < 0.7 * losses[0]


COMMAND = """
import sys
sys.path.insert(0, {folder!r})
import toy_family
import train_command
train_command.main()
"""


def test_two_processes_that_shard_it_compute_what_one_does(tmp_path):
    file = tmp_path / "command.py"
    file.write_text(COMMAND.format(folder=toy_family.__file__.rpartition("/")[0]))
    common = [*QUICK, *FLOW_ONLY, *TOY, "--out_dir", str(tmp_path), "--train.max_steps", "3"]
    common += ["--train.log_every", "1", "--threads", "1"]
    for name, processes, more in (("one", 1, []), ("two", 2, ["--parallel.mode", "fsdp"])):
        train([*common, "--name", name, *more], processes, log=tmp_path / f"log_{name}", script=file)
    ours, theirs = (curve(tmp_path / name) for name in ("two", "one"))
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)


def test_every_kernel_setting_trains_alike(tmp_path):
    first = {}
    for name, more in (("auto", []), ("eager", ["--kernels", "eager"]), ("compiled", ["--compile", "true"])):
        trainer = start_trainer(options(tmp_path, name, 1, *FLOW_ONLY, *TOY, *more))
        first[name] = train_steps(trainer, 1)[0]["loss"]
    assert (
        first["eager"] == pytest.approx(first["auto"], rel=1e-5) == pytest.approx(first["compiled"], rel=1e-5)
    )


def test_it_is_planned():
    def plan(*more: str) -> dict[str, str]:
        large = ("--model.width", "4096", "--data.name", "synthetic", "--data.image_size", "64")
        config, _ = load_config([*TOY, *FLOW_ONLY, *large, "--name", "run", *more])
        return dict(re.findall(r"^  (\S.*?)  +(\S+)", plan_report(config, "8xH100"), re.MULTILINE))

    shallow, deep = plan(), plan("--model.depth", "30")
    for item in ("denoiser", "activations, 6 images", "sent, and as much received", "total"):
        assert shallow[item] != deep[item], item


# --- velocity


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_velocity_is_judged_as_it_is(tmp_path, kernels):
    more = ("--time.mean", "3", "--time.noise_scale", "1.5", "--kernels", kernels)
    trainer = start_trainer(options(tmp_path, "run", 1, *FLOW_ONLY, *TOY, *more))
    config, model = trainer.config, trainer.model
    images, labels = trainer.dataset.batch(range(16))
    t, index = trainer.draw_time(0), torch.arange(16)
    assert t.max() > 0.99  # where 1 - t would lose digits
    drop = (
        philox_uniform(config.seed, 0, index, 1, stream=LABEL_DROP_STREAM)[:, 0] < config.optimizer.label_drop
    )
    condition = dropped({"label": labels}, model.null({"label": labels}), drop)
    noise = 1.5 * philox_normal(config.seed, 0, index, 64).double().view(16, 1, 8, 8)
    x = images.double() / 127.5 - 1
    x_t = interpolate(x, noise, t.double())
    exact = deepcopy(model).double()
    exact.ops = select("eager")
    cut = {"patch_size": 2, "channel_order": "last"}
    velocity, _ = exact.forward_tokens(exact.ops.patchify(x_t, **cut), (4, 4), t.double(), condition)
    loss = (velocity - exact.ops.patchify(x - noise, **cut)).square().mean()
    loss.backward()
    found = trainer._forward(images, {"label": labels}, range(16), t, update_balance=True)
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=0)
    assert torch.equal(found.terms["flow_matching"], found.loss)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-6 * q.grad.abs().max(), name


def test_a_velocity_trains_with_every_term_in_any_number_of_parts(tmp_path, with_embedded):
    every = ("--loss.balance", "global", "--loss.balance_start_step", "0", "--loss.balance_every", "1")
    every += ("--loss.gate", "learned", "--loss.adversarial_weight", "0.1", "--time.mean", "1")

    def steps(parts: str) -> list[dict[str, float]]:
        more = (*TOY, *every, "--train.micro_batches", parts)
        return train_steps(start_trainer(options(tmp_path, f"parts_{parts}", 3, *more)), 3)

    whole, parts = steps("1"), steps("2")
    assert {"lpips", "p_dino", "adversarial", "discriminator", "gate_penalty"} <= whole[0].keys()
    assert whole[-1]["balance_weight"] != 1
    for line, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(line, rel=2e-4, abs=1e-6)


class Exact(Denoiser):
    """Knows the images and predicts the velocity, or x, exactly."""

    def __init__(self, x: torch.Tensor, prediction: str) -> None:
        super().__init__(SIZES["tiny/2"])
        self.x, self.prediction = nn_parameter(x), prediction

    def null(self, condition):
        return condition

    def fsdp_units(self):
        return []

    def balance_weight(self):
        return self.x

    def forward_tokens(self, tokens, grid, t, condition, tap=None):
        raise AssertionError("it knows images only")

    def forward(self, x_t, t, condition, tap=None):
        x = self.x[condition["label"]]
        return x if self.prediction == "x" else (x - x_t) / (1 - t).view(-1, 1, 1, 1)


def nn_parameter(x: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(x, requires_grad=False)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_samplers_take_either_prediction(sampler):
    x = torch.rand(10, 1, 8, 8) * 1.6 - 0.8
    settings = load_config([])[0].sample
    images = {
        kind: Pipeline(Exact(x, kind), settings).sample([3, 7], steps=8, sampler=sampler, guidance=1.0)
        for kind in ("x", "velocity")
    }
    difference = images["x"].int() - images["velocity"].int()
    assert difference.abs().max() <= 8  # x's last steps have the floor t_eps of 1 - t
    expected = ((x[[3, 7]] + 1) * 127.5).round().int()
    assert (images["velocity"].int() - expected).abs().max() <= 1


# --- conditions


def test_conditions_of_several_names():
    condition = {"text": torch.randn(4, 3, 2), "mask": torch.ones(4, 3, dtype=torch.bool)}
    null = {"text": torch.zeros(4, 3, 2), "mask": torch.zeros(4, 3, dtype=torch.bool)}
    found = dropped(condition, null, torch.tensor([True, False, False, True]))
    for name, value in found.items():
        assert torch.equal(value[[1, 2]], condition[name][[1, 2]])
        assert torch.equal(value[[0, 3]], null[name][[0, 3]])
    assert {name: len(value) for name, value in part_of(condition, 1, 3).items()} == {"text": 2, "mask": 2}
    assert joined(null, condition)["text"].shape == (8, 3, 2)
