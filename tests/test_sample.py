"""The sampling and evaluation commands and the pipeline behind them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import FLOW_ONLY, fails_with, refused

from pixelgen import evaluate, sample, train
from pixelgen.data.sources.digits import Digits
from pixelgen.errors import UserError
from pixelgen.evaluation.metrics import evaluate_digits
from pixelgen.models.jit import JiT
from pixelgen.models.released import load_strictly
from pixelgen.models.sizes import model_config
from pixelgen.sampling.pipeline import Pipeline
from pixelgen.training.checkpoint import read as checkpoints


def trained(folder: Path, steps: int) -> None:
    arguments = ["--out_dir", str(folder), "--name", "short", "--device", "cpu", *FLOW_ONLY]
    arguments += ["--train.max_steps", str(steps), "--train.sample_every", "0", "--train.log_every", "20"]
    assert train.main(arguments) == 0


@pytest.fixture(scope="session")
def run_dir(made_once) -> Path:
    return made_once("sampled", lambda folder: trained(folder, 60)) / "short"


def test_the_command_writes_images_grid_and_npz(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(run_dir), "--labels", "3,0", "--samples-per-label", "4", "--steps", "5"]
    assert sample.main([*arguments, "--guidance", "2", "--sampler", "heun", "--out", str(out)]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}_label{3 if i < 4 else 0}.png" for i in range(8)), "grid.png", "samples.npz"]
    content = np.load(out / "samples.npz")
    assert content["arr_0"].shape == (8, 8, 8, 1) and content["arr_0"].dtype == np.uint8
    assert content["arr_1"].tolist() == [3] * 4 + [0] * 4
    first = np.asarray(Image.open(out / "000000_label3.png"))
    assert np.array_equal(first, content["arr_0"][0, :, :, 0])
    grid = Image.open(out / "grid.png")
    assert grid.width > 4 * 40 and grid.height > 2 * 40  # two rows of four, enlarged
    printed = capsys.readouterr().out
    assert "NFE 18" in printed and "img/s" in printed  # Heun, 5 steps: 9 evaluations, all of them guided


def test_an_image_depends_on_its_index_alone(run_dir):
    pipeline = Pipeline.from_run(run_dir)
    labels = [0, 1, 2, 3, 4]
    together = pipeline.sample(labels, steps=4)
    split = pipeline.sample(labels, steps=4, batch_size=2)
    assert (together.int() - split.int()).abs().max() <= 1  # matrix products round by batch size
    tail = pipeline.sample(labels[3:], steps=4, first_index=3)
    assert (together[3:].int() - tail.int()).abs().max() <= 1
    other = pipeline.sample(labels, steps=4, seed=1)
    assert (together.int() - other.int()).abs().max() > 50


def test_settings_come_from_the_run_unless_given(run_dir):
    pipeline = Pipeline.from_run(run_dir)
    assert pipeline.settings.sampler == "heun"
    default = pipeline.sample([0, 1])
    assert pipeline.nfe == 2 * (2 * pipeline.settings.steps - 1)
    for sampler, nfe in {"euler": 6, "heun": 11, "heun-reuse": 6, "adams": 6, "flow_dpm": 6}.items():
        images = pipeline.sample([0, 1], sampler=sampler, steps=6, guidance=1.0)
        assert pipeline.nfe == nfe
        assert not torch.equal(images, default)
    pipeline.sample([0, 1], steps=10, sampler="euler", guidance_low=0.25, guidance_high=0.55)
    assert pipeline.nfe == 10 + 3  # t = 0.3, 0.4, 0.5 are guided
    pipeline.sample([0, 1], steps=10, sampler="euler", guidance_rule="released")
    assert pipeline.nfe == 2 * 10 - 1  # all but the first step


def test_raw_and_averaged_weights_differ(run_dir):
    ema, raw = (Pipeline.from_run(run_dir, weights=weights) for weights in ("ema", "raw"))
    assert not torch.equal(ema.sample([5], steps=3), raw.sample([5], steps=3))


def test_without_a_class(run_dir):
    assert Pipeline.from_run(run_dir).sample([10], steps=2).shape == (1, 1, 8, 8)


def test_released_checkpoints_are_sampled(tmp_path):
    model = JiT(model_config("tiny/4"))
    state = {
        f"{prefix}{key}": value
        for key, value in model.state_dict().items()
        for prefix in ("denoiser.", "ema_denoiser.")
    }
    torch.save({"state_dict": state}, tmp_path / "tiny.ckpt")
    pipeline = Pipeline.from_released(tmp_path / "tiny.ckpt", "tiny/4")
    assert (pipeline.settings.sampler, pipeline.dtype) == ("heun", "bfloat16")
    assert pipeline.sample([0], steps=2).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"tiny.ckpt: a .ckpt has ema and raw weights only, got '0.9999'"):
        Pipeline.from_released(tmp_path / "tiny.ckpt", "tiny/4", weights="0.9999")


@pytest.mark.slow
def test_sixty_seconds_of_training_already_give_digits(tmp_path):
    # The full figures are those of the default run (docs/digits.md); these bars are for 400 steps.
    trained(tmp_path, 400)
    pipeline = Pipeline.from_run(tmp_path / "short")
    labels = Digits().labels
    images = pipeline.sample(torch.from_numpy(labels), guidance=1.0, steps=10)
    report = evaluate_digits(images.numpy(), labels)
    assert report["frechet_distance"] < 150  # one picture per class: 451
    assert 0.5 < report["variance_ratio"] < 1.5
    assert report["svc_agreement"] > 0.5


def test_evaluate_prints_and_writes_the_figures(run_dir, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert (
        evaluate.main(["--model", str(run_dir), "--guidance", "1.0", "--steps", "2", "--out", str(out)]) == 0
    )
    figures = json.loads(out.read_text())
    assert [row["guidance"] for row in figures] == [1.0]
    assert all(math.isfinite(value) for value in figures[0].values())
    assert "Frechet" in capsys.readouterr().out
    argv = ["--model", str(run_dir), "--out", str(out)]
    assert "exists" in fails_with(capsys, argv, evaluate.main, "pixelgen.evaluate")


def test_user_errors(run_dir, tmp_path, capsys):
    def refusal(*options: str, main=sample.main) -> str:
        return fails_with(capsys, ["--model", str(run_dir), *options], main, "pixelgen.sample")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "[0, 9], got 12" in refusal("--labels", "0,12")
    assert "numbers separated by commas" in refusal("--labels", "cat")
    assert "no run" in refusal("--model", str(tmp_path / "none"))
    assert "--size" in refusal("--model", str(tmp_path / "x.ckpt"))
    assert "--size is for .ckpt files" in refusal("--size", "JiT-B/16")
    wrong = ["--model", str(tmp_path / "x.ckpt"), "--size", "JiT-B/16"]
    assert "no checkpoint at" in refusal(*wrong)
    (tmp_path / "x.ckpt").write_bytes(b"not a checkpoint")
    assert "not a readable" in refusal(*wrong)
    assert "not an empty folder" in refusal("--out", str(tmp_path / "full"))
    given = ["--model", str(run_dir)]
    assert "--sampler: must be euler|heun|" in refused(capsys, sample.main, [*given, "--sampler", "rk45"])
    assert "Perhaps you meant: --steps" in refused(capsys, sample.main, [*given, "--step", "3"])
    assert "auto, cpu or cuda" in refusal("--device", "tpu")
    assert "--batch-size" in refusal("--batch-size", "0")
    assert "--batch-size" in refusal("--batch-size", "-5", main=evaluate.main)
    assert "--seed" in refusal("--seed", str(2**63))
    assert "--seed" in refusal("--seed", "-1", main=evaluate.main)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal("--device", "cuda")
    with pytest.raises(UserError, match="batch_size"):
        Pipeline.from_run(run_dir).sample([0], batch_size=0)


def test_weights_that_do_not_fit_are_listed(run_dir, tmp_path):
    weights = checkpoints.load_ema_weights(checkpoints.find_checkpoint(run_dir))
    weights["extra"] = weights.pop("final_layer.linear.bias")
    with pytest.raises(UserError, match=r"missing final_layer.linear.bias.*unexpected extra"):
        load_strictly(JiT(model_config("tiny/2")), weights, "file")
